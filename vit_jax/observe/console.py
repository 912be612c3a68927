# SPDX-License-Identifier: Apache-2.0
"""Output on the screen, from process 0 only."""

import logging
import os
import sys
import types
from collections.abc import Iterable
from typing import Any, Literal

import rich.console

from vit_jax.utils.streams import Unfailing
from vit_jax.utils.text import printable

# `quiet` shows results, warnings and the summary; `verbose` adds all metrics of each logged step.
Verbosity = Literal["quiet", "normal", "verbose"]


class _Screen(rich.console.Console):
    """A console whose output is lost, with a note, where the screen can't be written to."""

    @property
    def file(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]: never set
        return Unfailing(super().file)


# Texts are printed as they are: rich would read "folder:one:" as the emoji of that name.
console = _Screen(highlight=False, markup=False, emoji=False)
settings = types.SimpleNamespace(verbosity="normal")


def is_live(screen: rich.console.Console) -> bool:
    """Whether a screen is interactive, so that lines can be redrawn, and is not a log of CI."""
    is_terminal = screen.is_terminal and not screen.is_dumb_terminal and not screen.quiet
    return is_terminal and not os.environ.get("CI") and settings.verbosity == "normal"


def set_up(*, quiet: bool, to_stderr: bool = False, verbosity: Verbosity = "normal") -> None:
    """Sends the log messages of the package to the console.

    A quiet process only prints warnings. `to_stderr` leaves stdout to the output of a command.
    """
    settings.verbosity = verbosity
    console.quiet = quiet
    console.stderr = to_stderr
    logger = logging.getLogger("vit_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [_ConsoleHandler()]


def log(text: str) -> None:
    """Prints one line without markup or wrapping; a line break in it becomes an escape."""
    console.print(printable(text), soft_wrap=True)


def log_progress(text: str) -> None:
    """Prints a line as `log` does, unless results alone are wanted."""
    if settings.verbosity != "quiet":
        log(text)


def log_lines(lines: Iterable[str]) -> None:
    """Prints several lines, see `log`."""
    for line in lines:
        log(line)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # A warning of a quiet process concerns it alone, such as a file that only it can't read.
        if console.quiet and record.levelno >= logging.WARNING:
            Unfailing(sys.stderr).write(f"{printable(record.getMessage())}\n")
        else:
            log(record.getMessage())
