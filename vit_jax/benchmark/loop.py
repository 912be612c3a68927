# SPDX-License-Identifier: Apache-2.0
"""What the training loop adds to its steps: metrics, progress and the hand-over of batches.

Reading and preparing them is measured too, and apart: on a CPU it takes the cores of the steps.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vit_jax.benchmark.step import make_batch, measure_steps
from vit_jax.config.cpu_devices import count_cpu_devices
from vit_jax.config.load import load_config
from vit_jax.config.reduced import reduce_for_planning, reduce_for_timing
from vit_jax.data.corrupt import CorruptCounter
from vit_jax.observe.console import console
from vit_jax.observe.jsonl import read_metrics
from vit_jax.parallel.mesh import shard_batch
from vit_jax.runtime.cpu_devices import set_cpu_devices
from vit_jax.training.experiment import Experiment
from vit_jax.training.run import train
from vit_jax.utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    parser.add_argument(
        "--config", required=True, help="config file; --config.KEY=VALUE overrides a key"
    )
    parser.add_argument("--num_classes", type=int, help="in place of the dataset's")
    parser.add_argument("--image_size", type=int, help="with --num_classes")
    parser.add_argument("--rounds", type=int, default=5, help="ratios, by their median")
    parser.add_argument("--seconds", type=float, default=5, help="of each of the three in a round")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Measures; returns the results and the lines that say them."""
    for name in ("rounds", "seconds"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name}={getattr(args, name)}: expected more than 0")
    config = load_config(args.config, args.overrides).to_dict()
    config = reduce_for_planning(config, num_classes=args.num_classes, image_size=args.image_size)
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
        "config": args.config,
        "overrides": args.overrides,
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
    """Has no data to read: one batch stands in the memory of the host, and is handed over."""

    def train_batches(
        self, step: int, *, corrupt: CorruptCounter | None = None
    ) -> Iterator[dict[str, jax.Array]]:
        del step, corrupt
        batch = jax.device_get(make_batch(self))
        return (shard_batch(batch, self.mesh) for _ in itertools.count())


def time_loop(
    config: dict[str, Any], *, steps: int, experiment: type[Experiment] = Experiment
) -> float:
    """Seconds of a step in a whole run, without its first step, evaluations and checkpoints."""
    config = reduce_for_timing(config, steps=steps + 1)
    with tempfile.TemporaryDirectory(prefix="loop_benchmark_") as workdir:
        console.quiet = True
        try:
            train(config, workdir, make_experiment=experiment.from_config)
        finally:
            console.quiet = False
        records = read_metrics(Path(workdir))
    return next(r["perf/step_ms"] for r in records if "perf/step_ms" in r) / 1000
