# SPDX-License-Identifier: Apache-2.0
"""Finds the process that the others wait for.

A step is as fast as its slowest process, and step times do not show which one that is, since all
processes wait in the same collectives. Only the wait for data differs between them.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax

from vit_jax.runtime.processes import gather_over_processes

# A straggler waits for its data this many times as long as the median of the others, and longer by
# this share of all time. The ratio alone would report negligible waits, and the difference alone a
# dataset that is slow for all processes.
_TIMES, _SHARE = 1.5, 0.1
# Comparisons after which the same process is reported again.
PAUSE = 20


@dataclasses.dataclass(frozen=True)
class Straggler:
    """A process that waits for its data for a larger share of the time than the others' median."""

    process: int
    wait: float
    others: float


def find_straggler(waits: Sequence[float]) -> Straggler | None:
    """The process that clearly waits most for data, by each one's share of its time; else None."""
    if len(waits) < 2:
        return None
    process = max(range(len(waits)), key=lambda i: waits[i])
    others = statistics.median(w for i, w in enumerate(waits) if i != process)
    wait = waits[process]
    slow = wait > _TIMES * others and wait - others > _SHARE
    return Straggler(process, wait, others) if slow else None


class Stragglers:
    """Compares the data waits of the processes.

    `seconds` returns the seconds that the main thread has spent so far, by phase.
    """

    def __init__(self, seconds: Callable[[], Mapping[str, float]]):
        self._count, self._silent = jax.process_count(), dict[int, int]()
        self._seconds, self._before = seconds, None

    def compare(self) -> Straggler | None:
        """The straggler since the last call. All processes have to call it at the same step.

        Returns:
          None up to the second call, since the first interval includes compilation, and for a
          process that was reported less than `PAUSE` calls before.
        """
        if self._count == 1:
            return None
        before, self._before = self._before, self._seconds()
        share = 0.0
        if before is not None:
            spent = {phase: value - before[phase] for phase, value in self._before.items()}
            share = spent["data_wait"] / max(sum(spent.values()), 1e-9)
        found = find_straggler(gather_over_processes(share)[:, 0].tolist())
        self._silent = {process: left - 1 for process, left in self._silent.items() if left > 1}
        if found is None or found.process in self._silent:
            return None
        self._silent[found.process] = PAUSE
        return found
