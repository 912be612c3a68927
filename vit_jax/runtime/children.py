# SPDX-License-Identifier: Apache-2.0
"""Runs commands in processes that start at once, as forks of a server that has imported them.

The server imports modules once. It has one thread and no devices, so that it can be forked; each
child is a process of its own, which may fail, be killed or hold devices without harm to others.
"""

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from vit_jax.utils.signals import end_at_interrupt

# The system libraries of macOS can't be forked: there a child imports for itself.
_CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
# Signals to the group of this process that must not end the server, which waits for the children.
_HELD = (signal.SIGTERM, signal.SIGHUP)
_FORWARDED = (signal.SIGINT, *_HELD)


def start_server(modules: Sequence[str]) -> None:
    """Starts the server of this process, which imports the modules in the background."""
    if _CONTEXT.get_start_method() == "forkserver":
        _CONTEXT.set_forkserver_preload(list(modules))
        _ensure_server()


def _ensure_server() -> None:
    resource_tracker.ensure_running()  # It changes the mask of signals itself.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)  # The server inherits the mask.
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_child(module: str, arguments: Sequence[str]) -> tuple[int, int | None]:
    """Runs a command in a child, and waits for its end.

    SIGTERM, Ctrl-C and the end of the terminal are passed on.

    Args:
      module: of the command; its function `run` takes the arguments from `sys.argv`.
      arguments: of the command.

    Returns:
      The exit code, negative for a signal that killed the child; and the first signal that was
      passed on, None for none.
    """
    received: list[int] = []
    ready, told = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(module, tuple(arguments), told))
    pid: int | None = None

    def forward(number: int, _: object) -> None:
        received.append(number)
        if pid is not None and process.is_alive():
            os.kill(pid, number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        if _CONTEXT.get_start_method() == "forkserver":
            _ensure_server()
        process.start()
        told.close()
        ready.poll(None)  # Until the child can handle signals, or has ended.
        early = tuple(received)
        pid = process.pid
        for number in early:
            os.kill(process.pid, number)
        process.join()
        code = process.exitcode
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ready.close()
    return code, received[0] if received else None


def _run(module: str, arguments: tuple[str, ...], told: Connection) -> None:
    # In a session of its own: a terminal sends Ctrl-C to all processes of one, and the second that
    # a run receives ends it at once.
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_at_interrupt()
    told.send(None)
    told.close()
    sys.argv = [module, *arguments]
    importlib.import_module(module).run()
