# SPDX-License-Identifier: Apache-2.0
"""Counts records whose image can't be read, and raises an error if they are too many."""

import dataclasses
import logging
import threading

from vit_jax.utils.errors import UserError

MAX_CORRUPT = 0.001

# So many are always allowed: one of the first twenty does not predict the rate.
GRACE = 10

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
    """Counts from many threads, and logs each corrupt record once."""

    def __init__(self):
        self._lock = threading.Lock()
        self._named: set[str] = set()
        self.counts = Counts()

    def see(self, count: int) -> None:
        """Counts examples."""
        with self._lock:
            self.counts = dataclasses.replace(self.counts, seen=self.counts.seen + count)

    def add(self, record: str, reason: Exception) -> None:
        """Counts a record that can't be read, and logs it if it is new."""
        with self._lock:
            self.counts = dataclasses.replace(self.counts, corrupt=self.counts.corrupt + 1)
            new = record not in self._named
            self._named.add(record)
        if new:
            logger.warning("corrupt: %s: %s", record, reason)

    def lose(self) -> None:
        """Counts an example for which no record could be read."""
        with self._lock:
            self.counts = dataclasses.replace(self.counts, lost=self.counts.lost + 1)


def check_counts(counts: Counts, max_fraction: float) -> None:
    """Checks the sums over all processes, so that all of them stop or none.

    Raises `UserError` if an example is lost, or if more than `max_fraction` of the examples seen
    are corrupt. Up to `GRACE` are always allowed, unless `max_fraction` is 0.
    """
    met = f"{counts.corrupt:,} records of {counts.seen:,} examples have images that can't be read"
    if counts.lost:
        raise UserError(f"{met}, and nor have those after them; the lines 'corrupt: ...' name them")
    if counts.corrupt > max(max_fraction * counts.seen, GRACE if max_fraction else 0):
        raise UserError(
            f"{met}, and data.max_corrupt={max_fraction} allows no more; the lines 'corrupt: ...' "
            "name them"
        )
