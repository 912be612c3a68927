# SPDX-License-Identifier: Apache-2.0
"""What further training without labels, on new images, gives a backbone.

    python -m benchmarks.continued_ssl --start=runs/cifar10_ssl/dino_0 \
        --workdir=runs/continued --json benchmarks/results/continued_ssl.json

--start is a run of `configs/cifar10_ssl.py:dino`. Its teacher has seen photographs, and is trained
on digits, as `configs/dino_continue.py` does it: new heads first, then everything, with a small
learning rate that falls towards the input. The results are the accuracies of 1 and 5 nearest
neighbours among 72 labelled digits, by the features of the teacher before and after; beside them
those of as many steps from new weights, and of raw pixels. The same command resumes where it was
stopped. The file is the config of the runs too: --config=benchmarks/continued_ssl.py:START.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

METRICS = ("test_ema/1nn", "test_ema/5nn")
KINDS = ("before", "continued", "new")


def get_config(start: str) -> ConfigDict:
    from configs import cifar10_ssl
    from vit_jax.checkpoint.workdir import read_config

    config = cifar10_ssl.get_config("dino")
    config.model = read_config(Path(start))["model"]
    config.init_from = f"{start}:ema_params"
    del config["epochs"]
    config.total_steps = 1000

    preprocess = "decode|resize(32)"
    jitter = "color_jitter(0.4, 0.4, 0)"
    wide = f"{preprocess}|random_shift(2)|inception_crop(32, 60, 100, 0.8, 1.25)|{jitter}"
    narrow = f"{preprocess}|inception_crop(16, 35, 70, 0.8, 1.25)|{jitter}"
    config.data = {
        "name": "digits",
        "split": "train[:90%]",
        "preprocess": wide,
        "views": (("global", 1, wide), ("local", 4, narrow)),
        "batch_size": 64,
    }
    config.optimizer.lr = 5e-4
    config.optimizer.layer_decay = 0.9
    config.optimizer.train_after = (
        ("dino_head/prototypes/.*", {"percent": 2}),
        ("(?!dino_head).*", {"percent": 5}),
    )
    judge = {"name": "knn", "k": (1, 5), "train_split": "train[:5%]", "preprocess": preprocess}
    config.evals = {
        "test": {**judge, "split": "test", "every_percent": 10},
        "pixels": {**judge, "split": "test", "of": "pixels"},
    }
    return config


def train(kind: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; what the features are worth before, after and in between."""
    from vit_jax.observe.jsonl import read_metrics
    from vit_jax.observe.summary import last_results

    workdir = args.workdir / f"{kind}_{seed}"
    changes = [f"--config.seed={seed}"]
    if kind == "before":
        # A step of no length.
        changes += ["--config.total_steps=1", "--config.optimizer={'name': 'sgd', 'lr': 0.0}"]
    elif args.steps:
        changes.append(f"--config.total_steps={args.steps}")
    if kind == "new":
        # Everything is trained from the first step on, as nothing is worth keeping.
        changes += [
            "--config.init_from=none",
            "--config.optimizer.train_after=(('dino_head/prototypes/.*', {'percent': 2}),)",
            "--config.optimizer.layer_decay=none",
            "--config.optimizer.lr=1e-3",
        ]
    config = f"benchmarks/continued_ssl.py:{args.start}"
    command = [sys.executable, "-m", "vit_jax.main", f"--config={config}", f"--workdir={workdir}"]
    subprocess.run([*command, *changes], check=True)
    results = last_results(workdir)
    curve = [
        (record["step"], *(record[name] for name in METRICS))
        for record in read_metrics(workdir)
        if METRICS[0] in record
    ]
    found = {name: results[name] for name in (*METRICS, "pixels/1nn", "pixels/5nn")}
    return {"seed": seed, **found, "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", type=Path, required=True, help="a run of cifar10_ssl.py:dino")
    parser.add_argument("--workdir", type=Path, required=True, help="a folder for each run is here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="length of the runs in place of 1,000")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()

    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for seed in args.seeds:
        for kind in KINDS:
            # No seed changes what there is before.
            if kind != "before" or not runs[kind]:
                runs[kind].append(train(kind, seed, args))
    print(f"{'pixels':<10} {'5nn':<12} {runs['before'][0]['pixels/5nn']:.2%}")
    for kind, of_seeds in runs.items():
        for name in METRICS:
            scores = [run[name] for run in of_seeds]
            span = f"{min(scores):.2%} to {max(scores):.2%} over {len(scores)} seeds"
            print(f"{kind:<10} {name:<12} mean {statistics.mean(scores):.2%}, {span}")
    if args.json:
        import jax

        from benchmarks.environment import write_results

        measured = {"device": jax.devices()[0].device_kind, "steps": args.steps, "runs": runs}
        write_results(args.json, measured, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
