# SPDX-License-Identifier: Apache-2.0
"""Names the process that the others wait for.

A step is as fast as its slowest process, and none can tell by its own step time which that is: all
wait in the same collectives. What a process waits for by itself is its data.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

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
    """Compares the waits of this process with those of the others.

    Args:
      seconds: gives the seconds that the main thread has spent so far, by phase.
    """

    def __init__(self, seconds: Callable[[], Mapping[str, float]]):
        self._count, self._silent = jax.process_count(), dict[int, int]()
        self._seconds, self._before = seconds, None

    def compare(self) -> Straggler | None:
        """Who was slower since the last call; all processes have to ask at the same step.

        None up to the second call, as the first time has compilation in it, and for a process that
        was named less than `PAUSE` calls before.
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
