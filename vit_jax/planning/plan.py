# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: whether its step fits, how much data it moves, how fast it can be."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vit_jax.models.flops import count_flops, train_flops
from vit_jax.parallel.mesh import count_batch_shards
from vit_jax.planning.compiled import compile_step
from vit_jax.planning.hlo import Collective, Program
from vit_jax.planning.memory import estimate_memory
from vit_jax.planning.roofline import Work, make_roofline
from vit_jax.planning.topologies import Topology, make_devices, slice_of
from vit_jax.runtime.chips import Chip
from vit_jax.training.experiment import Experiment

# A JSON object; see `make_plan`.
Plan = dict[str, Any]

# The speed of a step on a chip. `step_seconds` is a lower bound, and `expected_seconds` the
# compiler's estimate, without waits for transfers. Images a second follow the estimate if there is
# one.
_SPEED = (
    "roofline",
    "bound_by",
    "step_seconds",
    "mfu_bound",
    "images_per_second_per_chip",
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
    experiment = Experiment.from_config(config, devices=make_devices(topology))
    memory = estimate_memory(experiment)
    traced = jax.make_jaxpr(experiment.train_step)(
        experiment.abstract_state, experiment.abstract_batch
    )
    step, cached = compile_step(experiment, topology, cache=cache)
    count, batch_size = topology.num_devices, experiment.train_data.batch_size
    image_size = experiment.train_data.image_shape()[:2]
    model_flops = train_flops(experiment.model, image_size) * batch_size / count
    flops = count_flops(traced) / count
    chip, mesh = topology.chip, dict(experiment.mesh.shape)
    limit = None if chip is None else chip.hbm_bytes
    collectives: list[Collective] = []
    work, cycles = None, None
    if step.error is None:
        program = Program(step.hlo)
        placed = list(experiment.mesh.devices.flat)
        collectives = program.collectives(mesh, slice_of(topology, placed), [d.id for d in placed])
        cycles = program.cycles
        work = Work(
            flops=flops,
            model_flops=model_flops,
            hbm_bytes=program.hbm_bytes,
            ici_bytes=sum(c.bytes for c in collectives),
            dcn_bytes=sum(c.dcn_bytes for c in collectives),
        )
    speed: dict[str, Any] = dict.fromkeys(_SPEED)
    if work is not None and chip is not None:
        speed |= _find_speed(work, chip, cycles, batch_size / topology.num_chips)
    return {
        "topology": topology.name,
        "num_slices": topology.num_slices,
        "num_devices": count,
        "num_chips": topology.num_chips,
        "mesh": mesh,
        "batch_size": batch_size,
        "images_per_device": batch_size / count_batch_shards(experiment.mesh),
        "accum_steps": experiment.optimizer.accum_steps,
        "compiled_for": "tpu" if topology.is_tpu else "cpu",
        "fits": step.error is None and (limit is None or step.peak_bytes <= limit),
        "hbm_limit_bytes": limit,
        "peak_bytes": step.peak_bytes,
        "argument_bytes": step.argument_bytes,
        "temp_bytes": step.temp_bytes,
        "predicted": dataclasses.asdict(memory),
        "flops_per_device": flops,
        "model_flops_per_device": model_flops,
        "hbm_bytes": work and work.hbm_bytes,
        "collectives": [dataclasses.asdict(c) for c in collectives],
        "ici_bytes": work and work.ici_bytes,
        "dcn_bytes": work and work.dcn_bytes,
        **speed,
        "compile_seconds": step.seconds,
        "cached": cached,
        "error": step.error,
        "notes": [*_describe_target(topology), *_warn_of_slow_axes(collectives)],
    }


def _find_speed(
    work: Work, chip: Chip, cycles: int | None, images_per_chip: float
) -> dict[str, Any]:
    roofline = make_roofline(work, chip)
    bound, expected = roofline.step_seconds, None
    if chip.clock and cycles:
        expected = max(cycles / chip.clock, bound)
    values = (
        dataclasses.asdict(roofline),
        roofline.bound_by,
        bound,
        roofline.mfu_bound,
        images_per_chip / (expected or bound),
        expected,
        expected and work.model_flops / chip.flops / expected,
    )
    return dict(zip(_SPEED, values, strict=True))


def _warn_of_slow_axes(collectives: Sequence[Collective]) -> list[str]:
    slow = {a for c in collectives if c.dcn_bytes for a in c.axes} & {"fsdp", "tensor"}
    return [
        f"mesh.{axis} goes over several slices: its transfers take the slow network between them"
        for axis in sorted(slow)
    ]


def _describe_target(topology: Topology) -> list[str]:
    if topology.is_tpu:
        return []
    if topology.chip is None:
        return ["a CPU has no roofline here: only memory and transfers are predicted"]
    return [
        "no GPU compiler is used: this is the same sharded step, compiled for as many "
        "CPUs. Arguments and operations are exact; temporaries, bytes and transfers are "
        "those of XLA for CPUs, which computes bfloat16 in float32 and fuses less"
    ]
