# SPDX-License-Identifier: Apache-2.0
"""Counts records that can't be read, or lack a caption, and stops if they are too many."""

import dataclasses
import logging
import math
import threading

from vit_jax.utils.errors import UserError

MAX_CORRUPT = 0.001

# So many are always allowed: one of the first twenty does not predict the rate.
GRACE = 10

# Records that are named; beyond these, a line is logged at each power of ten.
_NAMED = 10

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of examples and records so far.

    Attributes:
      seen: examples, including the rows that pad a last batch.
      corrupt: reads of records that failed; a record that is read twice counts twice.
      lost: examples that are blank because no record could be read for them.
    """

    seen: int = 0
    corrupt: int = 0
    lost: int = 0


class CorruptCounter:
    """Counts from many threads, and logs each of the first corrupt records once.

    Further ones are logged as numbers, since one operation may refuse most images of a dataset.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self.counts = Counts()

    def see(self, count: int) -> None:
        """Counts examples."""
        with self._lock:
            self.counts = dataclasses.replace(self.counts, seen=self.counts.seen + count)

    def add(self, record: str, reason: Exception) -> None:
        """Counts a record that can't be read, and logs it if it is among the first new ones."""
        with self._lock:
            self.counts = dataclasses.replace(self.counts, corrupt=self.counts.corrupt + 1)
            new = record not in self._known
            self._known.add(record)
            known = len(self._known)
        if new and known <= _NAMED:
            logger.warning("corrupt: %s: %s", record, reason)
        elif new and (known == _NAMED + 1 or str(known).strip("0") == "1"):
            logger.warning(
                "corrupt: %s records so far; only the first %d are named", f"{known:,}", _NAMED
            )

    def lose(self) -> None:
        """Counts an example for which no record could be read."""
        with self._lock:
            self.counts = dataclasses.replace(self.counts, lost=self.counts.lost + 1)


def check_counts(counts: Counts, max_fraction: float) -> None:
    """Checks the sums over all processes, so that all of them stop or none.

    Raises `UserError` if an example is lost, or if more than `max_fraction` of the examples seen
    are corrupt. Up to `GRACE` are always allowed, unless `max_fraction` is 0.
    """
    met = f"{counts.corrupt:,} records of {counts.seen:,} examples can't be read"
    lines = "the lines 'corrupt: ...' list the first of them"
    if counts.lost:
        raise UserError(f"{met}, and nor have those after them; {lines}")
    if counts.corrupt > max(max_fraction * counts.seen, GRACE if max_fraction else 0):
        share = min(1.0, math.ceil(counts.corrupt / counts.seen * 200) / 100)  # twice what was met
        raise UserError(
            f"{met}, and data.max_corrupt={max_fraction} allows no more; {lines}; repair or remove "
            f"these files, or add --config.data.max_corrupt={share}"
        )
