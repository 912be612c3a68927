# SPDX-License-Identifier: Apache-2.0
"""How fast a step can be at best: each of a device's units at its peak, all at the same time.

Source: Williams et al., "Roofline: an insightful visual performance model", CACM 52(4), 2009.
"""

import dataclasses

from vit_jax.runtime.chips import Chip


@dataclasses.dataclass(frozen=True)
class Work:
    """What each device does in a step.

    Attributes:
      flops: operations, those that are done again to save memory included.
      model_flops: without those.
      hbm_bytes: read from and written to its memory.
      ici_bytes: sent to devices of its slice.
      dcn_bytes: sent to other slices.
    """

    flops: float
    model_flops: float
    hbm_bytes: float
    ici_bytes: float
    dcn_bytes: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each unit is busy; the step takes as long as the busiest, or longer."""

    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    dcn_seconds: float
    mfu_bound: float

    @property
    def step_seconds(self) -> float:
        return max(self._units.values())

    @property
    def bound_by(self) -> str:
        """`compute`, `hbm`, `ici` or `dcn`."""
        return max(self._units, key=self._units.__getitem__)

    @property
    def _units(self) -> dict[str, float]:
        return {
            "compute": self.compute_seconds,
            "hbm": self.hbm_seconds,
            "ici": self.ici_seconds,
            "dcn": self.dcn_seconds,
        }


def make_roofline(work: Work, chip: Chip) -> Roofline:
    """The roofline of a step on a chip; MFU is that of `model_flops` (arXiv:2204.02311)."""
    seconds = (
        work.flops / chip.flops,
        work.hbm_bytes / chip.hbm_bandwidth,
        work.ici_bytes / chip.ici_bandwidth,
        work.dcn_bytes / chip.dcn_bandwidth,
    )
    return Roofline(*seconds, mfu_bound=work.model_flops / chip.flops / max(seconds))
