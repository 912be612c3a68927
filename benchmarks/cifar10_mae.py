# SPDX-License-Identifier: Apache-2.0
"""A tenth of CIFAR-10's labels, with and without masked pre-training: `configs/cifar10_mae.py`.

    python -m benchmarks.cifar10_mae --source=folder:/data/cifar10 --workdir=runs/cifar10_mae \
        --json benchmarks/results/cifar10_mae.json

Takes about half an hour on two cores. The same command resumes where it was stopped.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import jax

from benchmarks.environment import write_results
from vit_jax.observe.summary import last_results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="data.name, such as folder:/data/cifar10")
    parser.add_argument("--workdir", type=Path, required=True, help="of three runs, a folder each")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()

    pretrained = args.workdir / "pretrained"
    configs = {"pretrained": "", "fine_tuned": f":{pretrained}", "from_scratch": ":none"}
    results = {}
    for name, argument in configs.items():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "vit_jax.main",
                f"--config=configs/cifar10_mae.py{argument}",
                f"--workdir={args.workdir / name}",
                f"--config.data.name={args.source}",
            ],
            check=True,
        )
        results[name] = last_results(args.workdir / name)
    for name in ("fine_tuned", "from_scratch"):
        print(f"{name.replace('_', ' ')}: test accuracy {results[name]['test/top1']:.2%}")
    if args.json:
        measured = {"device": jax.devices()[0].device_kind, "seed": 0, "results": results}
        write_results(args.json, measured, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
