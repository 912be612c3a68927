# SPDX-License-Identifier: Apache-2.0
"""Class names by label: their spelling, and text files that hold one a line."""

import codecs
import functools
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_jax.utils.bounds import read_bytes
from vit_jax.utils.errors import UserError
from vit_jax.utils.text import printable

# What `str.splitlines` takes for the end of a line.
_LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"

# Characters of a name: a longer one is no name but another kind of file.
MAX_TEXT = 1000

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=2**16)
def normalize_name(name: str) -> str:
    """Returns a name in Unicode form NFC, as file systems differ in how they store an accent.

    Characters that a terminal or a file in UTF-8 does not take are escaped; see `printable`. Line
    breaks stay, to be refused.
    """
    return printable(unicodedata.normalize("NFC", name), keep=_LINE_BREAKS)


def check_names(names: Any, where: str) -> tuple[str, ...] | None:
    """Returns class names that were read as JSON; None if there are none.

    Raises:
      UserError: they are no list of texts; the message starts with `where`.
    """
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: class_names={str(names)[:80]}: expected a list of texts")
    return tuple(map(normalize_name, names))


def format_names(names: Sequence[str]) -> str:
    """Returns the text of a file with a class name a line."""
    return "".join(f"{name}\n" for name in names)


def read_names(path: Path, *, key: str, what: str = "class name") -> tuple[str, ...]:
    """Reads a file as `read_lines` does; returns its lines as `normalize_name` writes them."""
    return tuple(map(normalize_name, read_lines(path, key=key, what=what)))


def read_lines(path: Path, *, key: str, what: str) -> list[str]:
    """Reads a file with a class name (or other text) a line, in UTF-8 or, with its mark, UTF-16.

    Lines may end as on any system, the last one need not end, and empty lines at the end are left
    out. A file in neither encoding is read as Windows-1252, which extends Latin-1, and that is
    logged.

    Args:
      path: of the file.
      key: names the file in errors, such as "--labels=names.txt".
      what: what a line holds, for errors.

    Returns:
      The lines as they are; none of an empty file.

    Raises:
      UserError: the file can't be read, is no text, or has an empty line between names.
    """
    try:
        content = read_bytes(path)
    except OSError as e:
        raise UserError(f"{key} can't be read: {e.strerror or e}") from None
    lines = _decode(content, key).splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.strip() or "\0" in line or len(line) > MAX_TEXT:
            found = f"no text of at most {MAX_TEXT:,} characters" if line.strip() else "empty"
            raise UserError(f"{key}: line {number} is {found}: expected a {what} a line")
    return lines


def _decode(content: bytes, key: str) -> str:
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        logger.info("%s is not in UTF-8: its names are read as Windows-1252 (Latin-1)", key)
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError:
        return content.decode("latin-1")
