# SPDX-License-Identifier: Apache-2.0
"""Descriptions of devices to compile for, such as `v5e:16x16`, `h100:8` or `cpu:8`."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.experimental import topologies

from vit_jax.planning.gpus import NoGpuCompilerError, make_gpus
from vit_jax.runtime.chips import GPUS, TPUS, Chip
from vit_jax.utils.errors import UserError

# Without these, libtpu looks for the TPU machine that it runs on and for other users of the TPU.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


# Devices of a job at most. Each CPU device is created in this process.
MOST_DEVICES, MOST_CPUS = 2**16, 2**10


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices of a job.

    Attributes:
      name: of one slice, as in `--topology`.
      chip: kind of the devices; None for a CPU.
      num_slices: slices of TPUs, or hosts of GPUs, each with the devices of `name`.
      shape: number of chips in each dimension of a slice.
    """

    name: str
    chip: Chip | None
    num_slices: int
    shape: tuple[int, ...]

    @property
    def is_tpu(self) -> bool:
        return self.chip is not None and self.chip.name in TPUS

    @property
    def num_devices(self) -> int:
        """The number of devices in all slices."""
        per_chip = self.chip.per_chip if self.chip else 1
        return math.prod(self.shape) * per_chip * self.num_slices

    @property
    def num_chips(self) -> int:
        """The number of chips in all slices."""
        return math.prod(self.shape) * self.num_slices


def parse_topology(name: str, *, num_slices: int = 1) -> Topology:
    """Parses `v5e:16x16` (chips in each dimension) or `h100:8` (GPUs of a host).

    Raises:
      UserError: the kind is unknown, or the shape is not valid.
    """
    kind, _, sizes = name.partition(":")
    known = {**TPUS, **GPUS, "cpu": None}
    if kind not in known:
        raise UserError(
            f"--topology={name!r}: no such kind of device; there is: {', '.join(sorted(known))}"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        example = {"v4": "v4:2x2x4", "v5p": "v5p:4x4x4", "tpu7x": "tpu7x:2x2x4"}.get(kind)
        example = example or (f"{kind}:4x4" if kind in TPUS else f"{kind}:8")
        raise UserError(f"--topology={name!r}: expected a shape, as in {example}")
    if kind not in TPUS and "x" in sizes:
        count = math.prod(map(int, sizes.split("x")))
        raise UserError(
            f"--topology={name!r}: expected the number of devices of a host, as in {kind}:{count}"
        )
    if num_slices < 1:
        raise UserError(f"--num_slices={num_slices}: expected at least 1")
    topology = Topology(name, known[kind], num_slices, tuple(map(int, sizes.split("x"))))
    most = MOST_CPUS if kind == "cpu" else MOST_DEVICES
    if topology.num_devices > most:
        slices = f" with --num_slices={num_slices}" if num_slices > 1 else ""
        raise UserError(
            f"--topology={name!r}{slices} has {topology.num_devices:,} devices: expected at most "
            f"{most:,}"
        )
    return topology


def make_devices(topology: Topology) -> list[Any]:
    """Makes devices to compile for.

    They are CPU devices of this process for CPUs, and for GPUs where XLA's compiler for GPUs can't
    be used.

    Raises:
      UserError: libtpu is not installed, does not know the shape, or JAX has fewer CPUs already.
    """
    if topology.is_tpu:
        return _tpus(topology)
    if topology.chip is not None:
        with contextlib.suppress(NoGpuCompilerError):
            return _gpus(topology)
    count = topology.num_devices
    # Raises if JAX has already created its devices, whose number is then fixed.
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology={topology.name!r}: JAX has {len(devices)} CPU device(s) in this process; "
            f"start it with XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def find_compiler(devices: Sequence[Any]) -> Literal["cpu", "gpu", "tpu"]:
    """The kind of the devices that `make_devices` made."""
    platform = devices[0].platform
    return "gpu" if platform == "cuda" else platform


def explain_cpus(topology: Topology) -> str:
    """Why `make_devices` made CPUs for a topology of GPUs; empty if it did not."""
    try:
        _gpus(topology)
    except NoGpuCompilerError as e:
        return str(e)
    return ""


def _gpus(topology: Topology) -> list[Any]:
    assert topology.chip is not None
    return make_gpus(topology.chip.name, topology.num_slices, math.prod(topology.shape))


def _tpus(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name!r}: libtpu, the compiler for TPUs, is not installed: run "
            "pip install 'vit_jax[tpu-plan]' (no TPU is needed)"
        )
    for key, value in _LIBTPU.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {}
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    if topology.chip is not None and topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # One device a chip, as on a real v4.
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except Exception as e:
        raise UserError(
            f"--topology={topology.name!r}: libtpu can't make it: {' '.join(str(e).split())[:200]}"
        ) from e
    return list(described.devices)


def slice_of(topology: Topology, devices: list[Any]) -> list[int]:
    """The index of the slice (for GPUs: the host) of each device."""
    if topology.is_tpu:
        return [getattr(d, "slice_index", None) or 0 for d in devices]
    per_slice = topology.num_devices // topology.num_slices
    return [d.id // per_slice for d in devices]
