# SPDX-License-Identifier: Apache-2.0
"""Times checkpoints of a config, and plain files with as many bytes for comparison."""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax.benchmark.arguments import read_config
from vit_jax.checkpoint.manager import CheckpointManager, CheckpointOptions
from vit_jax.training.experiment import Experiment
from vit_jax.utils.command import check_positive
from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import CHECKPOINTS


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Measures, and returns the results as JSON and as lines of text."""
    check_positive(args, "saves", expected="at least 1")
    if not os.access(args.folder, os.W_OK):
        raise UserError(f"--folder={args.folder}: expected a folder to write to")
    experiment = Experiment.from_config(read_config(args))
    times = measure_saves(experiment, Path(args.folder), saves=args.saves)
    medians = {name: statistics.median(values) for name, values in times.items()}
    leaves = jax.tree.leaves(experiment.abstract_state)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    blocked = medians["blocked_s"] / medians["raw_write_s"]
    restored = medians["restore_s"] / medians["raw_read_s"]
    memory = times["memory_bytes"]
    results = {
        "jax": jax.__version__,
        "bytes": size,
        **{name: round(value, 3) for name, value in medians.items() if name.endswith("_s")},
        "blocked_of_raw_write": round(blocked, 3),
        "restore_of_raw_read": round(restored, 3),
        "memory_bytes": memory,
    }
    lines = [
        f"a state of {size / 2**30:.2f} GiB, {args.saves} times, medians; the file is one of the "
        "same bytes, written and synced by the same thread that computes",
        f"file      {medians['raw_write_s']:.2f} s to write, {medians['raw_read_s']:.2f} s to read",
        f"save      the next step waits {medians['blocked_s']:.2f} s, {blocked:.0%} of the file's "
        f"time; complete, with checksums, after {medians['save_s']:.2f} s",
        f"restore   {medians['restore_s']:.2f} s, {restored:.1f} x the file's time; checksums are "
        "verified",
        f"memory    {memory[0] / 2**30:.2f} GiB after the first save, {memory[-1] / 2**30:.2f} GiB "
        "after the last",
    ]
    return results, lines


def measure_saves(experiment: Experiment, folder: Path, *, saves: int) -> dict[str, list[float]]:
    """Measures saves, restores and plain files with the same bytes, in a temporary folder.

    Returns:
      Seconds of each, and bytes of memory after each save.
    """
    state = jax.block_until_ready(experiment.init_state())
    names = ("blocked_s", "save_s", "restore_s", "raw_write_s", "raw_read_s", "memory_bytes")
    times: dict[str, list[float]] = {name: [] for name in names}
    # Donates the state as the next step does, which waits for whoever still reads it.
    take_over = jax.jit(jax.lax.optimization_barrier, donate_argnums=0)
    state = jax.block_until_ready(take_over(state))
    options = CheckpointOptions(keep=1)
    with tempfile.TemporaryDirectory(prefix="checkpoint_benchmark_", dir=folder) as scratch:
        workdir, file = Path(scratch), Path(scratch) / "raw"
        with CheckpointManager(workdir, options, experiment.description) as checkpoints:
            for step in range(1, saves + 1):
                start = time.perf_counter()
                checkpoints.save(step, state, {})
                state = take_over(state)
                state.step.block_until_ready()
                times["blocked_s"].append(time.perf_counter() - start)
                checkpoints.wait(must=True)
                times["save_s"].append(time.perf_counter() - start)
                times["memory_bytes"].append(_resident_bytes())
                times["raw_write_s"].append(_write(file, state))
        for _ in range(saves):
            _forget(file, *(workdir / CHECKPOINTS).rglob("*"))
            start = time.perf_counter()
            with CheckpointManager(workdir, options, experiment.description) as checkpoints:
                jax.block_until_ready(checkpoints.restore(experiment.abstract_state))
            times["restore_s"].append(time.perf_counter() - start)
            start = time.perf_counter()
            file.read_bytes()
            times["raw_read_s"].append(time.perf_counter() - start)
    return times


def _write(file: Path, state: Any) -> float:
    start = time.perf_counter()
    with file.open("wb") as out:
        for leaf in jax.tree.leaves(state):
            out.write(np.ascontiguousarray(jax.device_get(leaf)).reshape(-1).view(np.uint8).data)
        out.flush()
        os.fsync(out.fileno())
    return time.perf_counter() - start


def _forget(*paths: Path) -> None:
    """Drops files from the page cache, if the system can, so that they are read from disk."""
    for path in paths:
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident_bytes() -> int:
    """Memory of this process; 0 if the system does not report it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
