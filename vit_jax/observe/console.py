# SPDX-License-Identifier: Apache-2.0
"""The screen. Only process 0 writes to it."""

import logging
import os
import sys
import types
from typing import Literal

import rich.console

# `quiet` shows results, warnings and the end; `verbose` all metrics of each logged step.
Verbosity = Literal["quiet", "normal", "verbose"]


console = rich.console.Console(highlight=False)
settings = types.SimpleNamespace(verbosity="normal")


def is_live(screen: rich.console.Console) -> bool:
    """Whether what is shown there can be drawn over: a terminal, and nobody's log."""
    is_terminal = screen.is_terminal and not screen.is_dumb_terminal
    return is_terminal and not os.environ.get("CI") and settings.verbosity == "normal"


def set_up(*, quiet: bool, to_stderr: bool = False, verbosity: Verbosity = "normal") -> None:
    """Sends the package's log messages to the console.

    Args:
      quiet: whether to silence a process, but for warnings.
      to_stderr: whether to write there, and to leave stdout for what a program reads.
      verbosity: of a run.
    """
    settings.verbosity = verbosity
    console.quiet = quiet
    console.stderr = to_stderr
    logger = logging.getLogger("vit_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [_ConsoleHandler()]


def log(text: str) -> None:
    """Prints a line as it is: no markup, no wrapping of paths."""
    console.print(text, markup=False, soft_wrap=True)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # What a quiet process has to warn of is its own, such as a file that only it can't read.
        if console.quiet and record.levelno >= logging.WARNING:
            print(record.getMessage(), file=sys.stderr)
        else:
            log(record.getMessage())
