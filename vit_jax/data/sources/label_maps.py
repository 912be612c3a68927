# SPDX-License-Identifier: Apache-2.0
"""Label maps: masks, with a text file that names their values, and depth images."""

import dataclasses
import io
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from vit_jax.data.ops.decode import MAX_PIXELS, ImageError, check_size
from vit_jax.data.sources.base import IGNORED, NO_DEPTH, DatasetInfo, LabelMaps
from vit_jax.utils.bounds import open_npz, read_text
from vit_jax.utils.class_names import normalize_name, read_names
from vit_jax.utils.errors import UserError, describe_error

# The file with a line for each value, and the line for values that are no class.
CLASSES = "classes.txt"
IGNORED_LINE = "ignored"
# The file with the number that stands for one metre, where depths are integers.
SCALE = "depth_scale.txt"
# Endings of depth images: those of floats, and those that may have integers.
DEPTH_ENDINGS = (".npy", ".npz", ".tif", ".tiff", ".png")

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
            values = _read_values(image, encoded)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"its mask can't be read: {len(encoded)} bytes that are no PNG, BMP, GIF or TIFF image"
        ) from None
    except Exception as e:  # Pillow raises many kinds of errors for damaged files.
        raise ImageError(f"its mask can't be read: {' '.join(str(e).split())[:200]}") from e
    return values.astype(np.uint8) if values.dtype == bool else values


def _read_values(image: Image.Image, encoded: bytes) -> np.ndarray:
    """The values of an image as its file has them, `[height, width]`, in the dtype of Pillow.

    Pillow stretches gray of 2 and 4 bits, and PGM of any maximum, to 8 or 16 bits.
    """
    most = _find_maximum(image, encoded)
    values = np.asarray(image)
    if most is None:
        return values
    stretched = 255 if image.mode == "L" else 2**16 - 1
    return np.rint(values * (most / stretched)).astype(values.dtype)


def _find_maximum(image: Image.Image, encoded: bytes) -> int | None:
    """The value that Pillow reads as the highest one of its mode; None where it changes none."""
    if image.format == "PPM" and image.mode in ("L", "I"):
        arguments = image.tile[0].args  # pyright: ignore[reportAttributeAccessIssue]
        return arguments[-1] if isinstance(arguments, tuple) else None
    if image.mode != "L":
        return None
    bits = 8
    if image.format == "PNG":
        bits = encoded[24]  # Of the chunk IHDR, which is the first one.
    elif image.format == "TIFF":
        (bits, *_) = image.tag_v2.get(258, (8,))  # pyright: ignore[reportAttributeAccessIssue]
    return 2**bits - 1 if bits < 8 else None


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


def read_scale(folder: str, *, key: str) -> float | None:
    """Reads the number that stands for one metre in depth images of integers; None without a file.

    Raises `UserError` if the file is no positive number; the message starts with `key`.
    """
    path = os.path.join(folder, SCALE)
    if not os.path.exists(path):
        return None
    try:
        text = read_text(path).strip()
        scale = float(text)
    except (OSError, ValueError) as e:
        raise UserError(f"{key}: {path} can't be read: {describe_error(e)}") from None
    if not 0 < scale < float("inf"):
        raise UserError(f"{key}: {path} reads {text!r}: expected the number that is one metre")
    return scale


def decode_depth(encoded: bytes, scale: float | None) -> np.ndarray:
    """Decodes a depth image to metres, float32 `[height, width]`; `NO_DEPTH` where not known.

    Args:
      encoded: a PNG or TIFF in gray, or an array of NumPy (`.npy`, or `.npz` with one array).
      scale: what integers are divided by; floats are metres. Values that are not positive or not
        finite are not known.

    Raises:
      ImageError: it can't be read, has another shape, or has integers and there is no scale.
    """
    try:
        values = _read_array(encoded) if encoded.startswith(_ARRAYS) else _read_gray(encoded)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"its depth can't be read: {len(encoded)} bytes that are no PNG or TIFF image, and no "
            "array of NumPy"
        ) from None
    except Exception as e:  # Pillow and NumPy raise many kinds of errors for damaged files.
        raise ImageError(f"its depth can't be read: {' '.join(str(e).split())[:200]}") from e
    return to_metres(values, scale)


def to_metres(values: np.ndarray, scale: float | None) -> np.ndarray:
    """Depths in metres, float32 `[height, width]`, of integers or floats, as `decode_depth`."""
    if values.ndim != 2:
        raise ImageError(f"its depth is of the shape {values.shape}: expected (height, width)")
    if values.dtype.kind in "iu":
        if scale is None:
            raise ImageError(
                f"its depth has integers: expected a file {SCALE} with the number that is one "
                "metre, such as 1000"
            )
        values = values / scale
    elif values.dtype.kind != "f":
        raise ImageError(f"its depth is of {values.dtype}: expected integers or floats")
    with np.errstate(over="ignore", invalid="ignore"):
        depth = values.astype(np.float32)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(NO_DEPTH))


# How the files of NumPy start, the second in a zip archive.
_ARRAYS = (b"\x93NUMPY", b"PK")


def _read_array(encoded: bytes) -> np.ndarray:
    stream = io.BytesIO(encoded)
    if encoded.startswith(b"PK"):
        with open_npz(stream, max_bytes=8 * MAX_PIXELS) as arrays:
            if len(arrays.files) != 1 and "depth" not in arrays.files:
                names = ", ".join(arrays.files) or "none"
                raise ImageError(f"its depth has the arrays {names}: expected one, or one 'depth'")
            values = arrays["depth" if "depth" in arrays.files else arrays.files[0]]
    else:
        version = np.lib.format.read_magic(stream)
        if version[0] not in (1, 2):
            raise ImageError("its depth is of an unknown version of the format .npy")
        header = np.lib.format.read_array_header_1_0
        if version[0] == 2:
            header = np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        # NumPy would reserve the memory that the header claims.
        if stream.tell() + math.prod(shape) * dtype.itemsize != len(encoded):
            raise ImageError(f"its depth claims to be {dtype} {shape} in {len(encoded):,} bytes")
        stream.seek(0)
        values = np.load(stream, allow_pickle=False)
    return values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values


def _read_gray(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded), formats=("PNG", "TIFF")) as image:
        check_size(*image.size)
        if image.mode not in ("L", "F", *_MODES[3:]):
            raise ImageError(
                f"its depth has colours ({image.mode}): expected an image in gray, of 16 bits"
            )
        return _read_values(image, encoded)


class Depths:
    """The depths of the pixels of each row, from the bytes of its depth image.

    Args:
      read: gives these bytes; may raise `ImageError`.
      scale: see `decode_depth`.
    """

    def __init__(self, read: Callable[[int], bytes], scale: float | None):
        self._read, self._scale = read, scale

    def __getitem__(self, row: int) -> np.ndarray:
        try:
            encoded = self._read(row)
        except ImageError as e:
            raise ImageError(f"its depth: {e}") from e
        return decode_depth(encoded, self._scale)


def add_label_maps(
    info: DatasetInfo, kind: str, read: Callable[[int], bytes], folder: str, *, key: str
) -> tuple[DatasetInfo, LabelMaps]:
    """Facts about a dataset with label maps, and these.

    Args:
      info: without them.
      kind: `mask` or `depth`.
      read: gives the bytes of the map of a row.
      folder: of `classes.txt`, or of `depth_scale.txt`.
      key: for errors.
    """
    if kind == "depth":
        return dataclasses.replace(info, pixel_depth=True), Depths(
            read, read_scale(folder, key=key)
        )
    values = read_values(folder, key=key)
    return dataclasses.replace(info, pixel_classes=values.names), Masks(read, values)


def check_scale(paths: Iterable[str], folder: str, *, key: str) -> None:
    """Raises `UserError` if depth images of integers lack their scale.

    PNG files have integers. Of the files of each other kind the first one is read.
    """
    if read_scale(folder, key=key) is not None:
        return
    first: dict[str, str] = {}
    for path in paths:
        first.setdefault(os.path.splitext(path)[1].lower(), path)
    of_integers = [
        path
        for ending, path in first.items()
        if ending == ".png" or _has_integers(os.path.join(folder, path))
    ]
    if of_integers:
        raise UserError(
            f"{key}: {of_integers[0]} has integers, and there is no file "
            f"{os.path.join(folder, SCALE)}: "
            "expected one with the number that is one metre, such as 1000 for millimetres"
        )


def _has_integers(path: str) -> bool:
    """Whether a depth image has integers; not if it can't be read, which `Depths` reports."""
    try:
        encoded = Path(path).read_bytes()
        values = _read_array(encoded) if encoded.startswith(_ARRAYS) else _read_gray(encoded)
    except Exception:  # Pillow and NumPy raise many kinds of errors for damaged files.
        return False
    return values.dtype.kind in "iu"
