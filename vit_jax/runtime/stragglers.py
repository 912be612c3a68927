# SPDX-License-Identifier: Apache-2.0
"""Names the process that the others wait for.

A step is as fast as its slowest process, and none can tell by its own step time which that is: all
wait in the same collectives. What a process waits for by itself is its data.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence

import jax

from vit_jax.runtime.processes import gather_over_processes

# Clearly slower: so many times the median of the others, and more by so much of all time. By the
# first alone, waits that cost nothing would count; by the second, a dataset that is slow for all.
_TIMES, _SHARE = 1.5, 0.1
# Comparisons from one naming of a process to the next.
PAUSE = 20


@dataclasses.dataclass(frozen=True)
class Straggler:
    """A process that the others wait for.

    Attributes:
      process: its number.
      wait: share of the time that it waits for its data.
      others: the same of the others, by their median.
    """

    process: int
    wait: float
    others: float


def find_straggler(waits: Sequence[float]) -> Straggler | None:
    """The slowest process, if it is clearly slower than the others; None if there is none.

    Args:
      waits: by process, the share of the same time for which it waited for its data.
    """
    if len(waits) < 2:
        return None
    process = max(range(len(waits)), key=lambda i: waits[i])
    others = statistics.median(w for i, w in enumerate(waits) if i != process)
    wait = waits[process]
    slow = wait > _TIMES * others and wait - others > _SHARE
    return Straggler(process, wait, others) if slow else None


class Stragglers:
    """Measures the waits of this process, and compares them with those of the others."""

    def __init__(self):
        self._count, self._silent = jax.process_count(), dict[int, int]()
        self._since: float | None = None
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def compare(self) -> Straggler | None:
        """Who was slower since the last call; all processes have to ask at the same step.

        None up to the second call, as the first time has compilation in it, and for a process that
        was named less than `PAUSE` calls before.
        """
        if self._count == 1:
            return None
        now = time.perf_counter()
        since, waited = self._since, self._waited
        self._since, self._waited = now, 0.0
        share = 0.0 if since is None else waited / max(now - since, 1e-9)
        found = find_straggler(gather_over_processes(share)[:, 0].tolist())
        self._silent = {process: left - 1 for process, left in self._silent.items() if left > 1}
        if found is None or found.process in self._silent:
            return None
        self._silent[found.process] = PAUSE
        return found
