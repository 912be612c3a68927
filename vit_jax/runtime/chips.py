# SPDX-License-Identifier: Apache-2.0
"""What accelerators can do, by the name that JAX gives to their devices.

Per JAX device: a TPU7x chip is two of them. Peaks are for dense bfloat16 products.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device.

    Attributes:
      name: as in a topology, such as `v5e`.
      device_kind: as JAX says it.
      flops: peak, in operations a second (bfloat16, dense).
      hbm_bytes: what a program can use. TPU: what the compiler allows. GPU: the 75 % that JAX takes
        by default (XLA_PYTHON_CLIENT_MEM_FRACTION).
      hbm_bandwidth: bytes a second.
      ici_bandwidth: bytes a second that a device sends to its neighbours, over all of its links of
        ICI or NVLink; half of what is advertised for both directions.
      dcn_bandwidth: bytes a second that a device's share of the network between slices (TPU) or
        hosts (GPU) sends.
      per_chip: devices of a chip.
      source: of the numbers.
      clock: cycles a second of what the compiler counts cycles of; None where it does not.
      float8: whether it multiplies matrices in float8 (e4m3, e5m2); elsewhere that is emulated.
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
    float8: bool = False


_GIB = 2**30
_JAX_SHARE = 0.75
_DOCS = "cloud.google.com/tpu/docs"

_TPUS = (
    # Clocks: jax-ml.github.io/scaling-book for v5e and v5p, arXiv:2304.01433 for v4; that of v6e is
    # its peak over the products of its units in a cycle, four of 256 x 256.
    # The network of v4 is not published by chip: taken as that of v5p.
    Chip(
        "v4",
        "TPU v4",
        275e12,
        int(30.75 * _GIB),
        1228e9,
        150e9,
        6.25e9,
        f"{_DOCS}/v4",
        clock=1.05e9,
    ),
    # 6.4 Tb/s for a pod of 256.
    Chip(
        "v5e",
        "TPU v5 lite",
        197e12,
        int(15.75 * _GIB),
        819e9,
        200e9,
        3.125e9,
        f"{_DOCS}/v5e",
        clock=1.5e9,
    ),
    Chip(
        "v5p",
        "TPU v5",
        459e12,
        int(95.74 * _GIB),
        2765e9,
        600e9,
        6.25e9,
        f"{_DOCS}/v5p",
        clock=1.75e9,
    ),
    Chip(
        "v6e",
        "TPU v6 lite",
        918e12,
        int(31.25 * _GIB),
        1638e9,
        400e9,
        12.5e9,
        f"{_DOCS}/v6e",
        clock=1.75e9,
    ),
    Chip(
        "tpu7x",
        "TPU7x",
        1153.5e12,
        int(94.75 * _GIB),
        3690e9,
        300e9,
        6.25e9,
        f"{_DOCS}/tpu7x",
        per_chip=2,
        float8=True,
    ),
)
# Networks as in NVIDIA's DGX of each: 200 Gb/s for an A100, 400 Gb/s for the others.
_GPUS = (
    Chip(
        "a100",
        "NVIDIA A100-SXM4-80GB",
        312e12,
        int(_JAX_SHARE * 80e9),
        2039e9,
        300e9,
        25e9,
        "NVIDIA A100 datasheet (SXM, 80 GB)",
    ),
    Chip(
        "h100",
        "NVIDIA H100 80GB HBM3",
        989e12,
        int(_JAX_SHARE * 80e9),
        3350e9,
        450e9,
        50e9,
        "NVIDIA H100 datasheet (SXM)",
        float8=True,
    ),
    Chip(
        "h200",
        "NVIDIA H200",
        989e12,
        int(_JAX_SHARE * 141e9),
        4800e9,
        450e9,
        50e9,
        "NVIDIA H200 datasheet (SXM)",
        float8=True,
    ),
    Chip(
        "b200",
        "NVIDIA B200",
        2250e12,
        int(_JAX_SHARE * 180e9),
        8000e9,
        900e9,
        50e9,
        "NVIDIA DGX B200 datasheet",
        float8=True,
    ),
)

TPUS = {chip.name: chip for chip in _TPUS}
GPUS = {chip.name: chip for chip in _GPUS}


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a JAX device; None for one that is not in the tables."""
    return next((c for c in (*_TPUS, *_GPUS) if c.device_kind == device_kind), None)
