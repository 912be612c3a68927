# SPDX-License-Identifier: Apache-2.0
"""Predicts how a recipe scales over chips with its global batch, calibrated by compiled steps.

The bytes of a step, and the time of its kernels, are a constant (parameters, gradients) plus a
multiple of the images per device. Both coefficients come from the step compiled with the given
batch and with half of it. The kernels hide as many seconds of transfers, for each of their own, as
they do in the compiled step.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit_jax.planning.plan import Plan
from vit_jax.planning.roofline import Work, make_roofline
from vit_jax.planning.topologies import Topology
from vit_jax.utils.errors import UserError

# Chips of the largest slice: cloud.google.com/tpu/docs. More chips are several slices.
MAX_SLICE = {"v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256, "tpu7x": 9216}
GPUS_A_HOST = 8
# Efficiency below which a recipe does not scale.
WORTH = 0.5


@dataclasses.dataclass(frozen=True)
class Row:
    """A step on some number of chips. Bytes are sent by each device.

    `step_seconds` and `mfu` are expected where the kernels of the compiled steps have times, and at
    best where they have none. `bound_by` is the busiest unit of the roofline, or `waits` where
    these take most of the time.
    """

    chips: int
    slices: int
    images_per_device: float
    images_per_second: float
    mfu: float
    ici_bytes: float
    dcn_bytes: float
    step_seconds: float
    bound_by: str
    efficiency: float
    scales: bool


def compile_points(plan: Callable[[Mapping[str, Any]], Plan]) -> list[Plan]:
    """Compiles the two plans that calibrate the model: with the config's batch and with half of it.

    Args:
      plan: returns the plan of the config with overrides.

    Raises:
      UserError: one of them does not fit or fails to compile.
    """
    points: list[Plan] = []
    for _ in range(2):
        half = {"data.batch_size": points[0]["batch_size"] // 2} if points else {}
        points.append(plan(half))
        if not points[-1].get("step_seconds"):
            raise UserError(
                "--scale: the step to calibrate by did not compile "
                f"({points[-1].get('error')}); try --search first"
            )
    return points


def predict(points: Sequence[Plan], topology: Topology, chips: Sequence[int]) -> list[Row]:
    """Predicts a step for each number of chips, with the global batch of the first point.

    Args:
      points: plans with the whole batch and with half of it.
      topology: that the points are compiled for.
      chips: numbers of chips.
    """
    chip = topology.chip
    assert chip is not None
    whole, half = points
    batch_size, devices = whole["batch_size"], whole["num_devices"]
    images = [p["batch_size"] / p["num_devices"] for p in (whole, half)]

    def line(key: str) -> tuple[float, float]:
        slope = max((whole[key] - half[key]) / (images[0] - images[1]), 0.0)
        return max(whole[key] - slope * images[0], 0.0), slope

    hbm, ici = line("hbm_bytes"), line("ici_bytes")
    has_kernels = all(p.get("kernel_seconds") for p in points)
    busy = line("kernel_seconds") if has_kernels else (0.0, 0.0)
    sent, waited = whole.get("transfer_seconds") or 0.0, whole.get("wait_seconds") or 0.0
    hides = (sent - waited) / whole["kernel_seconds"] if has_kernels else 0.0
    shards = whole["mesh"]["fsdp"] * whole["mesh"]["tensor"]
    before = devices / whole["num_slices"] / shards
    # What is summed over copies: as compiled, where nothing else is sent within a slice.
    gradients = whole["predicted"]["params"]
    if shards == 1 < before:
        gradients = ici[0] / _ring(before)
    rows: list[Row] = []
    for count in chips:
        total = count * chip.per_chip
        largest = MAX_SLICE.get(chip.name) or _gpus_a_host(topology)
        slices = max(1, -(-count // largest))
        per_device = batch_size / total
        copies = total // slices / shards
        # Sums over copies: each device sends 2 (n - 1)/n of its share within the slice, and the
        # same of the share of its slice between slices.
        ring = _ring(copies) / _ring(before) if before > 1 else 1.0
        work = Work(
            flops=whole["flops_per_device"] * devices / total,
            model_flops=whole["model_flops_per_device"] * devices / total,
            hbm_bytes=hbm[0] + hbm[1] * per_device,
            ici_bytes=ici[0] * ring + ici[1] * per_device,
            dcn_bytes=gradients * _ring(slices) / max(copies, 1),
        )
        roofline = make_roofline(work, chip)
        kernels = busy[0] + busy[1] * per_device
        waits = 0.0
        if whole.get("wait_seconds") is not None:
            links = roofline.ici_seconds + roofline.dcn_seconds
            waits = max(links / chip.link_share - hides * kernels, 0.0)
        seconds = max(kernels + waits, roofline.step_seconds)
        speed = batch_size / seconds
        efficiency = speed / count / (rows[0].images_per_second / rows[0].chips) if rows else 1.0
        rows.append(
            Row(
                chips=count,
                slices=slices,
                images_per_device=per_device,
                images_per_second=speed,
                mfu=work.model_flops / chip.flops / seconds,
                ici_bytes=work.ici_bytes,
                dcn_bytes=work.dcn_bytes,
                step_seconds=seconds,
                bound_by="waits" if waits > kernels else roofline.bound_by,
                efficiency=efficiency,
                scales=per_device * whole["mesh"]["tensor"] >= 1 and efficiency >= WORTH,
            )
        )
    return rows


def _gpus_a_host(topology: Topology) -> int:
    """GPUs of a host: those of the topology, unless it is a part of one host."""
    given = topology.num_devices // topology.num_slices
    return given if topology.num_slices > 1 else max(given, GPUS_A_HOST)


def _ring(n: float) -> float:
    return 2 * (n - 1) / n
