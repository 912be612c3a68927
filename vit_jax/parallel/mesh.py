# SPDX-License-Identifier: Apache-2.0
"""The device mesh and how a batch lies on it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.utils.errors import UserError

AXES = ("data", "fsdp", "tensor")
# The batch is split over both: fsdp is data parallelism whose parameters are sharded too.
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes `data, fsdp, tensor` over all devices.

    Args:
      data: devices that hold copies of the parameters; -1 takes what the other axes leave.
      fsdp: devices over which parameters and optimizer state are sharded; -1 likewise.
      tensor: devices over which attention heads, MLPs and the head are split; -1 likewise.
      devices: all of the job's by default.

    Raises:
      UserError: the axes do not multiply to the number of devices, or more than one is -1.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise UserError(f"mesh.{axis}={size}: expected at least 1, or -1 for what is left")
    if len(free) > 1:
        raise UserError(f"mesh.{free[1]}=-1: only one axis can fill, and mesh.{free[0]} does")
    if free:
        sizes[free[0]] = len(devices) // known
    if int(np.prod(list(sizes.values()))) != len(devices):
        shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"mesh: {shape} does not make {len(devices)} device(s): set mesh.data, mesh.fsdp and "
            "mesh.tensor so that they multiply to it"
        )
    # Where the wiring of the chips does not fit the axes, an axis is laid over several of them.
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    # Explicit axes, the default of jax.make_mesh, do not work with Flax Linen.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch_size(batch_size: int, mesh: Mesh, *, key: str) -> None:
    """Raises `UserError` unless the batch splits evenly over the mesh."""
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
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
    """Which of the equal parts of each batch this process loads, and how many there are.

    A part is what one row of the mesh, with all of its tensor axis, works on. The rows of a process
    need not be neighbours: a mesh follows the wires between the chips. Processes that the tensor
    axis connects load the same part.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    me = jax.process_index()
    mine = (i for i, row in enumerate(rows) if any(d.process_index == me for d in row))
    return tuple(mine), len(rows)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Makes global arrays of this process's part of the batch."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
