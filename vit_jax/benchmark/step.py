# SPDX-License-Identifier: Apache-2.0
"""Times a config's training step, with a batch that is already on the devices."""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.benchmark.arguments import read_config
from vit_jax.config.cpu_devices import count_cpu_devices
from vit_jax.models.flops import train_flops
from vit_jax.observe.panel import peak_bytes
from vit_jax.runtime.chips import find_chip
from vit_jax.runtime.cpu_devices import set_cpu_devices
from vit_jax.training.experiment import Experiment
from vit_jax.utils.command import check_positive

_GEMM_SIZE = 2048


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Measures, and returns the results as JSON and as lines of text."""
    check_positive(args, "repeats", "seconds")
    # The time of compilation is measured too.
    jax.config.update("jax_enable_compilation_cache", False)
    config = read_config(args)
    set_cpu_devices(count_cpu_devices(config))
    experiment = Experiment.from_config(config)
    device, count = experiment.mesh.devices.flat[0], experiment.mesh.size
    batch_size = experiment.train_data.batch_size

    first, times = measure_steps(experiment, repeats=args.repeats, seconds=args.seconds)
    step = statistics.median(times)
    image_size = experiment.train_data.image_shape()[:2]
    flops = train_flops(experiment.model, image_size) * batch_size / count / step
    results = {
        "device": device.device_kind,
        "devices": count,
        "jax": jax.__version__,
        "batch_size": batch_size,
        "first_step_s": round(first, 2),
        "step_ms": round(1000 * step, 3),
        "step_ms_all": [round(1000 * t, 3) for t in times],
        "images_per_sec_per_device": round(batch_size / step / count, 2),
        "model_flops_per_sec_per_device": flops,
        "peak_bytes": peak_bytes(device),
    }
    chip = find_chip(device.device_kind)
    if chip is not None:
        results["mfu"] = round(flops / chip.flops, 4)
        share = f"MFU {flops / chip.flops:.1%} of {chip.flops / 1e12:,.0f} TFLOP/s (bfloat16)"
    else:
        gemm = measure_gemm() / count
        results["gemm_flops_per_sec"] = gemm
        share = f"{flops / gemm:.1%} of what a float32 product of {_GEMM_SIZE:,} reaches here"
    spread = f"{1000 * min(times):,.1f} to {1000 * max(times):,.1f}"
    lines = [
        f"{count} x {device.device_kind}, batches of {batch_size:,}",
        f"{results['images_per_sec_per_device']:,.1f} images/s per device; a step takes "
        f"{1000 * step:,.1f} ms ({spread})",
        f"{flops / 1e9:,.1f} GFLOP/s of the model per device: {share}",
        f"first step after {first:.1f} s, with compilation; "
        f"peak memory {results['peak_bytes'] / 2**30:.2f} GiB",
    ]
    return results, lines


def measure_steps(
    experiment: Experiment, *, repeats: int, seconds: float
) -> tuple[float, list[float]]:
    """Measures training steps of an experiment.

    Returns:
      Seconds of the first step, with tracing and compilation, and of a step in each repeat.
    """
    batch = make_batch(experiment)
    state = jax.block_until_ready(experiment.init_state())
    start = time.perf_counter()
    state, metrics = experiment.train_step(state, batch)
    jax.block_until_ready(metrics)
    first = time.perf_counter() - start

    steps, times = 1, []
    while len(times) < repeats + 1:  # the first one only determines the number of steps
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = experiment.train_step(state, batch)
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - start) / steps)
        steps = max(1, round(seconds / times[-1])) if len(times) == 1 else steps
    return first, times[1:]


def make_batch(experiment: Experiment) -> dict[str, jax.Array]:
    """Random arrays with the shapes, dtypes and shardings of a training batch."""
    rng = jax.random.key(0)
    data = experiment.train_data

    def make(name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if dtype == jnp.uint8:
            return jax.random.bits(rng, shape, jnp.uint8)
        if jnp.issubdtype(dtype, jnp.floating):
            return jax.random.bernoulli(rng, 0.1, shape).astype(dtype)
        tokenizer = data.find_tokenizer() if name == "tokens" else None
        most = data.info.num_classes if tokenizer is None else tokenizer.vocab_size
        return jax.random.randint(rng, shape, 0, most, dtype)

    def make_all() -> dict[str, jax.Array]:
        batch = experiment.abstract_batch
        return {name: make(name, x.shape, x.dtype) for name, x in batch.items()}

    shardings = {k: v.sharding for k, v in experiment.abstract_batch.items()}
    return jax.jit(make_all, out_shardings=shardings)()


def measure_gemm() -> float:
    """Operations a second of a large float32 matrix product, the best of ten."""
    x = jnp.ones((_GEMM_SIZE, _GEMM_SIZE))
    multiply = jax.jit(jnp.matmul)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        times.append(time.perf_counter() - start)
    return 2 * _GEMM_SIZE**3 / min(times)
