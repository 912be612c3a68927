# SPDX-License-Identifier: Apache-2.0
"""What the names of metrics imply."""

_LOWER_IS_BETTER = ("loss", "ece")


def lower_is_better(metric: str) -> bool:
    """Whether the smaller value of a metric, such as `val/loss`, is the better one."""
    return metric.rpartition("/")[2] in _LOWER_IS_BETTER
