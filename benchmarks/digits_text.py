# SPDX-License-Identifier: Apache-2.0
"""Zero-shot accuracy and recall on captioned digits: `configs/digits_text.py` with each seed.

    python -m benchmarks.digits_text --json benchmarks/results/digits_text.json

A seed takes some minutes on two cores. A run that ended is not repeated with the same --keep.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.environment import write_results
from vit_jax.observe.summary import last_results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs here")
    args = parser.parse_args()

    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in args.seeds:
            workdir = (args.keep or Path(temporary)).absolute() / f"seed{seed}"
            command = [sys.executable, "-m", "vit_jax.main", "--config=configs/digits_text.py"]
            start = time.monotonic()
            subprocess.run([*command, f"--workdir={workdir}", f"--config.seed={seed}"], check=True)
            results = {k: v for k, v in last_results(workdir).items() if "/" in k}
            runs.append({"seed": seed, "seconds": time.monotonic() - start} | results)
    names = ("test/top1", *(k for k in runs[0] if k.startswith("retrieval/") and "recall" in k))
    means = {name: statistics.mean(run[name] for run in runs) for name in names}
    for name, mean in means.items():
        values = [run[name] for run in runs]
        print(f"{name:<32} mean {mean:.2%}, {min(values):.2%} to {max(values):.2%}")
    if args.json:
        write_results(args.json, {"means": means, "runs": runs}, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
