# SPDX-License-Identifier: Apache-2.0
"""Errors that a person can act on, in one line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line: the value, what was expected, where to fix it."""


def suggest(name: str, options: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` or the list of what there is, to append to an error."""
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there is: {', '.join(options)}" if options else ""
