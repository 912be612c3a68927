# SPDX-License-Identifier: Apache-2.0
"""Facts that follow from the names of metrics."""

_LOWER_IS_BETTER = ("loss", "ece")


def lower_is_better(metric: str) -> bool:
    """Whether lower values of a metric, such as `val/loss`, are better."""
    return metric.rpartition("/")[2] in _LOWER_IS_BETTER
