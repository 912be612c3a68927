# SPDX-License-Identifier: Apache-2.0
"""Trains `configs/cifar10.py`, and writes the curve of its accuracy.

    python -m benchmarks.cifar10 --source=folder:/data/cifar10 --workdir=runs/cifar10 \
        --json benchmarks/results/cifar10.json

The compact model takes about an hour on two cores, `--size=small` some minutes on a GPU. The same
command resumes where a run was stopped.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import jax

from benchmarks.environment import write_results
from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.summary import last_results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="data.name, such as folder:/data/cifar10")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--size", choices=("compact", "small"), default="compact")
    parser.add_argument("--least", type=float, default=0, help="percent to reach, else it fails")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()

    subprocess.run(
        [
            sys.executable,
            "-m",
            "vit_jax.main",
            f"--config=configs/cifar10.py:{args.size}",
            f"--workdir={args.workdir}",
            f"--config.data.name={args.source}",
        ],
        check=True,
    )
    records, results = read_metrics(args.workdir), last_results(args.workdir)
    curves = {
        name: [[record["step"], round(record[name], 4)] for record in records if name in record]
        for name in ("train/loss", "val/loss", "val/top1")
    }
    print(f"test accuracy of cifar10.py:{args.size}: {results['test/top1']:.2%}")
    if args.json:
        measured = {
            "size": args.size,
            "device": jax.devices()[0].device_kind,
            "seed": 0,
            "steps": results["step"],
            "test_top1": results["test/top1"],
            "test_loss": results["test/loss"],
            "curves": curves,
        }
        write_results(args.json, measured, "jax", "flax", "optax", indent=None)
    if 100 * results["test/top1"] < args.least:
        raise SystemExit(f"test accuracy {results['test/top1']:.2%}: expected {args.least:g} %")


if __name__ == "__main__":
    main()
