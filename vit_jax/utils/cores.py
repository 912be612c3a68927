# SPDX-License-Identifier: Apache-2.0
"""Counts the cores of the machine."""

import os


def count_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
