# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: whether its step fits, how much data it moves, how fast it can be."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.models.flops import count_flops, train_flops
from vit_jax.parallel.mesh import count_batch_shards
from vit_jax.planning.compiled import compile_step
from vit_jax.planning.hlo import Collective, Program
from vit_jax.planning.kernels import (
    TimedKernel,
    find_waits,
    list_kernels,
    merge_alike,
    time_kernels,
    transfer_seconds,
)
from vit_jax.planning.memory import estimate_memory
from vit_jax.planning.roofline import Work, make_roofline
from vit_jax.planning.topologies import (
    Topology,
    check_attention,
    explain_cpus,
    find_compiler,
    make_devices,
    slice_of,
)
from vit_jax.runtime.chips import Chip
from vit_jax.training.experiment import Experiment

# A JSON object; see `make_plan`.
Plan = dict[str, Any]

# The speed of a step on a chip. `step_seconds` is a lower bound, and `expected_seconds` the sum of
# all kernels and, for GPUs, of waits for transfers, as `planning.kernels` estimates them. Images a
# second follow the sum if there is one.
_SPEED = (
    "roofline",
    "bound_by",
    "step_seconds",
    "mfu_bound",
    "images_per_second_per_chip",
    "kernel_seconds",
    "transfer_seconds",
    "wait_seconds",
    "expected_seconds",
    "expected_mfu",
)


def make_plan(config: Mapping[str, Any], topology: Topology, *, cache: Path | None) -> Plan:
    """Compiles the step of a config for a topology, and returns what it needs.

    Args:
      config: as `reduce_for_planning` returns it.
      topology: the devices to compile for.
      cache: folder of compiled programs; None for no cache.

    Returns:
      The JSON object that `python -m vit_jax.plan --json` prints. Numbers are for one device, in
      bytes and seconds. What depends on the chip is None for a CPU, and what depends on the
      compiled program is None if it does not fit.

    Raises:
      UserError: the config is wrong, or the topology is not available.
    """
    devices = make_devices(topology)
    check_attention(config, topology, devices)
    compiler = find_compiler(devices)
    experiment = Experiment.from_config(config, devices=devices)
    memory = estimate_memory(experiment)
    traced = experiment.trace_step().jaxpr
    step, cached = compile_step(experiment, topology, cache=cache)
    count, batch_size = topology.num_devices, experiment.train_data.batch_size
    rows = experiment.train_data.rows_per_batch
    image_size = experiment.train_data.image_shape()[:2]
    model_flops = train_flops(experiment.model, image_size) * rows / count
    flops = count_flops(traced) / count
    chip, mesh = topology.chip, dict(experiment.mesh.shape)
    limit = None if chip is None else chip.hbm_bytes
    placed = list(experiment.mesh.devices.flat)
    slices = slice_of(topology, placed)
    collectives: list[Collective] = []
    kernels: list[TimedKernel] = []
    work = waits = None
    if step.error is None:
        program = Program(step.hlo)
        sent = program.transfers(mesh, slices, [d.id for d in placed])
        collectives = program.collectives(sent)
        if chip is not None and compiler != "cpu":
            kernels = time_kernels(list_kernels(program), chip)
        if chip is not None and compiler == "gpu":
            waits = find_waits(program, chip, sent)
        work = Work(
            flops=flops,
            model_flops=model_flops,
            hbm_bytes=program.hbm_bytes,
            ici_bytes=sum(c.bytes for c in collectives),
            dcn_bytes=sum(c.dcn_bytes for c in collectives),
        )
    speed: dict[str, Any] = dict.fromkeys(_SPEED)
    if work is not None and chip is not None:
        busy = sum(one.seconds for one in kernels)
        speed |= _find_speed(work, chip, busy, waits, batch_size / topology.num_chips)
    return {
        "topology": topology.name,
        "num_slices": topology.num_slices,
        "num_devices": count,
        "num_chips": topology.num_chips,
        "mesh": mesh,
        "batch_size": batch_size,
        "images_per_device": batch_size / count_batch_shards(experiment.mesh),
        "accum_steps": experiment.optimizer.accum_steps,
        "compiled_for": compiler,
        "fits": step.error is None and (limit is None or step.peak_bytes <= limit),
        "hbm_limit_bytes": limit,
        "peak_bytes": step.peak_bytes,
        "argument_bytes": step.argument_bytes,
        "temp_bytes": step.temp_bytes,
        "predicted": dataclasses.asdict(memory),
        "flops_per_device": flops,
        "model_flops_per_device": model_flops,
        "hbm_bytes": work and work.hbm_bytes,
        "collectives": [
            dataclasses.asdict(c) | {"seconds": chip and transfer_seconds(c, chip)}
            for c in collectives
        ],
        "ici_bytes": work and work.ici_bytes,
        "dcn_bytes": work and work.dcn_bytes,
        **speed,
        "num_kernels": sum(one.kernel.count for one in kernels),
        "kernels": [
            dataclasses.asdict(one.kernel) | {"seconds": one.seconds, "bound": one.bound}
            for one in merge_alike(kernels)
        ],
        "compile_seconds": step.seconds,
        "cached": cached,
        "error": step.error,
        "notes": [
            *_describe_target(topology, compiler),
            *_warn_of_slow_axes(mesh, slices, topology),
        ],
    }


def _find_speed(
    work: Work,
    chip: Chip,
    kernel_seconds: float,
    waits: tuple[float, float] | None,
    images_per_chip: float,
) -> dict[str, Any]:
    roofline = make_roofline(work, chip)
    bound = roofline.step_seconds
    sent, waited = waits or (None, None)
    expected = max(kernel_seconds + (waited or 0.0), bound) if kernel_seconds else None
    values = (
        dataclasses.asdict(roofline),
        roofline.bound_by,
        bound,
        roofline.mfu_bound,
        images_per_chip / (expected or bound),
        kernel_seconds or None,
        sent,
        waited,
        expected,
        expected and work.model_flops / chip.flops / expected,
    )
    return dict(zip(_SPEED, values, strict=True))


def _warn_of_slow_axes(
    mesh: Mapping[str, int], slice_of_device: Sequence[int], topology: Topology
) -> list[str]:
    """Notes on axes whose devices are in several slices, given those in the order of the mesh."""
    grid = np.reshape(slice_of_device, tuple(mesh.values()))
    places = "slices" if topology.is_tpu else "hosts"
    return [
        f"mesh.{axis} goes over several {places}: its transfers take the slow network between them"
        for dimension, axis in enumerate(mesh)
        if axis != "data" and np.diff(grid, axis=dimension).any()
    ]


def _describe_target(topology: Topology, compiler: str) -> list[str]:
    if topology.chip is None:
        return ["a CPU has no roofline here: only memory and transfers are predicted"]
    if compiler == "gpu":
        return [
            "compiled by XLA for this GPU, without one: products have default tiles, where a GPU "
            "would try several. Times are predicted, not measured"
        ]
    if compiler == "cpu":
        return [
            f"XLA's compiler for GPUs can't be used: {explain_cpus(topology)}. This is the "
            "same sharded step, compiled for as many CPUs. Arguments and operations are exact; "
            "temporaries, bytes and transfers are those of XLA for CPUs, which computes bfloat16 "
            "in float32 and fuses less"
        ]
    return []
