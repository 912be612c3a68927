# SPDX-License-Identifier: Apache-2.0
"""Handles SIGTERM and Ctrl-C: the run saves and ends, all processes of a job after the same step.

Schedulers and clouds send SIGTERM before they take machines away, to one process or to all.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.utils.signals import RUN_AGAIN, end_now, listening
from vit_jax.utils.streams import print_line

T = TypeVar("T")


class Preempted(Exception):
    """The job received SIGTERM."""


class Interrupted(Preempted):
    """The job received Ctrl-C (SIGINT)."""


class PreemptionGuard:
    """Handles SIGTERM and Ctrl-C within its context, which the main thread enters.

    The first one sets `should_stop`. While there is nothing to save, SIGTERM ends the process with
    exit code 75, and Ctrl-C is a `KeyboardInterrupt`. A second one ends the process immediately.
    All but `KeyboardInterrupt` works during a compilation too.
    """

    def __init__(self) -> None:
        self._received = self._told = 0
        self._may_save = False
        self._vote: jax.Array | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "PreemptionGuard":
        global _entered
        _entered = self
        if threading.current_thread() is threading.main_thread():
            self._handle(signal.SIGTERM, lambda *_: None)
            # A shell without job control starts what is in the background with Ctrl-C ignored.
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                self._handle(signal.SIGINT, self._interrupt)
            self._stack.enter_context(listening(self._hear))
        return self

    def _handle(self, number: int, handler: Any) -> None:
        self._stack.callback(signal.signal, number, signal.signal(number, handler))

    def __exit__(self, *exc: object) -> None:
        global _entered
        _entered = None
        self._stack.close()

    def _hear(self, number: int) -> None:
        if number not in (signal.SIGTERM, signal.SIGINT):
            return
        name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
        if self._received:
            end_now(f"a second {name}: ends at once", 128 + number)
        if self._may_save:
            report(f"{name}: saves after this step, then stops; a second one ends it at once")
        elif number == signal.SIGTERM:
            end_now("SIGTERM before the first step: there is nothing to save", RUN_AGAIN)
        self._received = number

    def _interrupt(self, *_: object) -> None:
        if not self._may_save:
            raise KeyboardInterrupt

    def allow_saving(self) -> None:
        """Makes a signal wait for a checkpoint, since there is something to save from now on."""
        self._may_save = True

    def should_stop(self) -> bool:
        """Whether any process of the job has received SIGTERM or Ctrl-C.

        With several processes all have to call it equally often. The result is that of the previous
        call, so that no process waits for it, and the same in all of them.
        """
        if jax.process_count() == 1:
            self._told = self._received
        else:
            before, self._vote = self._vote, _share(self._received)
            self._told = 0 if before is None else int(before)
        return bool(self._told)

    def stopped(self, text: str) -> Preempted:
        """The error to raise after `should_stop`, by the signal that came."""
        return (Interrupted if self._told == signal.SIGINT else Preempted)(text)


_entered: PreemptionGuard | None = None


def interruptible(items: Iterable[T]) -> Iterator[T]:
    """Yields the items of a loop that all processes run alike; raises `Preempted` on a signal."""
    for item in items:
        if _entered is not None and _entered.should_stop():
            raise Preempted
        yield item


def _share(received: int) -> jax.Array:
    """The highest number of a signal that a process has received, int32 `[]`; 0 for none."""
    mesh = Mesh(np.array(jax.devices()), "all")
    mine = np.full(jax.local_device_count(), received, np.int32)
    votes = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("all")), mine)
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))(votes)


def report(text: str) -> None:
    """Prints a line to stderr, from any thread."""
    print_line(text, sys.stderr)


def end_to_run_again(before: Callable[[], None], *, timeout: float) -> NoReturn:
    """Ends the process with `RUN_AGAIN`, from any thread, at most `timeout` seconds from now.

    `before` is called first; it may hang, for example in a file system.
    """
    thread = threading.Thread(target=before, daemon=True)
    thread.start()
    thread.join(timeout)
    os._exit(RUN_AGAIN)
