# SPDX-License-Identifier: Apache-2.0
"""Seconds until a command has printed its help, refused a typo or read the files of a run.

    python -m benchmarks.commands --json benchmarks/results/commands.json

Each command is a process of its own. All take turns with a Python that does nothing and with one
that only imports JAX, so that what else the machine does hits all of them. Medians are shown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import write_results
from benchmarks.turns import ROOT, run
from vit_jax.__main__ import COMMANDS

# A workdir with what `status` and `compare` read.
CONFIG = {"model": {"name": "vit"}, "data": {"name": "digits"}, "optimizer": {"lr": 0.001}}
LEDGER = {
    "event": "start",
    "time": 1.0,
    "step": 0,
    "total": 8,
    "seconds": {"step": 1.0, "compile": 2.0, "data_wait": 0.1, "save": 0.1, "evaluation": 0.1},
}


def list_commands(workdir: Path) -> dict[str, tuple[list[str], int]]:
    """Arguments of Python by what they do, with the exit code that is expected."""
    vit_jax = ["-m", "vit_jax"]
    commands = {
        "python": (["-c", "pass"], 0),
        "import jax": (["-c", "import jax"], 0),
        "vit_jax --help": ([*vit_jax, "--help"], 0),
        "vit_jax configs": ([*vit_jax, "configs"], 0),
    }
    for name in COMMANDS:
        commands[f"vit_jax {name} --help"] = ([*vit_jax, name, "--help"], 0)
    typos = {
        "an unknown command": ["tarin"],
        "an unknown flag": ["train", "--wrokdir=new"],
        "an unknown config": ["train", "--config=digist", "--workdir=new"],
        "a missing workdir": ["predict", "--workdir=none", "photo.jpg"],
    }
    commands |= {name: ([*vit_jax, *argv], 2) for name, argv in typos.items()}
    commands["vit_jax status WORKDIR"] = ([*vit_jax, "status", str(workdir)], 0)
    commands["vit_jax compare WORKDIR"] = ([*vit_jax, "compare", str(workdir)], 0)
    return commands


def time_process(arguments: Sequence[str], code: int) -> tuple[float, float]:
    """Elapsed seconds, and seconds of CPU, of a Python process.

    Raises:
      SystemExit: it ends with another exit code.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        sys.exit(f"python {' '.join(arguments)}: exit code {process.returncode}, not {code}")
    return elapsed, usage.ru_utime + usage.ru_stime


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args(argv)

    load_at_start = [round(load, 1) for load in os.getloadavg()]
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="commands_benchmark_") as folder:
        workdir = Path(folder)
        (workdir / "config.json").write_text(json.dumps(CONFIG))
        (workdir / "ledger.jsonl").write_text(json.dumps(LEDGER) + "\n")
        commands = list_commands(workdir)
        for turn in range(args.rounds + 1):
            for name, (arguments, code) in commands.items():
                measured = time_process(arguments, code)
                if turn:  # The first fills the caches of files.
                    times.setdefault(name, []).append(measured)
    results = {
        name: {
            "seconds": round(statistics.median(elapsed for elapsed, _ in found), 2),
            "cpu_seconds": round(statistics.median(cpu for _, cpu in found), 2),
        }
        for name, found in times.items()
    }
    width = max(map(len, results))
    print(f"{'':<{width}}  seconds  of CPU")
    for name, row in results.items():
        print(f"{name:<{width}}  {row['seconds']:>7.2f}  {row['cpu_seconds']:>6.2f}")
    if args.json:
        notes = {
            "rounds": args.rounds,
            "load_at_start": load_at_start,
            "load_at_end": [round(load, 1) for load in os.getloadavg()],
        }
        packages = ("jax", "tensorflow-datasets", "opencv-python-headless")
        write_results(args.json, notes | {"results": results}, *packages)


if __name__ == "__main__":
    run(main)
