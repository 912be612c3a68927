# SPDX-License-Identifier: Apache-2.0
"""Where records are in an uncompressed ArrayRecord file, so that one can be read in parts.

The reader of `array_record` takes local files alone. Such a file is one of Riegeli: blocks of
64 KiB that start with a header of 24 bytes, within which chunks are stored one after another. A
chunk has a header of 40 bytes, whose last four values are the size of its data, a checksum, its
type with the number of its records, and their size. With `group_size:1,uncompressed`, the data of
each chunk of records (type `r`) is a zero, the length of the length, the length, and the record.
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
"""

import struct
from collections.abc import Callable

_BLOCK, _BLOCK_HEADER = 2**16, 24
_HEADER = struct.Struct("<5Q")
_RECORDS = ord("r")


def find_records(read: Callable[[int, int], bytes], count: int) -> list[tuple[int, int]]:
    """The first byte of the chunk of each of the first `count` records, and its end.

    Args:
      read: returns the bytes of the file between two places.
      count: the number of records.

    Raises:
      ValueError: the file has fewer chunks of one record.
    """
    places, start = [], 0
    while len(places) < count:
        # The header may be interrupted by that of a block.
        header = _without_headers(read(start, start + _HEADER.size + _BLOCK_HEADER), start)
        if len(header) < _HEADER.size:
            raise ValueError(f"{len(places):,} records; expected {count:,}")
        _, size, _, kind, _ = _HEADER.unpack(header[: _HEADER.size])
        stop = _skip(start, _HEADER.size + size)
        if kind == _RECORDS | 1 << 8:
            places.append((start, stop))
        # A chunk has at least as many bytes as records.
        start = max(stop, start + (kind >> 8))
    return places


def unpack(content: bytes, start: int) -> bytes:
    """The record in a chunk, of which `content` are the bytes from place `start` of the file.

    Raises ValueError if they are no chunk of one record.
    """
    plain = _without_headers(content, start)
    if len(plain) < _HEADER.size + 3:
        raise ValueError("its part of the file is too short")
    _, size, _, kind, whole = _HEADER.unpack(plain[: _HEADER.size])
    data = plain[_HEADER.size :]
    if kind != _RECORDS | 1 << 8 or len(data) != size or data[0]:
        raise ValueError("its part of the file is not the one that was packed")
    record = data[2 + data[1] :]
    if len(record) != whole:
        raise ValueError(f"{len(record):,} bytes; expected {whole:,}")
    return record


def _without_headers(content: bytes, start: int) -> bytes:
    """Leaves out what is in headers of blocks; `start` is the place of the content."""
    parts, place = [], 0
    while place < len(content):
        within = (start + place) % _BLOCK
        place += max(_BLOCK_HEADER - within, 0)
        stop = place + _BLOCK - (start + place) % _BLOCK
        parts.append(content[place:stop])
        place = stop
    return b"".join(parts)


def _skip(start: int, size: int) -> int:
    """The end of `size` bytes from a place on, besides headers of blocks."""
    place = start
    while size:
        within = place % _BLOCK
        place += max(_BLOCK_HEADER - within, 0)
        taken = min(size, _BLOCK - place % _BLOCK)
        place, size = place + taken, size - taken
    return place
