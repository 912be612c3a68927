# SPDX-License-Identifier: Apache-2.0
"""Bounds on files that others wrote: of which kind, how large and how deep they may be.

A reader opens such a file by a function of this module, with the largest size that makes sense for
it, before it takes memory or waits: a FIFO or a device is refused at once, and so is a file that
mostly consists of holes, or that would grow when it is decompressed.
"""

import contextlib
import errno
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# Largest sizes in bytes, by kind of file; each is at least ten times what real ones have.
MAX_JSON = 2**25  # A description: a config with the names of 20,000 classes has 2 MB.
MAX_TABLE = 2**30  # Records of a run, or a list of images.
MAX_IMAGE = 2**30  # An encoded image; its pixels are limited on their own.
MAX_LINE = 2**22  # One record of a file of lines.
MAX_WEIGHTS = 2**40  # A file of parameters, or of images without a bound of its own.

_MAX_DEPTH = 64
# Parameters, pixels and labels hardly compress: what grows by this factor does not hold them.
_MAX_RATIO = 20
# Growth up to this size does no harm.
_MIN_BOUND = 2**26
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_growth(stored: int, claimed: int, what: str = "") -> None:
    """Raises ValueError if `stored` bytes of a file would take far more memory: `claimed` bytes.

    This is checked before the memory is allocated. `what` names the file or a part of it.
    """
    if claimed > _MIN_BOUND + _MAX_RATIO * stored:
        raise ValueError(f"{what}{': ' * bool(what)}{stored:,} bytes that would become {claimed:,}")


def check_count(value: object, most: int, what: str, *, least: int = 0) -> int:
    """Returns an integer of a file; raises ValueError unless it is one from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {shorten(value)}; expected an integer, {least} to {most:,}")
    return value


def shorten(value: object) -> str:
    """Returns the start of the `repr` of a value that may be very long."""
    if isinstance(value, int) and abs(value) >= 10**30:  # Its digits take long to compute.
        return f"about 2**{value.bit_length()}"
    text = repr(value[:50] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= 60 else f"{text[:60]}..."


@contextlib.contextmanager
def open_outside(path: str | os.PathLike[str], *, max_bytes: int) -> Iterator[BinaryIO]:
    """Opens a local file that others wrote, to read its bytes.

    Raises:
      OSError: it is missing, or no regular file; it has more than `max_bytes`; or hardly any of
        them are stored. `strerror` says which.
    """
    number = open_regular(path, max_bytes=max_bytes)
    with open(number, "rb") as file:
        yield file


def open_regular(path: str | os.PathLike[str], *, max_bytes: int) -> int:
    """Returns a file descriptor of a regular file; see `open_outside`."""
    # Without O_NONBLOCK, opening a FIFO waits for somebody who writes to it.
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as e:  # Its name has a NUL.
        raise OSError(errno.EINVAL, str(e), os.fspath(path)) from None
    try:
        _check_file(number, os.fspath(path), max_bytes)
    except BaseException:
        os.close(number)
        raise
    return number


def _check_file(number: int, path: str, max_bytes: int) -> None:
    status = os.fstat(number)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"it is {_kind(status.st_mode)}, not a file", path)
    size = status.st_size
    if size > max_bytes:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes; expected {max_bytes:,} at most", path)
    if size > _MIN_BOUND and (stored := _stored(number, status)) * _MAX_RATIO < size - _MIN_BOUND:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, of which {stored:,} are stored", path)


def _stored(number: int, status: os.stat_result) -> int:
    """The bytes of a file without its holes."""
    hole = status.st_size
    with contextlib.suppress(OSError):  # Not all file systems know.
        hole = os.lseek(number, 0, os.SEEK_HOLE)
    os.lseek(number, 0, os.SEEK_SET)
    return status.st_size if hole >= status.st_size else min(status.st_blocks * 512, status.st_size)


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int = MAX_JSON) -> bytes:
    """Returns the content of a local file, or of one on `gs://`; see `open_outside`."""
    if "://" in os.fspath(path):
        from etils import epath

        content = epath.Path(path).read_bytes()
        if len(content) > max_bytes:  # The size of an object costs a request of its own.
            text = f"it has {len(content):,} bytes; expected {max_bytes:,} at most"
            raise OSError(errno.EFBIG, text, os.fspath(path))
        return content
    with open_outside(path, max_bytes=max_bytes) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def read_text(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_JSON, encoding: str = "utf-8"
) -> str:
    """Returns the text of a file; see `open_outside`. UnicodeDecodeError is a ValueError."""
    return read_bytes(path, max_bytes=max_bytes).decode(encoding)


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_JSON) -> Any:
    """Returns the JSON value of a file.

    Raises:
      OSError: see `open_outside`.
      ValueError: it is not JSON, or nested too deeply.
    """
    return parse_json(read_bytes(path, max_bytes=max_bytes))


def parse_json(text: str | bytes) -> Any:
    """Returns a JSON value; raises ValueError, also for one that is nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    """Raises ValueError for a value that functions which call themselves can't walk through."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        parts = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for part in parts for x in part if isinstance(x, dict | list)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def is_inside(name: str) -> bool:
    """Whether a name in a file denotes a file below the folder of that file: no `..`, no root."""
    try:
        os.fsencode(name)
    except UnicodeError:  # Half of a surrogate pair, which is the name of no file.
        return False
    return not {"", ".", ".."} & set(name.split("/")) and "\0" not in name and len(name) < 4096


def check_tree(folder: Path, *, max_files: int = 10**6) -> int:
    """Checks the files below a folder before a library reads it, and returns their bytes together.

    Raises:
      OSError: there is something else than files and folders, a file mostly consists of holes, or
        there are more than `max_files`.
    """
    size, count, todo = 0, 0, [os.fspath(folder)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                count += 1
                if count > max_files:
                    raise OSError(errno.EFBIG, f"it has more than {max_files:,} files", str(folder))
                status = entry.stat()
                if stat.S_ISDIR(status.st_mode):
                    if not (entry.is_symlink() and _leads_back(entry.path, folder)):
                        todo.append(entry.path)
                    continue
                if not stat.S_ISREG(status.st_mode) or status.st_size > _MIN_BOUND:
                    os.close(open_regular(entry.path, max_bytes=MAX_WEIGHTS))
                size += status.st_size
    return size


def _leads_back(link: str, folder: Path) -> bool:
    place, root = os.path.realpath(link), os.path.realpath(folder)
    return os.path.commonpath([place, root]) in (place, root)


@contextlib.contextmanager
def open_npz(file: BinaryIO, *, max_bytes: int | None = None) -> Iterator[Any]:
    """Opens an `.npz` file of which no array takes more memory than its header and size allow.

    Args:
      file: opened by `open_outside`.
      max_bytes: of all arrays together; None for the limit that `check_growth` sets alone.

    Yields:
      the `NpzFile`, whose arrays are read when they are asked for. Pickled ones are refused.

    Raises:
      ValueError, zipfile.BadZipFile: it is damaged, or claims more bytes than it has.
    """
    import numpy as np  # Here, since commands that list configs or weights do without it.

    if not zipfile.is_zipfile(file):  # np.load would report a pickle.
        file.seek(0)
        start = file.read(16)
        size = file.seek(0, os.SEEK_END)
        raise ValueError(f"not a whole zip archive but {size} bytes that start with {start!r}")
    with zipfile.ZipFile(file) as members:
        _check_arrays(members, file.seek(0, os.SEEK_END), max_bytes)
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        yield archive


def _check_arrays(archive: zipfile.ZipFile, size: int, max_bytes: int | None) -> None:
    import numpy as np

    members = archive.infolist()
    whole = sum(info.file_size for info in members)
    check_growth(size, whole)
    if max_bytes is not None and whole > max_bytes:
        raise ValueError(f"its arrays have {whole:,} bytes; expected {max_bytes:,} at most")
    for info in members:
        with archive.open(info) as member:
            major, _ = np.lib.format.read_magic(member)
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            if major not in read:
                raise ValueError(f"{info.filename} is of an unknown version of the format")
            shape, _, dtype = read[major](member)
            if any(not 0 <= n < 2**48 for n in shape):
                raise ValueError(f"{info.filename} has the shape {shape}")
            if dtype.hasobject:  # Such arrays have no size; np.load refuses them.
                continue
            claimed = member.tell() + math.prod(shape) * dtype.itemsize
            if claimed != info.file_size:
                raise ValueError(
                    f"{info.filename} says that it has {claimed:,} bytes; it has {info.file_size:,}"
                )
