# SPDX-License-Identifier: Apache-2.0
"""Frozen features of CIFAR-10 that were learned without labels: `configs/cifar10_ssl.py`.

    python -m benchmarks.cifar10_ssl --source=folder:/data/cifar10 --workdir=runs/cifar10_ssl \
        --json benchmarks/results/cifar10_ssl.json

DINO, DINO with masked patches, a masked autoencoder and the initialised model, side by side: the
accuracy on test of 20 nearest neighbours and of a linear probe, and of the neighbours of raw
pixels. Of DINO it is that of the teacher. The results hold the curve of the neighbours on `val`
too. The same command resumes where it was stopped; --steps shortens all runs, and --set changes
keys of the config of all of them, which the results state.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.environment import write_results
from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.summary import last_results

KINDS = ("dino", "dino_ibot", "mae", "random")
# Of last_results, without the prefix of the teacher.
METRICS = ("test/20nn", "linear/top1", "test/rankme")


def train(kind: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; results on test as fractions, and the curve on val."""
    workdir = args.workdir / f"{kind}_{seed}"
    command = [
        *(sys.executable, "-m", "vit_jax.main", f"--config=configs/cifar10_ssl.py:{kind}"),
        *(f"--workdir={workdir}", f"--config.data.name={args.source}", f"--config.seed={seed}"),
    ]
    if args.steps and kind != "random":
        command += ["--config.epochs=none", f"--config.total_steps={args.steps}"]
    command += [f"--config.{change}" for change in args.set]
    subprocess.run(command, check=True)
    results = last_results(workdir)
    ema = "_ema" if kind.startswith("dino") else ""
    found = {name: results[name.replace("/", f"{ema}/")] for name in METRICS}
    key = f"val{ema}/20nn"
    curve = [(record["step"], record[key]) for record in read_metrics(workdir) if key in record]
    return {"seed": seed, **found, "pixels/20nn": results["pixels/20nn"], "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="data.name, such as folder:/data/cifar10")
    parser.add_argument("--workdir", type=Path, required=True, help="a folder for each run is here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, help="length of all runs in place of their own")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as model.patch_size=8"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()

    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in args.kinds}
    for seed in args.seeds:
        for kind in args.kinds:
            runs[kind].append(train(kind, seed, args))
    for kind, of_seeds in runs.items():
        for name in (*METRICS[:2], "pixels/20nn"):
            scores = [run[name] for run in of_seeds]
            span = f"{min(scores):.2%} to {max(scores):.2%} over {len(scores)} seeds"
            print(f"{kind:<10} {name:<12} mean {statistics.mean(scores):.2%}, {span}")
    if args.json:
        measured = {
            "device": jax.devices()[0].device_kind,
            "steps": args.steps,
            "set": args.set,
            "runs": runs,
        }
        write_results(args.json, measured, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
