# SPDX-License-Identifier: Apache-2.0
"""The one clock of the main thread."""

import contextlib
import time
from collections.abc import Iterator

from vit_jax.observe.ledger import KINDS


class Phases:
    """Knows what the main thread does, and for how long it has done each of these things.

    It starts in `compile`; the second step ends that, and the thread is in `step` wherever it is in
    no other phase. Speeds, the ledger, the watchdog and the straggler report all read this clock.
    """

    def __init__(self):
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._phase, self._since = "compile", time.monotonic()
        self._watched = (self._phase, self._since)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measures the block as another phase; the inner one of two counts."""
        before = self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    def step_taken(self) -> None:
        """Ends `compile`, and restarts the time that the watchdog allows for a step."""
        self._switch("step")

    def seconds(self) -> dict[str, float]:
        """The seconds spent in each phase until now."""
        spent = time.monotonic() - self._since
        return self._seconds | {self._phase: self._seconds[self._phase] + spent}

    def watched(self) -> tuple[str, float]:
        """The phase whose limit counts, and when it began (`time.monotonic`); for any thread.

        A wait for data is part of its step.
        """
        return self._watched

    def _switch(self, phase: str) -> str:
        now, before = time.monotonic(), self._phase
        self._seconds[before] += now - self._since
        self._phase, self._since = phase, now
        if "data_wait" not in (phase, before):
            self._watched = (phase, now)
        return before
