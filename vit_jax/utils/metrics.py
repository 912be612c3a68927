# SPDX-License-Identifier: Apache-2.0
"""Facts that follow from the names of metrics."""

import math
from collections.abc import Mapping

_LOWER_IS_BETTER = ("loss", "ece")


def lower_is_better(metric: str) -> bool:
    """Whether lower values of a metric, such as `val/loss`, are better."""
    return metric.rpartition("/")[2] in _LOWER_IS_BETTER


def find_best_step(values: Mapping[int, float], metric: str) -> int | None:
    """Returns the step with the best value of a metric, the newest of equal ones.

    Values that are not finite are ignored; None if there are no others.
    """
    sign = -1 if lower_is_better(metric) else 1
    judged = [(sign * value, step) for step, value in values.items() if math.isfinite(value)]
    return max(judged, default=(0.0, None))[1]
