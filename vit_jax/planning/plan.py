# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: does its step fit, what does it move, how fast can it be."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vit_jax.models.flops import count_flops, train_flops
from vit_jax.parallel.mesh import BATCH_AXES
from vit_jax.planning.compiled import compile_step
from vit_jax.planning.hlo import Collective, Program
from vit_jax.planning.memory import estimate_memory
from vit_jax.planning.roofline import Work, make_roofline
from vit_jax.planning.topologies import Topology, make_devices, slice_of
from vit_jax.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of one step. Numbers are for one device, bytes and seconds.

    What depends on the chip is None for a CPU; what depends on the compiled program is None where
    it did not fit. `step_seconds` are at best, `expected_seconds` what the compiler expects without
    waits for transfers, where it says so; images a second are by the latter if they are there.
    """

    topology: str
    num_slices: int
    num_devices: int
    num_chips: int
    mesh: dict[str, int]
    batch_size: int
    images_per_device: float
    accum_steps: int
    compiled_for: str
    fits: bool
    hbm_limit_bytes: int | None
    peak_bytes: int
    argument_bytes: int
    temp_bytes: int
    predicted: dict[str, int]
    flops_per_device: float
    model_flops_per_device: float
    hbm_bytes: int | None
    collectives: list[dict[str, Any]]
    ici_bytes: int | None
    dcn_bytes: int | None
    roofline: dict[str, float] | None
    bound_by: str | None
    step_seconds: float | None
    mfu_bound: float | None
    images_per_second_per_chip: float | None
    expected_seconds: float | None
    expected_mfu: float | None
    compile_seconds: float
    cached: bool
    error: str | None
    notes: list[str]


def make_plan(config: Mapping[str, Any], topology: Topology, *, cache: Path | None) -> Plan:
    """Compiles the step of a prepared config for a topology, and says what it needs.

    Raises:
      UserError: a bad config, or a topology that can't be had.
    """
    devices = make_devices(topology)
    experiment = Experiment.from_config(config, devices=devices)
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
    hbm_bytes: int | None = None
    cycles: int | None = None
    collectives: list[Collective] | None = None
    if step.error is None:
        program = Program(step.hlo)
        placed = list(experiment.mesh.devices.flat)
        collectives = program.collectives(mesh, slice_of(topology, placed), [d.id for d in placed])
        hbm_bytes, cycles = program.hbm_bytes, program.cycles
    roofline = None
    if chip is not None and collectives is not None and hbm_bytes is not None:
        work = Work(
            flops=flops,
            model_flops=model_flops,
            hbm_bytes=hbm_bytes,
            ici_bytes=sum(c.bytes for c in collectives),
            dcn_bytes=sum(c.dcn_bytes for c in collectives),
        )
        roofline = make_roofline(work, chip)
    expected: float | None = None
    if roofline is not None and chip is not None and chip.clock and cycles:
        expected = max(cycles / chip.clock, roofline.step_seconds)
    return Plan(
        topology=topology.name,
        num_slices=topology.num_slices,
        num_devices=count,
        num_chips=topology.num_chips,
        mesh=mesh,
        batch_size=batch_size,
        images_per_device=batch_size / math.prod(mesh[axis] for axis in BATCH_AXES),
        accum_steps=experiment.optimizer.accum_steps,
        compiled_for="tpu" if topology.is_tpu else "cpu",
        fits=step.error is None and (limit is None or step.peak_bytes <= limit),
        hbm_limit_bytes=limit,
        peak_bytes=step.peak_bytes,
        argument_bytes=step.argument_bytes,
        temp_bytes=step.temp_bytes,
        predicted=dataclasses.asdict(memory),
        flops_per_device=flops,
        model_flops_per_device=model_flops,
        hbm_bytes=hbm_bytes,
        collectives=[dataclasses.asdict(c) for c in collectives or []],
        ici_bytes=None if collectives is None else sum(c.bytes for c in collectives),
        dcn_bytes=None if collectives is None else sum(c.dcn_bytes for c in collectives),
        roofline=None if roofline is None else dataclasses.asdict(roofline),
        bound_by=None if roofline is None else roofline.bound_by,
        step_seconds=None if roofline is None else roofline.step_seconds,
        mfu_bound=None if roofline is None else roofline.mfu_bound,
        images_per_second_per_chip=None
        if roofline is None
        else batch_size / (expected or roofline.step_seconds) / topology.num_chips,
        expected_seconds=expected,
        expected_mfu=model_flops / chip.flops / expected if chip and expected else None,
        compile_seconds=step.seconds,
        cached=cached,
        error=step.error,
        notes=[*_notes(topology), *_warnings(collectives or [])],
    )


def _warnings(collectives: list[Collective]) -> list[str]:
    slow = {a for c in collectives if c.dcn_bytes for a in c.axes} & {"fsdp", "tensor"}
    return [
        f"mesh.{axis} goes over several slices: its transfers take the slow network between them"
        for axis in sorted(slow)
    ]


def _notes(topology: Topology) -> list[str]:
    if topology.is_tpu:
        return []
    if topology.chip is None:
        return ["a CPU has no roofline here: only memory and transfers are said"]
    return [
        "no compiler for GPUs is used here: this is the same sharded step, compiled for as many "
        "CPUs. Arguments and operations are exact; temporaries, bytes and transfers are "
        "those of XLA for CPUs, which computes bfloat16 in float32 and fuses less"
    ]
