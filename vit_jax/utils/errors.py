# SPDX-License-Identifier: Apache-2.0
"""Errors in one line that users can act on."""

import difflib
from collections.abc import Iterable

from vit_jax.utils.text import printable

# Characters of another library's message that are worth showing within a line.
_MAX_CHARS = 400


class UserError(Exception):
    """Bad input. The message is one line: the value, what was expected, and the key to change."""


def describe_error(error: BaseException) -> str:
    """Returns the type and message of an exception as part of one line: `ValueError: ...`."""
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MAX_CHARS])


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or its type if there is no message."""
    line = str(error).strip().partition("\n")[0][:_MAX_CHARS]
    return printable(line) or type(error).__name__


def suggest(name: str, options: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` or the list of options, to append to an error."""
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there is: {', '.join(options)}" if options else ""
