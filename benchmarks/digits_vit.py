# SPDX-License-Identifier: Apache-2.0
"""Test accuracy of `configs/digits.py`, the mean over seeds.

    python -m benchmarks.digits_vit --json benchmarks/results/digits_vit.json

Trains the config as it is once for each seed, one run after the other, in a folder that is removed
afterwards (or kept, with --keep=FOLDER). A run takes a minute or two on two cores.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import write_results
from vit_jax.observe.summary import last_results


def train(seed: int, folder: Path) -> dict[str, float]:
    """Runs the command for one seed; accuracies as fractions."""
    workdir = folder / f"seed{seed}"
    command = [sys.executable, "-m", "vit_jax.main", "--config=configs/digits.py"]
    subprocess.run([*command, f"--workdir={workdir}", f"--config.seed={seed}"], check=True)
    results = last_results(workdir)
    return {
        "seed": seed,
        "test_top1": results["test/top1"],
        "val_top1": results["val/top1"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs here")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        runs = [train(seed, args.keep or Path(temporary)) for seed in args.seeds]
    scores = [run["test_top1"] for run in runs]
    print(
        f"test accuracy of digits.py: mean {statistics.mean(scores):.2%}, "
        f"{min(scores):.2%} to {max(scores):.2%} over {len(scores)} seeds"
    )
    if args.json:
        measured = {"runs": runs, "mean": statistics.mean(scores)}
        write_results(args.json, measured, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
