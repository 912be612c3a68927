# SPDX-License-Identifier: Apache-2.0
"""The screen. Only process 0 writes to it."""

import argparse
import contextlib
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NoReturn

import absl.logging
import rich.console

from vit_jax.utils.errors import UserError

# `quiet` shows results, warnings and the end; `verbose` all metrics of each logged step.
Verbosity = Literal["quiet", "normal", "verbose"]

# Exit code of a command that Ctrl-C has ended, as shells count.
INTERRUPTED = 130

console = rich.console.Console(highlight=False)
settings = types.SimpleNamespace(verbosity="normal")

# Characters of an error.
_MAX_ERROR = 4000


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


def say(text: str) -> None:
    """Prints a line as it is: no markup, no wrapping of paths."""
    console.print(text, markup=False, soft_wrap=True)


class CommandParser(argparse.ArgumentParser):
    """Arguments of a command, whose help is a text with examples.

    Raises:
      UserError: arguments that do not fit, for `report_errors`.
    """

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Makes of bad input one line and exit code 2; for the outermost level of a command.

    What the libraries warn of is for their authors: errors alone are shown.
    """
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    except UserError as e:
        print_error(e)
        sys.exit(2)


def run_command(
    main: Callable[[Sequence[str]], int | None], *, interrupted: str = "interrupted"
) -> NoReturn:
    """Runs a command as the process that it is: bad input is one line and exit code 2.

    Args:
      main: takes the arguments, and returns the exit code; None is 0.
      interrupted: what to say after Ctrl-C.
    """
    try:
        with report_errors():
            code = main(sys.argv[1:])
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has seen enough; Python would complain of it when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"vit_jax: {interrupted}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(code)


def print_error(error: Exception) -> None:
    """Prints what went wrong in one line, to stderr; what it quotes may be of any length."""
    text = " ".join(str(error).split())
    if len(text) > _MAX_ERROR:
        text = f"{text[: _MAX_ERROR // 2]} ... {text[-_MAX_ERROR // 2 :]}"
    # Arguments that are no UTF-8 hold what can't be printed.
    text = text.encode(errors="backslashreplace").decode()
    print(f"vit_jax: error: {text}", file=sys.stderr)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # What a quiet process has to warn of is its own, such as a file that only it can't read.
        if console.quiet and record.levelno >= logging.WARNING:
            print(record.getMessage(), file=sys.stderr)
        else:
            say(record.getMessage())
