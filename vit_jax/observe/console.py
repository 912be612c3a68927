# SPDX-License-Identifier: Apache-2.0
"""The screen. Only process 0 writes to it."""

import logging

import rich.console

console = rich.console.Console(highlight=False)


def set_up(*, quiet: bool) -> None:
    """Sends the package's log messages to the console; `quiet` silences a process."""
    console.quiet = quiet
    logger = logging.getLogger("vit_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [_ConsoleHandler()]


def say(text: str) -> None:
    """Prints a line as it is: no markup, no wrapping of paths."""
    console.print(text, markup=False, soft_wrap=True)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())
