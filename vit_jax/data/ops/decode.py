# SPDX-License-Identifier: Apache-2.0
"""Encoded images to arrays: OpenCV first, Pillow for what it can't read.

Files may be hostile: sizes are read from headers before memory for pixels is allocated, and a file
that is not a whole image raises `ImageError`.
"""

import contextlib
import io
import struct
import warnings

import cv2
import numpy as np
from PIL import Image, ImageOps

# Limit of the pixels of an image: 400 MB in RGB, of which every thread may hold one. The largest
# photograph of ImageNet has 2**26.
MAX_PIXELS = 2**27

_OPENCV_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# Pillow reads more formats than these, some of them by running other programs.
_PILLOW_FORMATS = (*_OPENCV_FORMATS, "GIF", "TIFF", "PPM", "JPEG2000")

# OpenCV would print several lines for each broken image, besides the `ImageError`.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# JPEG segments with the size (SOF0 to SOF15, without DHT, JPG and DAC), and those without a length.
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE = frozenset((0x01, *range(0xD0, 0xD9)))


class ImageError(ValueError):
    """A record without a readable image. Such records are counted, and replaced or omitted."""


def decode_image(encoded: bytes | np.ndarray, *, orient: bool = False) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP, BMP, GIF (first frame), TIFF, PPM or JPEG 2000 file.

    The content determines the format. Transparency is dropped; of 16 bits, the upper 8 are used.

    Args:
      encoded: bytes of the file, or pixels, which are returned as they are.
      orient: whether to apply the EXIF orientation. Published weights were trained without it.

    Returns:
      uint8 `[height, width, 3]` in RGB.

    Raises:
      ImageError: the image is unreadable, truncated, or larger than `MAX_PIXELS`.
    """
    if isinstance(encoded, np.ndarray):
        return encoded
    kind, size = read_header(encoded)
    if size is not None:
        check_size(*size)
    if _is_cut_off(encoded, kind):
        raise ImageError(f"{len(encoded)} bytes that are no readable image: the end is missing")
    flags = cv2.IMREAD_COLOR_RGB if orient else cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image = None
    # Other formats go to Pillow, which checks their size and handles partial frames of a GIF.
    if kind in _OPENCV_FORMATS:
        with contextlib.suppress(cv2.error):
            image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    return _decode_with_pillow(encoded, orient=orient) if image is None else image


def _is_cut_off(encoded: bytes, kind: str | None) -> bool:
    if kind == "JPEG":
        # OpenCV 4 fills missing pixels with grey. An embedded thumbnail is a whole JPEG, so the end
        # marker must follow the last scan.
        end = b"\xff\xd9"
        return not encoded.endswith(end) and encoded.rfind(end) < encoded.rfind(b"\xff\xda")
    if kind == "PNG":
        # OpenCV allocates the length that a chunk claims.
        at = 8
        while at + 12 <= len(encoded):
            length, name = struct.unpack_from(">I4s", encoded, at)
            at += 12 + length
            if name == b"IEND":
                return at > len(encoded)
        return True
    return False


def check_size(width: int, height: int) -> None:
    """Raises `ImageError` unless an image has 1 to `MAX_PIXELS` pixels."""
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ImageError(
            f"an image of {width}x{height} pixels is no readable image here: expected 1 to "
            f"{MAX_PIXELS:,}"
        )


def _decode_with_pillow(encoded: bytes, *, orient: bool) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as image:
                check_size(*image.size)
                if orient:
                    image = ImageOps.exif_transpose(image)
                return np.array(image.convert("RGB"))
    except (ImageError, MemoryError):
        raise
    # Pillow's decoders raise OSError, SyntaxError, struct.error and others for broken files.
    except Exception as e:
        raise ImageError(f"{len(encoded)} bytes that are no readable image") from e


def read_header(encoded: bytes) -> tuple[str | None, tuple[int, int] | None]:
    """The format and the size, if the header has them; `ImageError` if it ends before the size.

    Returns "JPEG", "PNG", "GIF", "WEBP", "BMP" or None, and (width, height) or None.
    """
    try:
        if encoded.startswith(b"\xff\xd8\xff"):
            return "JPEG", _jpeg_size(encoded)
        if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
            return "PNG", struct.unpack_from(">II", encoded, 16)
        if encoded.startswith((b"GIF87a", b"GIF89a")):
            return "GIF", struct.unpack_from("<HH", encoded, 6)
        if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
            return "WEBP", _webp_size(encoded)
        if encoded.startswith(b"BM"):
            if struct.unpack_from("<I", encoded, 14)[0] == 12:
                return "BMP", struct.unpack_from("<HH", encoded, 18)
            width, height = struct.unpack_from("<ii", encoded, 18)
            return "BMP", (abs(width), abs(height))  # Negative if rows start at the top.
    except (struct.error, IndexError, ValueError):  # It ends before the size, or has none.
        raise ImageError(f"{len(encoded)} bytes that are no readable image") from None
    return None, None


def _jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    at = 2
    while True:
        if encoded[at] != 0xFF:  # Decoders skip bytes between segments too.
            at = encoded.index(b"\xff", at)
        marker = encoded[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _BARE or marker == 0:
            at += 2
        elif marker in _SOF:
            height, width = struct.unpack_from(">HH", encoded, at + 5)
            return width, height
        elif marker in (0xD9, 0xDA):  # Pixels or the end come before a size.
            raise IndexError
        else:
            at += 2 + struct.unpack_from(">H", encoded, at + 2)[0]


def _webp_size(encoded: bytes) -> tuple[int, int] | None:
    chunk = encoded[12:16]
    if chunk == b"VP8X":
        width, height = (int.from_bytes(encoded[i : i + 3], "little") + 1 for i in (24, 27))
        return width, height
    if chunk == b"VP8L":
        bits = struct.unpack_from("<I", encoded, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", encoded, 26)
    return width & 0x3FFF, height & 0x3FFF
