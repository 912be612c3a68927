# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs as XLA's compiler for GPUs takes them: by a description, without a GPU."""

import dataclasses
import functools
from typing import Any

from jax.experimental import topologies

from vit_jax.observe.provenance import find_version

# The compiler is in the plugins that `jax[cuda12]` and `jax[cuda13]` install.
GPU_PLUGINS = ("jax-cuda13-pjrt", "jax-cuda12-pjrt")


@dataclasses.dataclass(frozen=True)
class _Card:
    """What the compiler asks about a GPU.

    Source: what CUDA reports of each (`cudaGetDeviceProperties`), and "Compute capabilities" in
    NVIDIA's CUDA C++ programming guide.

    Attributes:
      description: as CUDA names the GPU.
      capability: major number of the compute capability; the minor one is 0.
      multiprocessors: number of them.
      lanes: float32 operations that one of them starts in a cycle.
      shared_memory: bytes of one of them.
      block_shared_memory: bytes that one block may ask for.
      l2_cache, memory: bytes.
      clock_ghz: the highest clock.
      bandwidth: bytes a second of the memory.
    """

    description: str
    capability: int
    multiprocessors: int
    lanes: int
    shared_memory: int
    block_shared_memory: int
    l2_cache: int
    memory: int
    clock_ghz: float
    bandwidth: int


_A100 = _Card(
    description="NVIDIA A100-SXM4-80GB",
    capability=8,
    multiprocessors=108,
    lanes=64,
    shared_memory=164 * 1024,
    block_shared_memory=163 * 1024,
    l2_cache=40 * 2**20,
    memory=85_100_068_864,
    clock_ghz=1.41,
    bandwidth=2_039_040_000_000,
)
_H100 = _Card(
    description="NVIDIA H100 80GB HBM3",
    capability=9,
    multiprocessors=132,
    lanes=128,
    shared_memory=228 * 1024,
    block_shared_memory=227 * 1024,
    l2_cache=50 * 2**20,
    memory=84_942_979_072,
    clock_ghz=1.98,
    bandwidth=3_352_320_000_000,
)
_H200 = dataclasses.replace(
    _H100, description="NVIDIA H200", memory=151_397_597_184, bandwidth=4_800_000_000_000
)
_B200 = dataclasses.replace(
    _H100,
    description="NVIDIA B200",
    capability=10,
    multiprocessors=148,
    l2_cache=132_644_864,
    memory=191_514_411_008,
    clock_ghz=1.965,
    bandwidth=7_672_320_000_000,
)
_CARDS = {"a100": _A100, "h100": _H100, "h200": _H200, "b200": _B200}


class NoGpuCompilerError(Exception):
    """XLA's compiler for GPUs can't be used; the message says why."""


@functools.cache
def make_gpus(name: str, hosts: int, per_host: int) -> list[Any]:
    """Returns described devices to compile for, in the order of the hosts.

    Args:
      name: of the GPU, as in `vit_jax.runtime.chips.GPUS`.
      hosts: number of them.
      per_host: GPUs of each.

    Raises:
      NoGpuCompilerError: it is not installed, or the installed JAX can't use it without a GPU.
    """
    if not any(map(find_version, GPU_PLUGINS)):
        raise NoGpuCompilerError(
            "it is not installed: pip install 'vit_jax[gpu-plan]' (no GPU is needed)"
        )
    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            target_config=_describe(_CARDS[name]),
            # Slices, hosts of each, and GPUs of each.
            topology=f"1x{hosts}x{per_host}",
        )
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        raise NoGpuCompilerError(f"JAX {find_version('jax')} can't use it: {reason}") from e
    return list(described.devices)


def _describe(card: _Card) -> str:
    """The text of XLA's message `GpuTargetConfigProto`."""
    # Versions that the compiler requires, and which choose no kernel here.
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {card.capability} }}
  core_count: {card.multiprocessors}
  fpus_per_core: {card.lanes}
  clock_rate_ghz: {card.clock_ghz}
  memory_bandwidth: {card.bandwidth}
  device_memory_size: {card.memory}
  l2_cache_size: {card.l2_cache}
  shared_memory_per_core: {card.shared_memory}
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {card.block_shared_memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{card.description}"
"""
