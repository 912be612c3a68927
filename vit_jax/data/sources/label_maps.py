# SPDX-License-Identifier: Apache-2.0
"""Masks: images whose values are the classes of pixels, and the text file that names the values."""

import dataclasses
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vit_jax.data.ops.decode import ImageError, check_size
from vit_jax.data.sources.base import IGNORED
from vit_jax.utils.class_names import normalize_name, read_names
from vit_jax.utils.errors import UserError

# The file with a line for each value, and the line for values that are no class.
CLASSES = "classes.txt"
IGNORED_LINE = "ignored"

# Of Pillow: palettes, black and white, and gray of 8 and 16 bits.
_MODES = ("P", "1", "L", "I", "I;16", "I;16B")
_FORMATS = ("PNG", "BMP", "GIF", "TIFF", "PPM")


@dataclasses.dataclass(frozen=True)
class Values:
    """What the values of masks mean.

    Attributes:
      names: of the classes.
      lines: the number of values that have a line in the file.
      table: the class of each value, or `IGNORED`, int16 `[256]`; -1 for a value without meaning.
    """

    names: tuple[str, ...]
    lines: int
    table: np.ndarray

    def find_classes(self, values: np.ndarray) -> np.ndarray:
        """The classes of values, integers `[height, width]`, as uint8 of the same shape.

        Raises `ImageError` for a value without meaning.
        """
        outside = (values < 0) | (values > IGNORED)
        classes = self.table[np.where(outside, 0, values)]
        wrong = outside | (classes < 0)
        if wrong.any():
            raise ImageError(
                f"its mask has the value {values[wrong][0]}: expected 0 to {self.lines - 1}, as "
                f"{CLASSES} has {self.lines} lines, or {IGNORED} for pixels to ignore"
            )
        return classes.astype(np.uint8)


def read_values(folder: str, *, key: str) -> Values:
    """Reads `classes.txt` in a folder: line k + 1 names the class of the value k, or is `ignored`.

    The classes are numbered without the lines `ignored`. 255 is ignored in any case. Raises
    `UserError` if the file is missing or not valid; the message starts with `key`.
    """
    path = os.path.join(folder, CLASSES)
    if not os.path.isfile(path):
        raise UserError(
            f"{key}: there is no file {path}: expected one that names the class of each value in "
            f"the masks, a line for each, from 0; a line '{IGNORED_LINE}' for values to ignore"
        )
    lines = [line.strip() for line in read_names(Path(path), key=f"{key}: {path}")]
    return make_values(lines, where=f"{key}: {path}")


def make_values(lines: list[str], *, where: str) -> Values:
    """The meaning of the values from 0, by the lines of `read_values`."""
    names = tuple(normalize_name(line) for line in lines if line != IGNORED_LINE)
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UserError(f"{where} names {twice[0]!r} twice: expected different names")
    if not names or len(lines) > IGNORED:
        raise UserError(
            f"{where} has {len(lines)} lines and {len(names)} classes: expected 1 to {IGNORED}"
        )
    table = np.full(IGNORED + 1, -1, np.int16)
    table[IGNORED] = IGNORED
    number = 0
    for value, line in enumerate(lines):
        table[value] = IGNORED if line == IGNORED_LINE else number
        number += line != IGNORED_LINE
    return Values(names, len(lines), table)


def decode_mask(encoded: bytes) -> np.ndarray:
    """Decodes a mask to its values, uint8 or int32 `[height, width]`; of a palette, the indices.

    Raises `ImageError` if it can't be read, or has colours.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            check_size(*image.size)
            if image.mode not in _MODES:
                raise ImageError(
                    f"its mask has colours ({image.mode}): expected an image with a palette or in "
                    "gray, whose values are the numbers of classes"
                )
            values = np.asarray(image)
    except ImageError:
        raise
    except Exception as e:  # Pillow raises many kinds of errors for damaged files.
        raise ImageError(f"its mask can't be read: {' '.join(str(e).split())[:200]}") from e
    return values.astype(np.uint8) if values.dtype == bool else values


class Masks:
    """The label map of each row, from the bytes of its mask.

    Args:
      read: gives the bytes of the mask of a row; may raise `ImageError`.
      values: what they mean.
    """

    def __init__(self, read: Callable[[int], bytes], values: Values):
        self._read, self._values = read, values

    def __getitem__(self, row: int) -> np.ndarray:
        try:
            encoded = self._read(row)
        except ImageError as e:
            raise ImageError(f"its mask: {e}") from e
        return self._values.find_classes(decode_mask(encoded))
