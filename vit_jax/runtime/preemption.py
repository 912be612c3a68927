# SPDX-License-Identifier: Apache-2.0
"""SIGTERM means: save and go. All processes of a job stop after the same step.

Schedulers and clouds send it before they take machines away, to one process or to all.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

# EX_TEMPFAIL of sysexits.h: launchers take it for "run me again".
RUN_AGAIN = 75


class Preempted(Exception):
    """The job was asked to stop."""


class PreemptionGuard:
    """Takes SIGTERM while it is entered, in the main thread; a context manager.

    The first one is remembered until the program asks, or ends the process with exit code 75 while
    there is nothing to save yet; a second one ends it at once. Both work whatever the main thread
    does, be it within a compilation.
    """

    def __init__(self) -> None:
        self._told = False
        self._has_progress = False
        self._vote: jax.Array | None = None

    def __enter__(self) -> "PreemptionGuard":
        global _entered
        _entered = self
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            # The interpreter writes the number of a signal to the pipe as it comes; a handler in
            # Python would have to wait for the main thread.
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
            self._old_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        global _entered
        _entered = None
        if self._active:
            signal.set_wakeup_fd(self._old_fd)
            signal.signal(signal.SIGTERM, self._old_handler)
            os.close(self._writer)  # Which ends the thread.

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):
            if number[0] != signal.SIGTERM:
                continue
            if self._told:
                _end("a second SIGTERM: ends at once", 128 + signal.SIGTERM)
            if not self._has_progress:
                _end("SIGTERM before the first step: there is nothing to save", RUN_AGAIN)
            self._told = True
            _print("SIGTERM: saves after this step, then stops; a second one ends it at once")
        os.close(self._reader)

    def has_progress(self) -> None:
        """Says that from now on there is something to save."""
        self._has_progress = True

    def should_stop(self) -> bool:
        """Whether any process of the job was told to stop.

        With several processes the answer is that to the question before, so that nobody waits for
        it, and the same in all of them. All have to ask, equally often.
        """
        if jax.process_count() == 1:
            return self._told
        before, self._vote = self._vote, _count_votes(self._told)
        return before is not None and bool(before)


_entered: PreemptionGuard | None = None


def interruptible(items: Iterable[T]) -> Iterator[T]:
    """The items, for a long loop that all processes go through alike.

    Raises:
      Preempted: the job was told to stop.
    """
    for item in items:
        if _entered is not None and _entered.should_stop():
            raise Preempted
        yield item


def _count_votes(told: bool) -> jax.Array:
    mesh = Mesh(np.array(jax.devices()), "all")
    mine = np.full(jax.local_device_count(), told)
    votes = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("all")), mine)
    return jax.jit(_any, out_shardings=NamedSharding(mesh, PartitionSpec()))(votes)


def _any(votes: jax.Array) -> jax.Array:
    return votes.any()


def _print(text: str) -> None:
    print(f"vit_jax: {text}", file=sys.stderr, flush=True)


def _end(text: str, code: int) -> None:
    _print(text)
    sys.stdout.flush()
    os._exit(code)
