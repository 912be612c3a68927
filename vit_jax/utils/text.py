# SPDX-License-Identifier: Apache-2.0
"""The one rule by which names from outside are printed, logged and written.

File names, class names and metadata may hold bytes that are not UTF-8, line breaks and escape
sequences of terminals. Each such character is written as a Python escape, so that one line stays
one line, and text can be encoded. Other characters, in any script, stay as they are.
"""

import html
import re

# Control characters, line separators, marks that reverse the direction of a line, and halves of
# surrogate pairs: Python stores bytes of file names that are not UTF-8 as U+DC80 to U+DCFF.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


# What is printed in place of a text, such as the URL of a bucket for its local copy.
_names: dict[str, str] = {}


def name_in_texts(text: str, name: str) -> None:
    """Makes `printable` and `show_names` write `name` in place of `text` from now on."""
    _names[text] = name


def show_names(text: str) -> str:
    """Returns a text with the names of `name_in_texts`."""
    for one, name in _names.items():
        text = text.replace(one, name)
    return text


def printable(text: object, *, keep: str = "") -> str:
    r"""Returns a text as one line that any terminal and any UTF-8 file takes.

    `"a\nb"` becomes `a\nb` with a backslash, and the byte 0xff in the name of a file `\xff`.

    Args:
      text: anything; `str` is applied to it.
      keep: characters that stay as they are, such as the line breaks of a whole file.
    """
    text = show_names(str(text))
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def describe_size(size: float) -> str:
    """Returns a number of bytes as in `0.3 kB`, `1.5 MiB` or `2.0 GiB`."""
    if size < 2**20:
        return f"{size / 1000:,.1f} kB"
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"


def describe_type(value: object) -> str:
    """Returns the type of a value as in `an int` or `a str`."""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def encode_text(text: str) -> bytes:
    """Returns the UTF-8 bytes of a whole file, of which names may have no UTF-8."""
    return _SURROGATE.sub(lambda found: _escape(found[0]), text).encode()


def escape_html(text: object) -> str:
    """Returns a text for HTML pages: `printable`, with the characters of tags escaped."""
    return html.escape(printable(text))


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # A byte of a file name.
        code -= 0xDC00
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
