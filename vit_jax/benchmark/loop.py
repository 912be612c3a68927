# SPDX-License-Identifier: Apache-2.0
"""Measures the overhead of the training loop: metrics, progress and the transfer of batches.

Reading and preparing batches is measured separately: on a CPU it competes with the steps for cores.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vit_jax.benchmark.arguments import read_config
from vit_jax.benchmark.step import make_batch, measure_steps
from vit_jax.config.cpu_devices import count_cpu_devices
from vit_jax.config.reduced import reduce_for_timing
from vit_jax.data.corrupt import CorruptCounter
from vit_jax.observe.console import console
from vit_jax.observe.jsonl import read_metrics
from vit_jax.parallel.mesh import shard_batch
from vit_jax.runtime.cpu_devices import set_cpu_devices
from vit_jax.training.experiment import Experiment
from vit_jax.training.run import train
from vit_jax.utils.command import check_positive


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Measures, and returns the results as JSON and as lines of text."""
    check_positive(args, "rounds", "seconds")
    config = read_config(args)
    set_cpu_devices(count_cpu_devices(config))
    bare, looped, fed = [], [], []
    for _ in range(args.rounds):
        _, times = measure_steps(Experiment.from_config(config), repeats=1, seconds=args.seconds)
        steps = max(2, round(args.seconds / times[0]))
        bare.append(times[0])
        looped.append(time_loop(config, steps=steps, experiment=_Ready))
        fed.append(time_loop(config, steps=steps))
    overhead, with_data = (
        statistics.median(t / b for t, b in zip(times, bare, strict=True)) - 1
        for times in (looped, fed)
    )
    results = {
        "jax": jax.__version__,
        "step_ms": [round(1000 * t, 3) for t in bare],
        "looped_step_ms": [round(1000 * t, 3) for t in looped],
        "looped_with_data_step_ms": [round(1000 * t, 3) for t in fed],
        "overhead": round(overhead, 4),
        "overhead_with_data": round(with_data, 4),
    }
    lines = [
        f"a step takes {1000 * statistics.median(bare):,.2f} ms with its batch on the devices",
        f"in the loop, which hands it over and follows the metrics: {overhead:+.1%}",
        f"in the loop, with batches that are read and prepared: {with_data:+.1%}",
    ]
    return results, lines


class _Ready(Experiment):
    """Reads no data: the same batch in the memory of the host is transferred for each step."""

    def train_batches(
        self, step: int, *, corrupt: CorruptCounter | None = None
    ) -> Iterator[dict[str, jax.Array]]:
        del step, corrupt
        batch = jax.device_get(make_batch(self))
        return (shard_batch(batch, self.mesh) for _ in itertools.count())


def time_loop(
    config: dict[str, Any], *, steps: int, experiment: type[Experiment] = Experiment
) -> float:
    """Seconds of a step in a run, without its first step, evaluations and checkpoints."""
    config = reduce_for_timing(config, steps=steps + 1)
    with tempfile.TemporaryDirectory(prefix="loop_benchmark_") as workdir:
        console.quiet = True
        try:
            train(config, workdir, make_experiment=experiment.from_config)
        finally:
            console.quiet = False
        records = read_metrics(Path(workdir))
    return next(r["perf/step_ms"] for r in records if "perf/step_ms" in r) / 1000
