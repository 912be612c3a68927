# SPDX-License-Identifier: Apache-2.0
"""Counts records whose image can't be read, and stops a run that meets too many."""

import logging
import threading

from vit_jax.utils.errors import UserError

MAX_CORRUPT = 0.001

# So few may be met at any rate: one of the first twenty says nothing about all.
GRACE = 10

logger = logging.getLogger(__name__)


class CorruptCounter:
    """Counted by many threads; each record is named once in the log.

    Args:
      max_fraction: of the examples seen so far that may be corrupt; None for any number. Up to
        `GRACE` of them are let pass, unless it is 0.
    """

    def __init__(self, max_fraction: float | None = MAX_CORRUPT):
        self._max = max_fraction
        self._lock = threading.Lock()
        self._named: set[str] = set()
        self._seen = 0
        self._count = 0

    @property
    def count(self) -> int:
        """Records met that could not be read; one that is met twice counts twice."""
        return self._count

    def see(self) -> None:
        """Counts an example, whichever record it is made of."""
        with self._lock:
            self._seen += 1

    def add(self, record: str, reason: Exception) -> None:
        """Counts a record that can't be read.

        Raises:
          UserError: they are too many.
        """
        with self._lock:
            self._count += 1
            count, seen = self._count, self._seen
            new = record not in self._named
            self._named.add(record)
        if new:
            logger.warning("corrupt: %s: %s", record, reason)
        if self._max is not None and count > max(self._max * seen, GRACE if self._max else 0):
            raise UserError(
                f"{count} of {seen} examples have images that can't be read, such as {record}; "
                f"data.max_corrupt={self._max} allows no more"
            )
