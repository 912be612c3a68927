# SPDX-License-Identifier: Apache-2.0
"""What a run costs beside its steps: its start, its loop, its checkpoints.

    python -m benchmarks.costs --json benchmarks/results/costs.json

Each is measured by `python -m vit_jax.benchmark PART` in a process of its own. The loop is that of
a step of some 10 ms, the checkpoint that of ViT-B/16 with AdamW.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import write_results
from benchmarks.turns import ROOT

PARTS = {
    "startup": ("--config=configs/digits.py",),
    "loop": ("--config=configs/digits.py", "--config.data.batch_size=32"),
    "checkpoint": (
        "--config=configs/vit_i1k.py:variant=B/16",
        "--num_classes=1000",
        "--image_size=224",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()

    load_at_start = [round(load, 1) for load in os.getloadavg()]
    results = {}
    for part in args.parts:
        print(f"{part} {' '.join(PARTS[part])}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "results.json"
            command = [sys.executable, "-m", "vit_jax.benchmark", part, *PARTS[part]]
            subprocess.run([*command, f"--json={file}"], check=True, cwd=ROOT)
            results[part] = json.loads(file.read_text(encoding="utf-8"))
    if args.json:
        loads = {
            "load_at_start": load_at_start,
            "load_at_end": [round(load, 1) for load in os.getloadavg()],
        }
        packages = ("jax", "flax", "orbax-checkpoint")
        write_results(args.json, loads | {"results": results}, *packages)


if __name__ == "__main__":
    main()
