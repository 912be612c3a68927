# SPDX-License-Identifier: Apache-2.0
"""Output where it can fail: on a full disk, or with a reader that has closed the pipe.

A log that can't be written ends nothing. A result that can't be written ends its command.
"""

import contextlib
import errno
import os
import sys
from typing import IO, Any

from vit_jax.utils.text import printable


class Unfailing:
    """A text stream whose writes never raise. The first that fails is reported on stderr.

    A closed pipe is not reported: who reads has seen enough.
    """

    _failed = False

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, or as much of it as can be written."""
        try:
            return self._stream.write(text)
        except UnicodeError:  # The caller writes other characters.
            raise
        except (OSError, ValueError) as e:  # ValueError: the stream is closed.
            self._report(e)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as e:
            self._report(e)

    def _report(self, error: Exception) -> None:
        if Unfailing._failed or isinstance(error, BrokenPipeError):
            return
        Unfailing._failed = True
        reason = getattr(error, "strerror", None) or error
        name = str(getattr(self._stream, "name", "output")).strip("<>")
        print_line(f"{name} can't be written to ({reason}): what is logged is lost", sys.stderr)


def result_stream() -> IO[str]:
    """Returns stdout for the result of a command.

    Raises:
      OSError: there is none; `run_command` reports it.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return sys.stdout


def print_result(text: object, *, end: str = "\n") -> None:
    """Prints the result of a command, or a part of it, which may have several lines.

    Raises:
      OSError: it can't be written; `run_command` reports it, and the exit code is 1.
    """
    print(printable(text, keep="\n"), end=end, file=result_stream(), flush=True)


def print_line(text: str, stream: Any) -> None:
    """Prints a line to a stream, from any thread, or nothing where that fails or there is none."""
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            print(f"vit_jax: {printable(text)}", file=stream, flush=True)


def settle_streams() -> None:
    """Gives up what stdout and stderr can't write, which would be an error of Python at its end."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
