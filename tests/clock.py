# SPDX-License-Identifier: Apache-2.0
"""A clock that tests set, and waits for conditions, which a busy machine only makes longer."""

import time
from collections.abc import Callable

# Seconds after which a test counts as hung: far more than a busy machine needs.
LIMIT_S = 600


class Clock:
    """Time that passes only when it is told to; replaces the module `time`."""

    def __init__(self):
        self.now, self.cpu = 1000.0, 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = time = monotonic

    def process_time(self) -> float:
        return self.cpu

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def wait_until(condition: Callable[[], object]) -> None:
    """Waits until a condition is true."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
