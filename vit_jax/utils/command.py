# SPDX-License-Identifier: Apache-2.0
"""Parses the arguments of commands, reports bad input and sets exit codes."""

import argparse
import contextlib
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import absl.logging

from vit_jax.utils.buckets import is_url
from vit_jax.utils.errors import UserError
from vit_jax.utils.mirrors import find_folder
from vit_jax.utils.signals import INTERRUPTED, ending_at_second_interrupt
from vit_jax.utils.streams import print_line, settle_streams
from vit_jax.utils.suggestions import find_near, suggest_flag

# Characters of an error that are printed at most.
_MAX_ERROR = 4000


class CommandParser(argparse.ArgumentParser):
    """Parses the arguments of a command, and prints its help without wrapping its examples.

    The program is `prog`, or `vit_jax COMMAND` if the command was given in that way.

    Raises:
      UserError: the arguments are wrong; see `report_errors`.
    """

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        typed = sys.argv[0] if sys.argv else ""
        if typed.startswith("vit_jax ") and str(options.get("prog")).startswith("python -m "):
            options["prog"] = typed
        super().__init__(allow_abbrev=False, add_help=False, **options)
        self.add_argument("-h", "--help", action="help", help="Print this help and exit.")

    def add_parts(self) -> None:
        """Adds `--parts`, whose modules the files that the command reads may name."""
        self.add_argument(
            "--parts",
            default="",
            metavar="MODULES",
            help="Import these modules from outside of vit_jax, such as my_models,my_ops, which "
            "the files of the model may name.",
        )

    def require_workdir(self, given: object) -> None:
        """Raises `UserError` if the argument of `add_workdir` is not given."""
        if not given:
            self.error("the following arguments are required: WORKDIR (or --workdir=WORKDIR)")

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]: it is overloaded
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """As in argparse; an unknown option comes before arguments that are missing."""
        given = sys.argv[1:] if args is None else list(args)
        if self._subparsers is not None:  # Each of them knows its own.
            return super().parse_known_args(args, namespace)
        options = itertools.takewhile(lambda argument: argument != "--", given)
        unknown = [argument for argument in options if self._is_unknown(argument)]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return super().parse_known_args(args, namespace)

    def _is_unknown(self, argument: str) -> bool:
        name = argument.partition("=")[0]
        is_option = name.startswith("--") and " " not in name
        return is_option and name not in self._option_string_actions

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._suggest(message)}; see {self.prog} --help")

    def _suggest(self, message: str) -> str:
        """Returns the argument that is meant by the first unknown one of a message of argparse."""
        unknown = re.match("unrecognized arguments: (--[^ =]+)", message)
        if unknown is None:
            return ""
        near = find_near(unknown[1], self._option_string_actions)
        if near is not None:
            return f"; did you mean {near!r}?"
        return suggest_flag(unknown[1]) if "--config" in self._option_string_actions else ""


class _StoreWorkdir(argparse.Action):
    """Stores a workdir, which may be given in two ways, once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        if before is not None and values not in (None, before):
            parser.error(f"the workdirs {before} and {values}: expected one")
        setattr(namespace, self.dest, before if values is None else values)


def local_path(text: str) -> Path:
    """The path of what a command reads or writes on this machine, as the `type` of an argument.

    Raises:
      argparse.ArgumentTypeError: it is a URL, which would be a folder named `gs:` otherwise.
    """
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a path on this machine")
    return Path(text)


def add_workdir(
    parser: argparse._ActionsContainer,
    help: str,
    *,
    several: bool = False,
    type: Callable[[str], Any] = find_folder,
) -> None:
    """Adds the workdir of a run, to be given as it is or as `--workdir=WORKDIR`.

    Args:
      parser: of the command, or a group of it.
      help: a sentence that begins the help: what the command does with the workdir.
      several: whether there may be several. Then `workdirs` is a list, which may be empty; else
        `workdir` is a path or None.
      type: turns the text into a path.
    """
    own: dict[str, Any] = {"metavar": "WORKDIR", "type": type}
    if several:
        own |= {"dest": "workdirs", "action": "append"}
        parser.add_argument(
            "workdirs",
            nargs="*",
            metavar="WORKDIRS",
            action="extend",
            type=type,
            help=help,
        )
    else:
        own |= {"dest": "workdir", "action": _StoreWorkdir}
        parser.add_argument(
            "workdir",
            nargs="?",
            metavar="WORKDIR",
            action=_StoreWorkdir,
            type=type,
            help=help,
        )
    parser.add_argument("--workdir", help="Give WORKDIR by this option instead.", **own)


def check_positive(args: argparse.Namespace, *names: str, expected: str = "more than 0") -> None:
    """Raises `UserError` unless the arguments that are given are above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name}={value}: expected {expected}")


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Turns a `UserError` into one line and exit code 2, at the outermost level of a command.

    Warnings of libraries by absl are hidden, since users can't act on them.
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
    """Runs a command and exits: with code 2 and one line for bad input, 130 after Ctrl-C.

    A second Ctrl-C ends it at once. Where the output can't be written the code is 1, in silence if
    its reader has closed the pipe.

    Args:
      main: takes the arguments and returns the exit code; None is 0.
      interrupted: text to print after Ctrl-C.
    """
    try:
        with report_errors(), ending_at_second_interrupt():
            code = main(sys.argv[1:])
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        code = 1
    except OSError as e:
        if e.filename is not None or not _is_full(sys.stdout):
            raise
        print_line(f"error: stdout can't be written to ({e.strerror})", sys.stderr)
        code = 1
    except KeyboardInterrupt:
        report_interrupt(interrupted)
        code = INTERRUPTED
    finally:
        settle_streams()
    sys.exit(code)


def report_interrupt(text: str) -> None:
    """Prints a line after Ctrl-C; another Ctrl-C ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print_line(text, sys.stderr)


def _is_full(stream: Any) -> bool:
    """Whether nothing more can be written to a stream, or there is none."""
    if stream is None:
        return True
    try:
        os.write(stream.fileno(), b"\n")
    except (OSError, ValueError):
        return True
    return False


def print_error(error: Exception) -> None:
    """Prints an error in one line to stderr, shortened in the middle."""
    text = " ".join(str(error).split())
    if len(text) > _MAX_ERROR:
        text = f"{text[: _MAX_ERROR // 2]} ... {text[-_MAX_ERROR // 2 :]}"
    print_line(f"error: {text}", sys.stderr)
