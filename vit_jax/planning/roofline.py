# SPDX-License-Identifier: Apache-2.0
"""The shortest time of a step: each unit of a device works at its peak, all at the same time.

Source: Williams et al., "Roofline: an insightful visual performance model", CACM 52(4), 2009.
"""

import dataclasses

from vit_jax.runtime.chips import Chip


@dataclasses.dataclass(frozen=True)
class Work:
    """What each device does in a step.

    Attributes:
      flops: operations, including those that are recomputed to save memory.
      model_flops: operations without the recomputed ones.
      hbm_bytes: read from and written to the memory of the device.
      ici_bytes: sent to devices of the same slice.
      dcn_bytes: sent to other slices.
    """

    flops: float
    model_flops: float
    hbm_bytes: float
    ici_bytes: float
    dcn_bytes: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each unit is busy. The step takes at least as long as the busiest one."""

    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    dcn_seconds: float
    mfu_bound: float

    @property
    def step_seconds(self) -> float:
        """The lower bound of the time of a step."""
        return getattr(self, f"{self.bound_by}_seconds")

    @property
    def bound_by(self) -> str:
        """The busiest unit: `compute`, `hbm`, `ici` or `dcn`."""
        units = ("compute", "hbm", "ici", "dcn")
        return max(units, key=lambda unit: getattr(self, f"{unit}_seconds"))


def make_roofline(work: Work, chip: Chip) -> Roofline:
    """The roofline of a step on a chip. MFU counts `model_flops` (arXiv:2204.02311)."""
    seconds = (
        work.flops / chip.flops,
        work.hbm_bytes / chip.hbm_bandwidth,
        work.ici_bytes / chip.ici_bandwidth,
        work.dcn_bytes / chip.dcn_bandwidth,
    )
    return Roofline(*seconds, mfu_bound=work.model_flops / chip.flops / max(seconds))
