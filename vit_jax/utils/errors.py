# SPDX-License-Identifier: Apache-2.0
"""Errors in one line that users can act on."""

import contextlib
from collections.abc import Iterable, Iterator

from vit_jax.utils.text import printable, show_names

# Characters of another library's message that are worth showing within a line.
_MAX_CHARS = 400


class UserError(Exception):
    """Bad input. The message is one line: the value, what was expected, and the key to change."""

    def __str__(self) -> str:
        return show_names(super().__str__())


class UnknownKeyError(UserError):
    """A section of a config has a key that it does not take.

    Attributes:
      message: the error without a suggestion.
      key: dotted, from the top of the config.
      below: the keys within it that lead to the first value, if it is given as a section.
      allowed: keys that the section takes.
    """

    def __init__(
        self,
        message: str,
        *,
        key: str,
        below: tuple[str, ...] = (),
        allowed: Iterable[str],
        suggestion: str,
    ):
        super().__init__(f"{message}{suggestion}")
        self.message, self.key, self.below, self.allowed = message, key, below, tuple(allowed)


def name_key(key: str, value: str, error: UserError) -> UserError:
    """Returns the error with the key and the value that it is about in front.

    A message that starts with the value is not given the value twice.
    """
    return UserError(f"{key}={value!r}: {str(error).removeprefix(f'{value}: ')}")


def describe_error(error: BaseException) -> str:
    """Returns the type and message of an exception as part of one line: `ValueError: ...`."""
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MAX_CHARS])


@contextlib.contextmanager
def name_file(path: str) -> Iterator[None]:
    """Names a file in the errors of a library that reads it, as ValueError, if they don't."""
    try:
        yield
    except Exception as e:
        named = isinstance(e, UserError) or path in str(e)
        if named or (isinstance(e, OSError) and e.strerror):
            raise
        raise ValueError(f"{path}: {first_line(e)}") from e


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or its type if there is no message."""
    line = str(error).strip().partition("\n")[0][:_MAX_CHARS]
    return printable(line) or type(error).__name__
