# SPDX-License-Identifier: Apache-2.0
"""Segmentation of digits by a linear head on frozen features: those of DINO, and random ones.

    python -m benchmarks.dense_features --workdir=runs/dense_features \
        --json benchmarks/results/dense_features.json

Pre-trains `configs/digits_dino.py`, unless --dino names a run of it, and trains the head of
`configs/digits_segment.py` on the patches of its teacher, and on those of the initialised model,
which no gradient changes. The results are mIoU on test. The same command resumes where it was
stopped; --steps shortens the runs of the heads, and --dino_steps the pre-training.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.environment import write_results
from vit_jax.observe.summary import last_results

KINDS = ("dino", "random")
# What the config of segmentation changes: the model of digits_dino.py, which stays as it is.
CHANGES = {
    "model.num_layers": 3,
    "model.classifier": "token",
    "model.position_embedding": "sincos2d_mae",
    "objective.head": "linear",
    "objective.freeze_backbone": True,
    "optimizer.weight_decay": 1e-4,
    "optimizer.lr": 1e-2,
}
# In place of a number of steps, so that runs may be short.
WARMUP = {"optimizer.warmup_steps": "none", "optimizer.warmup_percent": 5}


def train(config: str, workdir: Path, changes: dict[str, Any]) -> dict[str, float]:
    """Runs the command, and returns the last results."""
    command = [
        *(sys.executable, "-m", "vit_jax.main", f"--config={config}", f"--workdir={workdir}"),
        *(f"--config.{key}={value}" for key, value in changes.items()),
    ]
    subprocess.run(command, check=True)
    return last_results(workdir)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="a folder for each run is here")
    parser.add_argument("--dino", type=Path, help="a run of configs/digits_dino.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="of the heads")
    parser.add_argument("--dino_steps", type=int, help="in place of those of its config")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()

    dino = args.dino or args.workdir / "dino"
    if args.dino is None:
        changes = {} if args.dino_steps is None else WARMUP | {"total_steps": args.dino_steps}
        train("configs/digits_dino.py", dino, changes)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for seed in args.seeds:
        for kind in KINDS:
            start = f"{dino}:ema_params" if kind == "dino" else "none"
            changes = {
                **CHANGES,
                **WARMUP,
                "init_from": start,
                "seed": seed,
                "total_steps": args.steps,
                "evals.val.every": args.steps,
            }
            workdir = args.workdir / f"{kind}_{seed}"
            results = train("configs/digits_segment.py", workdir, changes)
            names = ("miou", "pixel_accuracy")
            runs[kind].append({"seed": seed, **{name: results[f"test/{name}"] for name in names}})
    for kind, of_seeds in runs.items():
        scores = [run["miou"] for run in of_seeds]
        span = f"{min(scores):.2%} to {max(scores):.2%} over {len(scores)} seeds"
        print(f"{kind:<8} test mIoU: mean {statistics.mean(scores):.2%}, {span}")
    if args.json:
        measured = {
            "device": jax.devices()[0].device_kind,
            "steps": args.steps,
            "dino_steps": args.dino_steps,
            "runs": runs,
        }
        write_results(args.json, measured, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
