# SPDX-License-Identifier: Apache-2.0
"""Which mesh, rematerialisation, accumulation and batch make a step fit and run fastest.

Arithmetic leaves out what can't fit and orders the rest by speed; the compiler decides among the
first of them.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vit_jax.config.load import override_config
from vit_jax.config.reduced import without_mesh
from vit_jax.models.flops import count_flops, train_flops
from vit_jax.parallel.mesh import BATCH_AXES
from vit_jax.planning.memory import Activations, Memory, count_activations, estimate_memory
from vit_jax.planning.roofline import Work, make_roofline
from vit_jax.planning.topologies import Topology, make_devices
from vit_jax.runtime.chips import Chip
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError

ACCUM_STEPS = (1, 2, 4, 8)
TENSORS = (1, 2, 4)
# What the compiler needs is at least this part of what arithmetic says, and what is to spare for it
# to be more.
_LOWEST = 0.7
_SPARE = 1.12
# How often what the backward pass asks for goes to or from memory. S/16, B/16 and L/16 compiled for
# v5e, v5p and v6e move 1.8 (unrolled), 5.5 to 6.6 (none) and 2.8 to 2.9 (dots) times as much; that
# of "full" is a guess. Only the order of candidates depends on it.
_PASSES = {"unrolled": 1.8, "none": 6.0, "dots": 2.8, "full": 3.0}


@dataclasses.dataclass(frozen=True)
class _Way:
    """How the layers of a model run, and what that costs for each image.

    Attributes:
      overrides: of the config.
      passes: how often what blocks compute goes to or from memory.
      computed: what the backward pass asks for.
      kept: what is kept of it.
      flops: operations, those that are done again included.
      model_flops: without them.
    """

    overrides: dict[str, Any]
    passes: float
    computed: Activations
    kept: Activations
    flops: float
    model_flops: float


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a config.

    Attributes:
      overrides: of the config, by dotted key.
      mesh: size of each axis.
      images: of a micro-batch, on each device.
      argument_bytes: exact.
      temp_bytes: estimated.
      step_seconds: at best, by arithmetic.
    """

    overrides: dict[str, Any]
    mesh: dict[str, int]
    images: float
    argument_bytes: int
    temp_bytes: int
    step_seconds: float
    batch_size: int

    @property
    def seconds_per_image(self) -> float:
        return self.step_seconds / self.batch_size


def format_overrides(overrides: Mapping[str, Any]) -> str:
    """What to add to a command."""
    return " ".join(
        # In quotes, because a bare none is None.
        f"--config.{k}=" + shlex.quote('"none"' if v == "none" else str(v))
        for k, v in overrides.items()
    )


def make_candidates(
    config: Mapping[str, Any], topology: Topology, *, images_per_device: Sequence[int] = ()
) -> list[Candidate]:
    """All ways to run a config that its sizes allow, the fastest by arithmetic first.

    Args:
      config: prepared.
      topology: of the devices.
      images_per_device: batches to try in place of the config's, which changes the recipe.
    """
    if topology.chip is None:
        raise UserError(
            f"--topology={topology.name!r}: a search needs a TPU or a GPU to search for"
        )
    devices = make_devices(topology)
    found: list[Candidate] = []
    error: UserError | None = None
    ways: list[_Way] = []
    for mesh in _meshes(topology):
        overrides: dict[str, Any] = {f"mesh.{axis}": size for axis, size in mesh.items()}
        batches = [n * topology.num_devices // mesh["tensor"] for n in images_per_device]
        for batch_size in batches or [None]:
            chosen = overrides | ({} if batch_size is None else {"data.batch_size": batch_size})
            chosen |= {"optimizer.accum_steps": 1}
            try:
                experiment = Experiment.from_config(
                    override_config(config, chosen), devices=devices
                )
                memory = estimate_memory(experiment, Activations(0, 0))
            except UserError as e:
                error = e
                continue
            if not ways:
                can_remat = hasattr(experiment.model, "remat")
                ways = _find_ways(override_config(config, chosen), can_remat=can_remat)
            for way in ways:
                for accum_steps in ACCUM_STEPS:
                    candidate = _assess(
                        experiment,
                        topology.chip,
                        topology.num_slices,
                        memory,
                        way,
                        overrides=chosen,
                        accum_steps=accum_steps,
                    )
                    if candidate is not None:
                        found.append(candidate)
    if error is not None and not found:
        raise error
    # Of equally fast ones the simplest: no accumulation, then copies of the parameters.
    return sorted(
        found,
        key=lambda c: (
            float(f"{c.seconds_per_image:.3g}"),
            c.overrides["optimizer.accum_steps"],
            c.mesh["tensor"],
            c.mesh["fsdp"],
        ),
    )


def _meshes(topology: Topology) -> Iterator[dict[str, int]]:
    per_slice = topology.num_devices // topology.num_slices
    for tensor in TENSORS:
        left = per_slice // tensor
        if per_slice % tensor:
            continue
        for fsdp in sorted({1, min(8, left), min(16, left), left}):
            if left % fsdp == 0:
                yield {"data": -1, "fsdp": fsdp, "tensor": tensor}


def _find_ways(config: Mapping[str, Any], *, can_remat: bool) -> list[_Way]:
    """All that a model offers, with their costs: they are the same on any mesh."""

    def count(overrides: Mapping[str, Any]) -> tuple[Activations, float, float]:
        return _count_costs(json.dumps(override_config(config, overrides).to_dict()))

    if not can_remat:
        costs = count({})
        return [_Way({}, _PASSES["none"], costs[0], *costs)]
    counted = {
        (remat, scan): count({"model.remat": remat, "model.scan": scan})
        for remat, scan in (("none", False), ("none", True), ("dots", True), ("full", True))
    }
    # Without a scan the compiler itself computes again what is cheap: B/16 for v5e keeps 7.7 GB of
    # the 24.1 that the backward pass asks for, and 6.7 with `dots`.
    computed = counted["none", True][0]
    kept = {("none", False): counted["dots", True][0]}
    return [
        _Way(
            {"model.remat": remat, "model.scan": scan},
            _PASSES[remat if scan else "unrolled"],
            computed,
            kept.get((remat, scan), activations),
            flops,
            model_flops,
        )
        for (remat, scan), (activations, flops, model_flops) in counted.items()
    ]


@functools.lru_cache
def _count_costs(config: str) -> tuple[Activations, float, float]:
    """Of each image of a config in JSON: bytes saved, operations, and those of the model alone."""
    devices = jax.devices("cpu")[:1]
    experiment = Experiment.from_config(without_mesh(json.loads(config)), devices=devices)
    step = jax.make_jaxpr(experiment.train_step)
    flops = count_flops(step(experiment.abstract_state, experiment.abstract_batch))
    model_flops = train_flops(experiment.model, experiment.train_data.image_shape()[:2])
    size = experiment.train_data.batch_size
    return count_activations(experiment), flops / size, model_flops


def _assess(
    experiment: Experiment,
    chip: Chip,
    num_slices: int,
    memory: Memory,
    way: _Way,
    *,
    overrides: Mapping[str, Any],
    accum_steps: int,
) -> Candidate | None:
    mesh, batch_size = dict(experiment.mesh.shape), experiment.train_data.batch_size
    shards = math.prod(mesh[axis] for axis in BATCH_AXES)
    if batch_size % (shards * accum_steps):
        return None
    images = batch_size / shards / accum_steps

    def total(saved: Activations) -> float:
        return images * (saved.whole + saved.split / mesh["tensor"])

    gradients = memory.gradients * (2 if accum_steps > 1 else 1)
    params, fsdp = memory.params, mesh["fsdp"]
    # Sums of gradients over copies; gathers of bfloat16 parameters forward and backward, and
    # scattered sums, over shards; four sums of activations in each block over `tensor`.
    data = mesh["data"] // num_slices
    tokens = math.prod(experiment.model.grid(experiment.train_data.image_shape()[:2])) + 1
    width = getattr(experiment.model, "hidden_size", 0) * experiment.model.num_layers
    ici = (
        2 * params * (data - 1) / data
        + params * (fsdp - 1) * (2 * accum_steps + 1) / 2
        + 4 * 2 * batch_size / shards * tokens * width * 2 * (mesh["tensor"] - 1) / mesh["tensor"]
    )
    dcn = 2 * params * (num_slices - 1) / num_slices / data
    devices = experiment.mesh.size
    work = Work(
        flops=way.flops * batch_size / devices,
        model_flops=way.model_flops * batch_size / devices,
        # The state once in and once out; in each micro-batch, bfloat16 parameters forward, backward
        # and for their gradients; and what blocks compute, whether it is saved or not.
        hbm_bytes=2 * memory.arguments
        + accum_steps * (1.5 * params * fsdp + way.passes * total(way.computed)),
        ici_bytes=ici,
        dcn_bytes=dcn,
    )
    return Candidate(
        overrides={**overrides, **way.overrides, "optimizer.accum_steps": accum_steps},
        mesh=mesh,
        images=images,
        argument_bytes=memory.arguments,
        temp_bytes=round(gradients + total(way.kept)),
        step_seconds=make_roofline(work, chip).step_seconds,
        batch_size=batch_size,
    )


def could_fit(candidate: Candidate, limit: int, *, ratio: float = 1.0) -> bool:
    """Whether a candidate may fit, if temporaries are `ratio` times the estimate."""
    return candidate.argument_bytes + candidate.temp_bytes * ratio <= limit


@dataclasses.dataclass(frozen=True)
class Result:
    """A candidate and its plan, as `--json` writes it."""

    candidate: Candidate
    plan: dict[str, Any]


def search(
    candidates: Sequence[Candidate],
    limit: int,
    compile_candidate: Callable[[Candidate], dict[str, Any]],
    *,
    max_compiles: int,
    jobs: int,
    report: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """Compiles the promising candidates, and returns all that were, the best first.

    Each plan corrects the estimates of memory of those with the same rematerialisation; what can no
    longer fit is left out.
    """
    waiting = list(candidates)
    # Temporaries as compiled to those estimated.
    ratios: dict[Any, float] = {}
    results: list[Result] = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while waiting and len(results) < max_compiles:
            waiting = [
                c for c in waiting if could_fit(c, limit, ratio=ratios.get(_kind(c), _LOWEST))
            ]
            # What should fit by what is known comes before what may.
            waiting.sort(
                key=lambda c: not could_fit(c, limit, ratio=_SPARE * ratios.get(_kind(c), 1.0))
            )
            batch = waiting[: min(jobs, max_compiles - len(results))]
            waiting = waiting[len(batch) :]
            for c, plan in zip(batch, pool.map(compile_candidate, batch), strict=True):
                results.append(Result(c, plan))
                if plan.get("temp_bytes") and c.temp_bytes:
                    ratios[_kind(c)] = plan["temp_bytes"] / c.temp_bytes
                report(len(results))
    return sorted(results, key=lambda r: -(r.plan.get("images_per_second_per_chip") or 0))


def _kind(candidate: Candidate) -> Any:
    return candidate.overrides.get("model.remat"), candidate.overrides.get("model.scan")


def plan_in_subprocess(arguments: Sequence[str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a command line with more overrides, made by a process of its own.

    A compiler that fails takes only that process with it; the plan then holds its last line.
    """
    extra = [f"--config.{k}={v!r}" for k, v in overrides.items()]
    command = [sys.executable, "-m", "vit_jax.plan", *arguments, *extra, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"fits": False, "error": lines[-1][:300]}


def default_cache() -> Path:
    """Where compiled programs are kept."""
    return Path("~/.cache/vit_jax/plan").expanduser()
