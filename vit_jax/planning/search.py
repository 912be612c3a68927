# SPDX-License-Identifier: Apache-2.0
"""Finds the mesh, rematerialisation, accumulation and batch with which a step fits and is fastest.

Arithmetic rules out what can't fit and orders the rest by speed; the compiler decides among the
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

from vit_jax.config.load import override_config
from vit_jax.config.reduced import without_mesh
from vit_jax.models.flops import count_flops, train_flops
from vit_jax.models.interface import find_grid
from vit_jax.models.two_towers import TOWERS
from vit_jax.parallel.mesh import count_batch_shards
from vit_jax.planning.memory import Activations, Memory, count_activations, estimate_memory
from vit_jax.planning.plan import Plan
from vit_jax.planning.roofline import Work, make_roofline
from vit_jax.planning.topologies import Topology, check_attention, make_devices
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError

_ACCUM = "optimizer.accum_steps"
ACCUM_STEPS = (1, 2, 4, 8)
TENSORS = (1, 2, 4)
# The compiler's temporaries are at least this part of the estimate; and the margin with which a
# candidate is expected to fit.
_LOWEST = 0.7
_SPARE = 1.12
# Memory traffic in units of what the backward pass needs of the forward pass. S/16, B/16 and L/16
# compiled for v5e, v5p and v6e, with attention in memory, move 1.8 (unrolled), 5.5 to 6.6 (none)
# and 2.8 to 2.9 (dots) times as much; the number of "full" is a guess. The numbers for GPUs are
# those of S/16 compiled for h100. Only the order of candidates depends on them.
_PASSES_TPU = {"unrolled": 1.8, "none": 6.0, "dots": 2.8, "full": 3.0}
_PASSES_GPU = {"unrolled": 5.0, "none": 10.3, "dots": 7.4, "full": 6.8}


@dataclasses.dataclass(frozen=True)
class _Way:
    """How the layers of a model run, and the cost of that for each image.

    Attributes:
      overrides: of the config.
      passes: memory traffic in units of `computed`.
      computed: activations that the backward pass needs.
      kept: the part of them that is saved rather than recomputed.
      flops: operations, including recomputed ones.
      model_flops: operations without recomputed ones.
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
      argument_bytes: of a device; exact.
      temp_bytes: of a device; an estimate.
      step_seconds: an estimate, for TPUs a lower bound.
      batch_size: of all devices.
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
    """Overrides as arguments of a command."""
    return " ".join(
        # In quotes, because a bare none means None.
        f"--config.{k}=" + shlex.quote('"none"' if v == "none" else str(v))
        for k, v in overrides.items()
    )


def make_candidates(
    config: Mapping[str, Any], topology: Topology, *, images_per_device: Sequence[int] = ()
) -> list[Candidate]:
    """All ways to run a config that its sizes allow, the fastest by arithmetic first.

    Args:
      config: as `reduce_for_planning` returns it.
      topology: the devices.
      images_per_device: batches to try in place of the config's, which changes the recipe.

    Raises:
      UserError: the devices are CPUs, or no way is valid.
    """
    if topology.chip is None:
        raise UserError(
            f"--topology={topology.name!r}: a search needs a TPU or a GPU to search for"
        )
    devices = make_devices(topology)
    check_attention(config, topology, devices)
    found: list[Candidate] = []
    error: UserError | None = None
    ways: list[_Way] = []
    for mesh in _meshes(topology):
        overrides: dict[str, Any] = {f"mesh.{axis}": size for axis, size in mesh.items()}
        batches = [n * topology.num_devices // mesh["tensor"] for n in images_per_device]
        for batch_size in batches or [None]:
            chosen = overrides | ({} if batch_size is None else {"data.batch_size": batch_size})
            chosen |= {_ACCUM: 1}
            try:
                changed = override_config(config, chosen).to_dict()
                experiment = Experiment.from_config(changed, devices=devices)
                memory = estimate_memory(experiment, Activations(0, 0))
            except UserError as e:
                error = e
                continue
            shards = count_batch_shards(experiment.mesh)
            if not ways:
                ways = _find_ways(changed, topology, sections=_sections(experiment.model))
            found += [
                _assess(experiment, topology, memory, way, chosen | {_ACCUM: accum_steps})
                for way in ways
                for accum_steps in ACCUM_STEPS
                if experiment.train_data.rows_per_batch % (shards * accum_steps) == 0
            ]
    if error is not None and not found:
        raise error
    # Among equally fast ones the simplest comes first: no accumulation, replicated parameters.
    return sorted(
        found,
        key=lambda c: (
            float(f"{c.seconds_per_image:.3g}"),
            c.overrides[_ACCUM],
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


def _sections(model: Any) -> tuple[str, ...]:
    """Sections of the config that have `remat` and `scan`: of a model, or of its towers."""
    if hasattr(model, "towers"):
        return tuple(f"model.{TOWERS[part]}" for part in model.towers)
    return ("model",) if hasattr(model, "remat") else ()


def _find_ways(
    config: Mapping[str, Any], topology: Topology, *, sections: Sequence[str]
) -> list[_Way]:
    """The ways that a model offers, with their costs, which are the same on any mesh.

    The towers of a model are all recomputed and scanned in the same way.
    """

    def override(remat: str, scan: bool) -> dict[str, Any]:
        values = {"remat": remat, "scan": scan}
        return {f"{section}.{key}": x for section in sections for key, x in values.items()}

    def count(overrides: Mapping[str, Any]) -> tuple[Activations, float, float]:
        return _count_costs(json.dumps(override_config(config, overrides).to_dict()), topology)

    passes = _PASSES_TPU if topology.is_tpu else _PASSES_GPU
    if not sections:
        costs = count({})
        return [_Way({}, passes["none"], costs[0], *costs)]
    counted = {
        (remat, scan): count(override(remat, scan))
        for remat, scan in (("none", False), ("none", True), ("dots", True), ("full", True))
    }
    # Without a scan the compiler for TPUs recomputes what is cheap: B/16 for v5e saves 7.7 GB of
    # the 24.1 that the backward pass needs, and 6.7 with `dots`.
    computed = counted["none", True][0]
    kept = {("none", False): counted["dots", True][0]} if topology.is_tpu else {}
    return [
        _Way(
            override(remat, scan),
            passes[remat if scan else "unrolled"],
            computed,
            kept.get((remat, scan), activations),
            flops,
            model_flops,
        )
        for (remat, scan), (activations, flops, model_flops) in counted.items()
    ]


@functools.lru_cache
def _count_costs(config: str, topology: Topology) -> tuple[Activations, float, float]:
    """For each image: bytes saved, operations, and operations of the model alone.

    Args:
      config: as JSON, so that results can be cached.
      topology: of the devices, which decide where attention weights are computed.
    """
    devices = make_devices(topology)[:1]
    experiment = Experiment.from_config(without_mesh(json.loads(config)), devices=devices)
    flops = count_flops(experiment.trace_step().jaxpr)
    model_flops = train_flops(experiment.model, experiment.train_data.image_shape()[:2])
    size = experiment.train_data.rows_per_batch
    return count_activations(experiment), flops / size, model_flops


def _assess(
    experiment: Experiment,
    topology: Topology,
    memory: Memory,
    way: _Way,
    overrides: Mapping[str, Any],
) -> Candidate:
    """Estimates memory and speed of one way to run an experiment."""
    num_slices, accum_steps = topology.num_slices, overrides[_ACCUM]
    mesh, batch_size = dict(experiment.mesh.shape), experiment.train_data.batch_size
    shards = count_batch_shards(experiment.mesh)
    rows = experiment.train_data.rows_per_batch
    images = rows / shards / accum_steps

    def total(saved: Activations) -> float:
        return images * (saved.whole + saved.split / mesh["tensor"])

    gradients = memory.gradients * (2 if accum_steps > 1 else 1)
    params, fsdp = memory.params, mesh["fsdp"]
    # Sums of gradients over copies; gathers of bfloat16 parameters forward and backward, and
    # scattered sums, over shards; four sums of activations in each block over `tensor`.
    data = mesh["data"] // num_slices
    grid = find_grid(experiment.model, experiment.train_data.image_shape()[:2])
    tokens = math.prod(grid or (1,)) + 1
    width = math.prod(getattr(experiment.model, key, 0) for key in ("hidden_size", "num_layers"))
    ici = (
        2 * params * (data - 1) / data
        + params * (fsdp - 1) * (2 * accum_steps + 1) / 2
        + 4 * 2 * rows / shards * tokens * width * 2 * (mesh["tensor"] - 1) / mesh["tensor"]
    )
    rows_per_chip = rows / experiment.mesh.size
    work = Work(
        flops=way.flops * rows_per_chip,
        model_flops=way.model_flops * rows_per_chip,
        # The state is read and written once. Each micro-batch reads bfloat16 parameters forward and
        # backward and writes their gradients, and moves the activations of all blocks.
        hbm_bytes=2 * memory.arguments
        + accum_steps * (1.5 * params * fsdp + way.passes * total(way.computed)),
        ici_bytes=ici,
        dcn_bytes=2 * params * (num_slices - 1) / num_slices / data,
    )
    return Candidate(
        overrides={**overrides, **way.overrides},
        mesh=mesh,
        images=images,
        argument_bytes=memory.arguments,
        temp_bytes=round(gradients + total(way.kept)),
        step_seconds=_estimate_seconds(work, topology),
        batch_size=batch_size,
    )


def _estimate_seconds(work: Work, topology: Topology) -> float:
    """Seconds of a step: for TPUs at best; for GPUs of kernels and then of all transfers."""
    chip = topology.chip
    assert chip is not None
    roofline = make_roofline(work, chip)
    if topology.is_tpu:
        return roofline.step_seconds
    kernels = max(
        roofline.compute_seconds / chip.product_share, roofline.hbm_seconds / chip.memory_share
    )
    return kernels + (roofline.ici_seconds + roofline.dcn_seconds) / chip.link_share


def could_fit(candidate: Candidate, limit: int, *, ratio: float = 1.0) -> bool:
    """Whether a candidate fits into `limit` bytes if temporaries are `ratio` times the estimate."""
    return candidate.argument_bytes + candidate.temp_bytes * ratio <= limit


def search(
    candidates: Sequence[Candidate],
    limit: int,
    compile_candidate: Callable[[Candidate], Plan],
    *,
    max_compiles: int,
    jobs: int,
    report: Callable[[int], None] = lambda count: None,
) -> list[tuple[Candidate, Plan]]:
    """Compiles promising candidates, and returns them with their plans, the best first.

    Each plan corrects the memory estimates of candidates with the same rematerialisation;
    candidates that can no longer fit are skipped.

    Args:
      candidates: the fastest first.
      limit: bytes of memory of a device.
      compile_candidate: returns the plan of a candidate; called from several threads.
      max_compiles: number of candidates to compile at most.
      jobs: number of candidates to compile at the same time.
      report: called with the number of candidates just compiled.
    """
    waiting = list(candidates)
    # Compiled temporaries divided by estimated ones.
    ratios: dict[Any, float] = {}
    results: list[tuple[Candidate, Plan]] = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while waiting and len(results) < max_compiles:
            waiting = [
                c for c in waiting if could_fit(c, limit, ratio=ratios.get(_kind(c), _LOWEST))
            ]
            # Candidates that should fit come before those that may.
            waiting.sort(
                key=lambda c: not could_fit(c, limit, ratio=_SPARE * ratios.get(_kind(c), 1.0))
            )
            batch = waiting[: min(jobs, max_compiles - len(results))]
            waiting = waiting[len(batch) :]
            for c, plan in zip(batch, pool.map(compile_candidate, batch), strict=True):
                results.append((c, plan))
                if plan.get("temp_bytes") and c.temp_bytes:
                    ratios[_kind(c)] = plan["temp_bytes"] / c.temp_bytes
                report(1)
    return sorted(results, key=lambda found: -(found[1].get("images_per_second_per_chip") or 0))


def _kind(candidate: Candidate) -> Any:
    ways = (".remat", ".scan")
    return tuple(value for key, value in candidate.overrides.items() if key.endswith(ways))


def plan_in_subprocess(arguments: Sequence[str], overrides: Mapping[str, Any]) -> Plan:
    """Makes the plan of a command line with further overrides, in a subprocess.

    A crash of the compiler ends only that process; the plan then holds its last line as `error`.
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
    """The default folder of compiled programs."""
    return Path("~/.cache/vit_jax/plan").expanduser()
