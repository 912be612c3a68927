# SPDX-License-Identifier: Apache-2.0
"""Times the start of a run, up to its first training step, and imports."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

from vit_jax.utils.command import check_positive
from vit_jax.utils.errors import UserError

_FIRST_STEP = "first step after"


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Measures, and returns the results as JSON and as lines of text."""
    check_positive(args, "rounds", expected="at least 1")
    overrides = [f"--config.{key}={value!r}" for key, value in args.overrides.items()]
    times = defaultdict[str, list[float]](list)
    for _ in range(args.rounds):
        times["import_jax"].append(time_import("jax"))
        times["import_vit_jax"].append(time_import("jax, vit_jax"))
        with tempfile.TemporaryDirectory(prefix="startup_benchmark_") as folder:
            own = (f"--config={args.config}", f"--compile_cache={folder}/cache", *overrides)
            for name in ("cold", "warm"):
                times[name].append(time_first_step(*own, f"--workdir={folder}/{name}"))
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    results = {
        "seconds": medians,
        "seconds_all": {name: [round(t, 2) for t in values] for name, values in times.items()},
    }
    own = medians["import_vit_jax"] - medians["import_jax"]
    lines = [
        f"medians of {args.rounds}",
        f"import jax      {medians['import_jax']:.2f} s",
        f"with vit_jax    {medians['import_vit_jax']:.2f} s, {own:.2f} s more",
        f"first step      {medians['cold']:.1f} s after the command, with nothing compiled before; "
        f"{medians['warm']:.1f} s with a warm compile cache",
    ]
    return results, lines


def time_import(modules: str) -> float:
    """Seconds of a Python process that only imports modules."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
    return time.perf_counter() - start


def time_first_step(*arguments: str) -> float:
    """Seconds from the start of `python -m vit_jax.main` to the end of its first step.

    Raises:
      UserError: the run ends before its first step; the message has its last line.
    """
    start = time.perf_counter()
    command = [sys.executable, "-m", "vit_jax.main", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    line = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout
        try:
            for line in process.stdout:
                if line.startswith(_FIRST_STEP):
                    return time.perf_counter() - start
        finally:
            process.kill()
    raise UserError(f"--config: the run ended before its first step: {line.strip()}")
