# SPDX-License-Identifier: Apache-2.0
"""Peak speeds and memory of accelerators, by the name that JAX gives to their devices."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device. A TPU7x chip consists of two of them.

    Attributes:
      name: as in a topology, such as `v5e`.
      device_kind: `jax.Device.device_kind`.
      flops: peak operations a second of dense bfloat16 products.
      hbm_bytes: memory that a program can use. TPU: what the compiler allows. GPU: the 75 % that
        JAX allocates by default (XLA_PYTHON_CLIENT_MEM_FRACTION).
      hbm_bandwidth: bytes a second.
      ici_bandwidth: bytes a second that a device sends to its neighbours, over all of its links of
        ICI or NVLink; half of the advertised number, which is for both directions.
      dcn_bandwidth: bytes a second that a device's share of the network between slices (TPU) or
        hosts (GPU) sends.
      per_chip: devices of a chip.
      clock: cycles a second of the unit whose cycles the compiler estimates; None if it does not.
      memory_share: of `hbm_bandwidth`, what a kernel reaches that moves many bytes.
      product_share: of `flops`, what a matrix product of a model reaches.
      launch_seconds: from one kernel to the next.
      link_share: of the bandwidths of links and network, what a transfer reaches.
      exponentials: a second that a softmax within a kernel of Pallas reaches; None if unknown.
      float8: whether it multiplies matrices in float8 (e4m3, e5m2) rather than emulating that.
    """

    name: str
    device_kind: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    source: str
    per_chip: int = 1
    clock: float | None = None
    memory_share: float = 0.8
    product_share: float = 0.68
    launch_seconds: float = 0.0
    link_share: float = 0.8
    exponentials: float | None = None
    float8: bool = False


def _chip(
    name: str,
    device_kind: str,
    tflops: float,
    memory: float,
    gb_per_s: tuple[float, float, float],
    product: str | None = None,
    **options: Any,
) -> Chip:
    """A TPU with its GiB, or a GPU of an NVIDIA product with its GB.

    `gb_per_s` holds the speeds of its memory, its links and its share of the network.
    """
    source, size = f"cloud.google.com/tpu/docs/{name}", int(memory * 2**30)
    if product is not None:
        source, size = f"NVIDIA {product} datasheet", int(0.75 * (memory * 1e9))
        options["launch_seconds"] = 2.5e-6
    hbm, ici, dcn = (1e9 * rate for rate in gb_per_s)
    return Chip(name, device_kind, 1e12 * tflops, size, hbm, ici, dcn, source, **options)


# Clocks: jax-ml.github.io/scaling-book for v5e and v5p, arXiv:2304.01433 for v4; that of v6e is its
# peak divided by the products of its units in a cycle, four of 256 x 256. The network of v4 is not
# published by chip: it is assumed to be that of v5p. That of v5e is 6.4 Tb/s for a pod of 256.
# Exponentials: from the schedules of libtpu 0.0.42, which `tools.tpu_schedule` counts.
_TPUS = (
    _chip("v4", "TPU v4", 275, 30.75, (1228, 150, 6.25), clock=1.05e9),
    _chip("v5e", "TPU v5 lite", 197, 15.75, (819, 200, 3.125), clock=1.5e9, exponentials=2.4e11),
    _chip("v5p", "TPU v5", 459, 95.74, (2765, 600, 6.25), clock=1.75e9, exponentials=5.3e11),
    _chip("v6e", "TPU v6 lite", 918, 31.25, (1638, 400, 12.5), clock=1.75e9, exponentials=3.8e11),
    _chip("tpu7x", "TPU7x", 1153.5, 94.75, (3690, 300, 6.25), per_chip=2, float8=True),
)
# Shares of peaks: the largest bfloat16 products reach 790 TFLOP/s on an H200. Those of a model are
# assumed to reach 85 % of that, and the same share of the peak on the other chips.
# Networks as in NVIDIA's DGX of each: 200 Gb/s for an A100, 400 Gb/s for the others.
_GPUS = (
    _chip("a100", "NVIDIA A100-SXM4-80GB", 312, 80, (2039, 300, 25), "A100 SXM 80 GB"),
    _chip("h100", "NVIDIA H100 80GB HBM3", 989, 80, (3350, 450, 50), "H100 SXM", float8=True),
    _chip("h200", "NVIDIA H200", 989, 141, (4800, 450, 50), "H200 SXM", float8=True),
    _chip("b200", "NVIDIA B200", 2250, 180, (8000, 900, 50), "DGX B200", float8=True),
)

TPUS = {chip.name: chip for chip in _TPUS}
GPUS = {chip.name: chip for chip in _GPUS}


def find_chip(device_kind: str) -> Chip | None:
    """The chip with a `jax.Device.device_kind`; None for one that is not in the tables."""
    return next((c for c in (*_TPUS, *_GPUS) if c.device_kind == device_kind), None)
