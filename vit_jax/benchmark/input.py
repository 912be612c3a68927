# SPDX-License-Identifier: Apache-2.0
"""Measures the images a second of the input pipeline, and the share of each of its stages."""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from vit_jax.data import loader
from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.ops import fused
from vit_jax.data.ops import transforms as image_ops
from vit_jax.data.order import PositionRng
from vit_jax.data.pipeline import Batch, DatasetSpec, train_batches, train_order
from vit_jax.utils.command import check_positive

# Operations of the stage "decode"; those after the last of them are the stage "augment".
_DECODE = (
    fused.Fused,
    image_ops.Decode,
    image_ops.Resize,
    image_ops.ResizeSmall,
    image_ops.ResizeLong,
    image_ops.CentralCrop,
    image_ops.RandomCrop,
    image_ops.InceptionCrop,
)
STAGES = ("order", "read", "decode", "augment", "assemble")


@dataclasses.dataclass(frozen=True)
class Speed:
    """Images per second of elapsed time, and per second of CPU time of all threads."""

    images_per_sec: float
    images_per_core: float


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Measures, and returns the results as JSON and as lines of text."""
    check_positive(args, "batch_size", "seconds", "num_threads", "step_ms")
    spec = DatasetSpec(
        args.source,
        args.split,
        args.preprocess,
        args.batch_size,
        args.data_dir,
        "--source",
        num_threads=args.num_threads,
    )
    height, width, _ = spec.image_shape()
    batches = train_batches(spec, seed=0, step=0, corrupt=CorruptCounter())
    speed = measure_speed(batches, spec.batch_size, seconds=args.seconds)
    wait = {}
    if args.step_ms:
        predicted = predict_wait(speed, spec.batch_size, args.step_ms / 1000)
        seen = measure_wait(batches, args.step_ms / 1000, seconds=args.seconds)
        wait = {"step_ms": args.step_ms, "predicted": round(predicted, 4), "seen": round(seen, 4)}
    batches.close()
    shares = measure_stages(spec, seconds=args.seconds / 2)
    threads = loader.count_threads(spec.num_threads)
    decoder = "the C extension" if fused.extension else "OpenCV: the C extension was not built"
    lines = [
        f"{spec}: {len(spec.open()):,} images, batches of {spec.batch_size} at {height}x{width}, "
        f"{threads} threads; JPEGs by {decoder}",
        f"{speed.images_per_sec:,.0f} images/s, {speed.images_per_core:,.0f} images/s per core",
        "of a thread's time: " + ", ".join(f"{k} {share:.1%}" for k, share in shares.items()),
    ]
    if wait:
        lines.append(
            f"with steps of {args.step_ms:g} ms: data-wait {wait['seen']:.1%} "
            f"(predicted {wait['predicted']:.1%})"
        )
    results = {
        "source": args.source,
        "preprocess": args.preprocess,
        "batch_size": args.batch_size,
        "threads": threads,
        "extension": fused.extension is not None,
        "images_per_sec": round(speed.images_per_sec, 1),
        "images_per_core": round(speed.images_per_core, 1),
        "stages": {k: round(share, 4) for k, share in shares.items()},
        "data_wait": wait or None,
    }
    return results, lines


def measure_speed(batches: Iterator[Batch], batch_size: int, *, seconds: float) -> Speed:
    """Measures the speed at which batches can be taken."""
    _take(batches, seconds / 10)
    start, start_cpu = time.perf_counter(), time.process_time()
    count = batch_size * _take(batches, seconds)
    elapsed, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return Speed(count / elapsed, count / cpu)


def predict_wait(speed: Speed, batch_size: int, step: float) -> float:
    """The predicted share of time that a loop waits for data, if its steps take `step` seconds."""
    return max(0.0, 1 - step * speed.images_per_sec / batch_size)


def measure_wait(batches: Iterator[Batch], step: float, *, seconds: float) -> float:
    """The measured share, in a loop that sleeps for `step` seconds in place of each step."""
    _take(batches, seconds / 10)
    start, waited = time.perf_counter(), 0.0
    while (now := time.perf_counter()) - start < seconds:
        next(batches)
        waited += time.perf_counter() - now
        time.sleep(step)
    return waited / (time.perf_counter() - start)


def _take(batches: Iterator[Batch], seconds: float) -> int:
    """Takes batches for some time, which also warms up threads and caches; returns their number."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count


def measure_stages(spec: DatasetSpec, *, seconds: float) -> dict[str, float]:
    """The share of each of `STAGES` in the time of one thread."""
    source, ops = spec.open(), fused.fuse(spec.ops())
    split = 1 + max(i for i, op in enumerate(ops) if isinstance(op, _DECODE))
    spent = dict.fromkeys(STAGES, 0.0)

    order, rngs = train_order(spec, source, seed=0), PositionRng(0)
    images = np.empty((spec.batch_size, *spec.image_shape()), np.uint8)
    start, position = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        times = [time.perf_counter()]
        index, rng = order[position], rngs(position)
        times.append(time.perf_counter())
        features = source[index]
        times.append(time.perf_counter())
        features = image_ops.apply(ops[:split], features, rng)
        times.append(time.perf_counter())
        features = image_ops.apply(ops[split:], features, rng)
        times.append(time.perf_counter())
        images[position % spec.batch_size] = features["image"]
        times.append(time.perf_counter())
        for name, (begin, end) in zip(STAGES, itertools.pairwise(times), strict=True):
            spent[name] += end - begin
        position += 1
    total = sum(spent.values())
    return {name: time_spent / total for name, time_spent in spent.items()}
