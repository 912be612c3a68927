# SPDX-License-Identifier: Apache-2.0
"""Encoded images to arrays: JPEGs by the extension, others by OpenCV, and what is left by Pillow.

Files may be hostile: sizes are read from headers before memory for pixels is allocated, and a file
that is not a whole image raises `ImageError`.
"""

import contextlib
import io
import itertools
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

try:
    from vit_jax.data import _jpeg  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # installed without a compiler, or without libjpeg-turbo
    extension: Any = None
else:
    extension = _jpeg

# Limit of the pixels of an image: 400 MB in RGB, of which every thread may hold one. The largest
# photograph of ImageNet has 2**26.
MAX_PIXELS = 2**27

_OPENCV_FORMATS = ("JPEG", "PNG", "WEBP")
# Pillow reads more formats than these, some of them by running other programs.
_PILLOW_FORMATS = (*_OPENCV_FORMATS, "BMP", "GIF", "TIFF", "PPM", "JPEG2000")

# OpenCV would print several lines for each broken image, besides the `ImageError`.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
# Pillow warns of odd metadata and of large images without the name of the file. A filter for the
# time of one call would be no use, as all threads share the filters.
warnings.filterwarnings("ignore", module=r"PIL\.")

# JPEG segments with the size (SOF0 to SOF15, without DHT, JPG and DAC), and those without a length.
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE = frozenset((0x01, *range(0xD0, 0xD9)))
# A marker, which is neither a byte 0xff of compressed pixels nor a restart within them.
_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
# Segments with a length that an image may have: frames, tables, scans, comments and applications'.
_SEGMENTS = _SOF | {0xC4, 0xCC, *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE}

# Channels and bits of each by the kind of colours in a PNG, and the last of its parts.
_PNG_COLORS = {
    0: (1, (1, 2, 4, 8, 16)),
    2: (3, (8, 16)),
    3: (1, (1, 2, 4, 8)),
    4: (2, (8, 16)),
    6: (4, (8, 16)),
}
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
# First column and row, and steps, of the passes of an interlaced PNG.
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_OPENCV_SIDE = 10**6  # limit of libpng

_ORIENTATION = 274  # of EXIF and TIFF
# From an image that is upright to the one that is stored, by orientation.
_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# From a map of the image as it is stored to one of the upright image, by orientation.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.T,
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].T,
    8: lambda x: np.rot90(x),
}
# BitsPerSample, Photometric, SamplesPerPixel and SampleFormat.
_TIFF_DEPTH, _TIFF_COLORS, _TIFF_CHANNELS, _TIFF_FORMAT = 258, 262, 277, 339


class ImageError(ValueError):
    """A record without a readable image. Such records are counted, and replaced or omitted."""


def decode_image(encoded: bytes | np.ndarray, *, orient: bool = False) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP, BMP, GIF (first frame), TIFF, PPM or JPEG 2000 file.

    The content determines the format. Transparency is dropped; of 16 bits, the upper 8 are used.
    Bytes after the end of the image are ignored, such as the video of a Motion Photo.

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
    if kind == "JPEG" and not has_jpeg_end(encoded):
        raise ImageError(f"{len(encoded)} bytes that are not a readable image: the end is missing")
    if kind == "JPEG" and extension is not None and (known := extension.size(encoded)):
        height, width, turned = known
        if not (turned and orient):
            image, whole = np.empty((height, width, 3), np.uint8), (0, 0, height, width)
            job = (encoded, image, whole, (height, width), whole, False)
            # OpenCV would print what libjpeg warns of, without the name of the file.
            done = extension.decode([job])[0]
            return image if done else _decode_with_pillow(encoded, orient=orient)
    file = _essential_png(encoded, orient=orient) if kind == "PNG" else encoded
    flags = cv2.IMREAD_COLOR_RGB if orient else cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image = None
    # Other formats go to Pillow, which checks their size, handles partial frames of a GIF, and
    # scales colours of 5 and 6 bits in a BMP to 8.
    if kind in _OPENCV_FORMATS and max(size or (0,)) <= _OPENCV_SIDE:
        with contextlib.suppress(cv2.error):
            image = cv2.imdecode(np.frombuffer(file, np.uint8), flags)
    return _decode_with_pillow(file, orient=orient) if image is None else image


def has_jpeg_end(encoded: bytes) -> bool:
    """Whether the first image of a JPEG file is followed by its end marker.

    The bytes after it are not looked at, and neither is a thumbnail within a segment. OpenCV would
    fill the pixels that are missing with grey.
    """
    at = 2
    while match := _MARKER.search(encoded, at):
        marker, at = encoded[match.end() - 1], match.end()
        if marker == 0xD9:
            return True
        if marker in _SEGMENTS and at + 2 <= len(encoded):
            at += struct.unpack_from(">H", encoded, at)[0]
        elif marker != 0x01:  # The pixels break off here, as at the start of another image.
            return False
    return False


def _essential_png(encoded: bytes, *, orient: bool) -> bytearray:
    """A PNG with no more than what determines its pixels, which are not compressed any more.

    libpng would print what is odd or wrong about a file, such as its colour profile or a checksum,
    without the name of the file. The image of an animation that is shown where animations are
    unknown counts as its first.

    Raises `ImageError` if a part that is needed is missing or damaged.
    """
    found: dict[bytes, list[bytes]] = {name: [] for name in (b"IHDR", b"PLTE", b"eXIf", b"IDAT")}
    at, ended = 8, False
    while at + 12 <= len(encoded) and not ended:
        length, name = struct.unpack_from(">I4s", encoded, at)
        part = encoded[at : at + 12 + length]
        at += 12 + length
        if at > len(encoded):
            break
        ended = name == b"IEND"
        whole = zlib.crc32(part[4:-4]) == int.from_bytes(part[-4:], "big")
        if name == b"eXIf" and not (orient and whole and _is_exif(part[8:])):
            continue
        # Beside colours or greys, a palette is a mere suggestion; after pixels, it is too late.
        if name == b"PLTE" and (encoded[25:26] != b"\3" or found[b"IDAT"]):
            continue
        if name == b"IDAT" or (name in found and not found[name]):  # The first counts.
            found[name].append(part)
        elif not ended:
            continue
        if not whole:
            raise _damaged(encoded, name.decode())
    if not ended:
        raise ImageError(f"{len(encoded)} bytes that are not a readable image: the end is missing")
    needed = (b"IHDR", b"IDAT", *([b"PLTE"] if encoded[25:26] == b"\3" else []))
    if absent := [name.decode() for name in needed if not found[name]]:
        # Without its palette, Pillow would make a black image of it.
        raise ImageError(
            f"{len(encoded)} bytes that are not a readable image: {', '.join(absent)} is missing"
        )
    if found[b"PLTE"] and len(found[b"PLTE"][0][8:-4]) not in range(3, 3 * 256 + 1, 3):
        raise _damaged(encoded, "PLTE")
    compressed = b"".join(part[8:-4] for part in found.pop(b"IDAT"))
    png = bytearray().join([encoded[:8], *itertools.chain(*found.values())])
    start = len(png)
    png += b"\0\0\0\0IDAT"
    for part in _store_pixels(encoded, compressed):
        png += part
    struct.pack_into(">I", png, start, len(png) - start - 8)
    png += struct.pack(">I", zlib.crc32(memoryview(png)[start + 4 :]))
    png += _IEND
    return png


def _store_pixels(encoded: bytes, compressed: bytes) -> Iterator[bytes]:
    """Inflates the pixels of a PNG, and wraps them again without compression.

    What follows the last pixel is left out. Raises `ImageError` if pixels are missing or damaged.
    """
    width, height, depth, color, *methods, interlaced = struct.unpack_from(">IIBBBBB", encoded, 16)
    channels, depths = _PNG_COLORS.get(color, (0, ()))
    header = int.from_bytes(encoded[8:12], "big")
    if header != 13 or depth not in depths or any(methods) or interlaced not in (0, 1):
        raise _damaged(encoded, "IHDR")
    inflate, store = zlib.decompressobj(), zlib.compressobj(0)
    # Bytes at a time. The rest of the input is copied each time, so there are fewer times if it
    # is long.
    most = max(len(compressed), 2**20)
    try:
        for x, y, dx, dy in _ADAM7 if interlaced else ((0, 0, 1, 1),):
            columns, rows = -((x - width) // dx), -((y - height) // dy)
            stride = 1 + (columns * channels * depth + 7) // 8
            while columns > 0 and rows > 0:
                size = stride * min(rows, max(most // stride, 1))
                part = inflate.decompress(compressed, size)
                compressed = inflate.unconsumed_tail
                if len(part) < size or max(part[::stride]) > 4:  # Each row starts with its filter.
                    raise _damaged(encoded, "IDAT")
                rows -= size // stride
                yield store.compress(part)
        inflate.decompress(compressed, most)
    except zlib.error:
        raise _damaged(encoded, "IDAT") from None
    if not inflate.eof:  # The checksum is missing.
        raise _damaged(encoded, "IDAT")
    yield store.flush()


def _damaged(encoded: bytes, part: str) -> ImageError:
    return ImageError(f"{len(encoded)} bytes that are not a readable image: {part} is damaged")


def _is_exif(content: bytes) -> bool:
    return content.startswith((b"II*\0", b"MM\0*"))


def orient_map(values: np.ndarray, encoded: bytes | np.ndarray) -> np.ndarray:
    """Turns a map of an image's pixels as `decode_image` with `orient` turns the image.

    Takes `[height, width]` of the image as it is stored, and an image as `decode_image` does, which
    must be readable. Returns a view of the map, or itself.
    """
    if isinstance(encoded, np.ndarray):
        return values
    with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as image:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    return values if turn is None else turn(values)


def check_size(width: int, height: int) -> None:
    """Raises `ImageError` unless an image has 1 to `MAX_PIXELS` pixels."""
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ImageError(
            f"an image of {width}x{height} pixels: expected 1 to {MAX_PIXELS:,} pixels"
        )


def _decode_with_pillow(encoded: bytes | bytearray, *, orient: bool) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as image:
            check_size(*image.size)
            stored = _STORED.get(image.getexif().get(_ORIENTATION, 1))
            if orient:
                ImageOps.exif_transpose(image, in_place=True)
            rgb = to_rgb(image)
            # Pillow turns this format, and no other, while it reads the pixels.
            if stored is not None and not orient and image.format == "TIFF":
                return np.array(Image.fromarray(rgb).transpose(stored))
            return rgb
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as e:  # Far above the limit; the text has the number.
        pixels = int(re.findall(r"\d+", str(e))[0])
        raise ImageError(f"an image of {pixels:,} pixels: expected 1 to {MAX_PIXELS:,}") from e
    # Pillow's decoders raise OSError, SyntaxError, struct.error and others for broken files.
    except Exception as e:
        why = ": HEIC or AVIF, which is to be converted" if encoded[4:8] == b"ftyp" else ""
        if (channels := _count_tiff_channels(encoded)) not in (1, 3):
            why = f": a TIFF file of {channels} channels; expected grey or RGB, perhaps with alpha"
        raise ImageError(f"{len(encoded)} bytes that are not a readable image{why}") from e


def _count_tiff_channels(encoded: bytes | bytearray) -> int:
    """The number that the header of a TIFF file states; 1 for other content."""
    with contextlib.suppress(Exception):
        tags, file = TiffImagePlugin.ImageFileDirectory_v2(bytes(encoded[:8])), io.BytesIO(encoded)
        file.seek(tags.next)
        tags.load(file)
        return int(tags.get(_TIFF_CHANNELS, 1))
    return 1


def to_rgb(image: Image.Image) -> np.ndarray:
    """Converts a Pillow image to uint8 `[height, width, 3]`; of 16 bits, the upper 8 are used.

    Pillow would clip 16 bits to white, and cut fractions off.

    Raises:
      ImageError: nothing states the range of the values: floats, signed and 32-bit integers.
    """
    tags = getattr(image, "tag_v2", {})
    # Pillow scales all PPM files to 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        values = np.asarray(image).astype(np.int32) >> (tags.get(_TIFF_DEPTH, (16,))[0] - 8)
        if tags.get(_TIFF_COLORS) == 0:  # White is zero, which Pillow heeds in 8 bits only.
            values = 255 - values
        return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)
    kinds = {"I": "32-bit or signed integers", "F": "floats"}
    signed = 2 in tags.get(_TIFF_FORMAT, ())
    if image.mode in kinds or signed:
        raise ImageError(
            f"pixels that are {kinds.get(image.mode, 'signed integers')}, of which the range is "
            "not known: expected integers of 8 or 16 bits, without a sign"
        )
    return np.array(image.convert("RGB"))


def read_header(encoded: bytes) -> tuple[str | None, tuple[int, int] | None]:
    """The format and the size, if the header has them; `ImageError` if it ends before the size.

    Returns "JPEG", "PNG", "GIF", "WEBP", "BMP" or None, and (width, height) or None.
    """
    try:
        if encoded.startswith(b"\xff\xd8\xff"):
            return "JPEG", _jpeg_size(encoded)
        if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
            if encoded[12:16] != b"IHDR":  # Apple's variant starts with another part.
                raise ValueError
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
        raise ImageError(f"{len(encoded)} bytes that are not a readable image") from None
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
