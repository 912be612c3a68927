# SPDX-License-Identifier: Apache-2.0
"""Signals that are acted on at once, whatever the main thread does."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from vit_jax.utils.streams import print_line, settle_streams

# Exit code after Ctrl-C, as in shells.
INTERRUPTED = 130
# Exit code that asks launchers to run the job again: EX_TEMPFAIL of sysexits.h.
RUN_AGAIN = 75


def end_at_interrupt() -> None:
    """Makes Ctrl-C end the process with one line, until `ending_at_second_interrupt`.

    While modules are imported, libraries swallow the exception or turn it into another.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_start)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Makes Ctrl-C end the process with one line while modules that take seconds are imported."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or not _in_main_thread():
        yield
        return
    end_at_interrupt()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end_at_start(*_: object) -> None:
    end_now("interrupted at the start, before anything was done", INTERRUPTED)


@contextlib.contextmanager
def listening(hear: Callable[[int], None]) -> Iterator[None]:
    """Calls `hear` with each signal that comes and has a handler in Python, from another thread.

    A handler itself waits until the main thread runs Python code, which a compilation does not.
    Nothing is heard outside of the main thread.
    """
    if not _in_main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        while number := os.read(reader, 1):
            hear(number[0])
        os.close(reader)

    threading.Thread(target=listen, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)  # Ends the thread.


@contextlib.contextmanager
def ending_at_second_interrupt() -> Iterator[None]:
    """Ends the process at the second Ctrl-C; the first one is `KeyboardInterrupt` as ever."""
    count = 0
    if signal.getsignal(signal.SIGINT) is _end_at_start:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def hear(number: int) -> None:
        nonlocal count
        # A server, or a run, that handles it itself knows what to do.
        if number == signal.SIGINT and signal.getsignal(number) is signal.default_int_handler:
            count += 1
            if count > 1:
                end_now("a second Ctrl-C: ends at once", INTERRUPTED)

    with listening(hear):
        yield


def end_now(text: str, code: int) -> NoReturn:
    """Prints a line to stderr and ends the process, from any thread."""
    print_line(text, sys.stderr)
    with contextlib.suppress(AttributeError, OSError, ValueError):  # There may be no stdout.
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h")  # A progress bar has hidden the cursor.
    settle_streams()
    os._exit(code)
