# SPDX-License-Identifier: Apache-2.0
"""How every command parses its arguments, reports bad input and ends."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import absl.logging

from vit_jax.utils.errors import UserError

# Exit code of a command that Ctrl-C has ended, as shells count.
INTERRUPTED = 130


# Characters of an error.
_MAX_ERROR = 4000


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
