# SPDX-License-Identifier: Apache-2.0
"""Handles SIGTERM: the run saves and ends, and all processes of a job stop after the same step.

Schedulers and clouds send it before they take machines away, to one process or to all.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

# EX_TEMPFAIL of sysexits.h, which asks launchers to run the job again.
RUN_AGAIN = 75


class Preempted(Exception):
    """The job received SIGTERM."""


class PreemptionGuard:
    """Handles SIGTERM within its context, which the main thread enters.

    The first one sets `should_stop` or, while there is nothing to save, ends the process with exit
    code 75; a second one ends the process immediately. Both work during a compilation too.
    """

    def __init__(self) -> None:
        self._received = False
        self._may_save = False
        self._vote: jax.Array | None = None

    def __enter__(self) -> "PreemptionGuard":
        global _entered
        _entered = self
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            # The interpreter writes the number of a signal to the pipe immediately; a handler in
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
            os.close(self._writer)  # Ends the thread.

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):
            if number[0] != signal.SIGTERM:
                continue
            if self._received:
                _end("a second SIGTERM: ends at once", 128 + signal.SIGTERM)
            if not self._may_save:
                _end("SIGTERM before the first step: there is nothing to save", RUN_AGAIN)
            self._received = True
            report("SIGTERM: saves after this step, then stops; a second one ends it at once")
        os.close(self._reader)

    def allow_saving(self) -> None:
        """Makes SIGTERM wait for a checkpoint, since there is something to save from now on."""
        self._may_save = True

    def should_stop(self) -> bool:
        """Whether any process of the job has received SIGTERM.

        With several processes all have to call it equally often. The result is that of the previous
        call, so that no process waits for it, and the same in all of them.
        """
        if jax.process_count() == 1:
            return self._received
        before, self._vote = self._vote, _count_votes(self._received)
        return before is not None and bool(before)


_entered: PreemptionGuard | None = None


def interruptible(items: Iterable[T]) -> Iterator[T]:
    """Yields the items of a loop that all processes run alike; raises `Preempted` after SIGTERM."""
    for item in items:
        if _entered is not None and _entered.should_stop():
            raise Preempted
        yield item


def _count_votes(received: bool) -> jax.Array:
    mesh = Mesh(np.array(jax.devices()), "all")
    mine = np.full(jax.local_device_count(), received)
    votes = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("all")), mine)
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))(votes)


def report(text: str) -> None:
    """Prints a line to stderr, from any thread."""
    print(f"vit_jax: {text}", file=sys.stderr, flush=True)


def end_to_run_again(before: Callable[[], None], *, timeout: float) -> NoReturn:
    """Ends the process with `RUN_AGAIN`, from any thread, at most `timeout` seconds from now.

    `before` is called first; it may hang, for example in a file system.
    """
    thread = threading.Thread(target=before, daemon=True)
    thread.start()
    thread.join(timeout)
    os._exit(RUN_AGAIN)


def _end(text: str, code: int) -> NoReturn:
    report(text)
    sys.stdout.flush()
    os._exit(code)
