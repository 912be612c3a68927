# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and the sharding of batches over it."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import check_type
from vit_jax.utils.suggestions import suggest_key

AXES = ("data", "fsdp", "tensor")
# The batch is split over both: FSDP is data parallelism with sharded parameters.
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    dcn: dict | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Makes a mesh with the axes `data, fsdp, tensor` over all devices.

    Args:
      data: number of devices with copies of the parameters. One of the axes may be -1: it takes
        the devices that the others leave.
      fsdp: number of devices over which parameters and optimizer state are sharded.
      tensor: number of devices over which attention heads, MLPs and the head are split.
      dcn: the number of parts of each axis that are in different groups, if the devices are in
        groups with a slow network between them (TPU slices, GPU nodes), such as `{"data": -1}`.
        None puts the groups along `data` first, then along `fsdp`, and never along `tensor`.
      devices: of the mesh; None for all devices of the job.

    Raises:
      UserError: the axes do not multiply to the number of devices, or more than one is -1.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _fill({"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices), key="mesh")
    if math.prod(sizes.values()) != len(devices):
        near = " or ".join(map(_text, factorizations(sizes, len(devices))))
        raise UserError(
            f"mesh: {_text(sizes)} does not make {len(devices)} device(s); expected sizes that "
            f"multiply to it, such as {near}"
        )
    # Explicit axes, the default of jax.make_mesh, do not work with Flax Linen.
    return Mesh(arrange(devices, sizes, dcn), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices: Sequence[Any], sizes: dict[str, int], dcn: dict | None) -> np.ndarray:
    """Arranges devices so that only the axes of `dcn` cross the slow network.

    Args:
      devices: as many as the product of the sizes.
      sizes: of the axes.
      dcn: see `make_mesh`.

    Returns:
      The devices, an object array with the sizes as its shape.

    Raises:
      UserError: `dcn` does not fit the groups of the devices.
    """
    groups = Counter(map(_group, devices))
    if dcn is None:
        slow = _spread(sizes, len(groups))
        if slow["tensor"] > 1:
            raise UserError(
                f"mesh.tensor={sizes['tensor']} would cross the slow network between {len(groups)} "
                f"slices or nodes; expected mesh.data x mesh.fsdp to be a multiple of {len(groups)}"
            )
    else:
        for axis in dcn:
            if axis not in AXES:
                raise UserError(
                    f"unknown config key mesh.dcn.{axis}{suggest_key(f'mesh.dcn.{axis}', AXES)}"
                )
        slow = _fill({axis: dcn.get(axis, 1) for axis in AXES}, len(groups), key="mesh.dcn")
    if math.prod(slow.values()) != len(groups) or len(set(groups.values())) > 1:
        raise UserError(
            f"mesh.dcn: {_text(slow)} does not make {len(groups)} group(s) of "
            f"{sorted(set(groups.values()))} devices; expected sizes that multiply to it, such as "
            "mesh.dcn.data=-1"
        )
    for axis, size in sizes.items():
        if size % slow[axis]:
            raise UserError(
                f"mesh.{axis}={size} is not divisible by mesh.dcn.{axis}={slow[axis]}, its parts "
                "in different slices or nodes"
            )
    # If the links between the chips do not fit the axes, an axis uses several dimensions of them.
    if len(groups) == 1:
        return mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_hybrid_device_mesh(
        tuple(size // slow[axis] for axis, size in sizes.items()),
        tuple(slow.values()),
        devices,
        process_is_granule=devices[0].platform == "cpu",
        allow_split_physical_axes=True,
    )


def _group(device: Any) -> int:
    """The index of the TPU slice or GPU node of a device; on CPUs, of its process."""
    if device.platform == "cpu":
        return device.process_index
    return getattr(device, "slice_index", 0)


def _spread(sizes: dict[str, int], groups: int) -> dict[str, int]:
    slow = {}
    for axis, size in sizes.items():
        slow[axis] = math.gcd(size, groups)
        groups //= slow[axis]
    return slow


def _fill(sizes: dict[str, int], total: int, *, key: str) -> dict[str, int]:
    free = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if not isinstance(size, int) or (size != -1 and size < 1):
            raise UserError(f"{key}.{axis}={size}: expected at least 1, or -1 for what is left")
    if len(free) > 1:
        raise UserError(f"{key}.{free[1]}=-1: only one axis can fill, and {key}.{free[0]} does")
    known = math.prod(size for size in sizes.values() if size != -1)
    return sizes | {axis: max(total // known, 1) for axis in free}


def factorizations(sizes: dict[str, int], total: int) -> list[dict[str, int]]:
    """The three factorizations of `total` that are nearest to `sizes`."""
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    found = [
        {"data": total // (f * t), "fsdp": f, "tensor": t}
        for f in divisors
        for t in divisors
        if total % (f * t) == 0
    ]

    def distance(candidate: dict[str, int]) -> float:
        return sum(abs(math.log(candidate[axis] / sizes[axis])) for axis in AXES)

    return sorted(found, key=distance)[:3]


def _text(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())


def choose_layout(
    section: dict[str, Any], devices: Sequence[Any]
) -> tuple[dict[str, Any], str | None]:
    """Applies the first of the `rules` of a config's `mesh` that matches the devices.

    Args:
      section: `mesh` of the config. Its `rules` are pairs of a regular expression, which is
        searched for in a description of the devices such as "TPU v5 lite x256" or
        "NVIDIA H100 80GB HBM3 x8", and the keys of `mesh` to change.
      devices: of the job.

    Returns:
      The changed section without the rules, and a message about the rule that matches; None if
      there are no rules.

    Raises:
      UserError: an expression is not valid.
    """
    rest = {k: v for k, v in section.items() if k != "rules"}
    rules = section.get("rules", ())
    check_type(rules, tuple[tuple[str, dict], ...], key="mesh.rules")
    what = f"{devices[0].device_kind} x{len(devices)}"
    for pattern, changes in rules:
        try:
            fits = re.search(pattern, what)
        except re.error as e:
            raise UserError(f"mesh.rules: {pattern!r} is not a regular expression: {e}") from None
        if fits:
            shown = ", ".join(f"{k}={v}" for k, v in changes.items()) or "no change"
            return rest | dict(changes), f"mesh.rules: {pattern!r} fits {what}: {shown}"
    return rest, f"mesh.rules: none fits {what}" if rules else None


def count_batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is split into over the mesh."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh, *, key: str) -> None:
    """Raises `UserError` unless the batch splits evenly over the mesh."""
    shards = count_batch_shards(mesh)
    if batch_size < 1:
        raise UserError(f"{key}={batch_size}: expected at least 1")
    if batch_size % shards:
        raise UserError(
            f"{key}={batch_size} is not divisible by {shards}, the devices that the batch is split "
            f"over (mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']})"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first dimension is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_shards(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """The indices of the equal parts of each batch that this process loads, and their number.

    A part belongs to one row of the mesh, which has all of its tensor axis. The rows of a process
    need not be neighbours, since a mesh follows the links between the chips. Processes that share a
    row load the same part.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    me = jax.process_index()
    mine = (i for i, row in enumerate(rows) if any(d.process_index == me for d in row))
    return tuple(mine), len(rows)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Makes sharded global arrays `[batch, ...]` from the rows that this process has loaded."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
