# SPDX-License-Identifier: Apache-2.0
"""Ends a run whose results no longer improve.

The decision is a function of the results that were recorded, so a run that resumes decides as one
that was not interrupted.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from vit_jax.observe.jsonl import read_metrics
from vit_jax.utils.errors import UserError
from vit_jax.utils.metrics import lower_is_better


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stop:
    """When a run ends before its last step.

    Attributes:
      metric: a metric of an evaluator, such as `val/loss`; None for a run that takes all steps.
        Whether lower is better follows from the name, see `lower_is_better`.
      patience: the run ends after this many evaluations in a row that are not better than the best
        one before; equal results and those that are not finite count as not better.
    """

    metric: str | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if (self.metric is None) != (self.patience is None):
            raise UserError(
                f"stop.metric={self.metric!r} and stop.patience={self.patience}: expected both, "
                "such as 'val/loss' and 5, or neither"
            )
        if self.patience is not None and self.patience < 1:
            raise UserError(f"stop.patience={self.patience}: expected at least 1 evaluation")

    def find_reason(self, values: Mapping[int, float]) -> str | None:
        """Returns why a run ends now; None if it continues.

        Args:
          values: the values of the metric by step, of all evaluations so far.
        """
        if self.metric is None or self.patience is None:
            return None
        sign = -1 if lower_is_better(self.metric) else 1
        best: tuple[int, float] | None = None
        since = 0
        for step, value in sorted(values.items()):
            if math.isfinite(value) and (best is None or sign * value > sign * best[1]):
                best, since = (step, value), 0
            else:
                since += 1
        if since < self.patience:
            return None
        what = f"stop.patience={self.patience}"
        count = f"{since} evaluation{'s' * (since > 1)}"
        if best is None:
            return f"{self.metric} was never finite in {count} ({what})"
        return f"{self.metric} was best at step {best[0]}, {best[1]:.6g}, {count} ago ({what})"


def read_values(workdir: Path, metric: str, *, until: int) -> dict[int, float]:
    """Returns the recorded values of a metric by step, of the steps up to `until`."""
    records = read_metrics(workdir)
    return {r["step"]: r[metric] for r in records if metric in r and r["step"] <= until}
