# SPDX-License-Identifier: Apache-2.0
"""Large files of which parts are read, on disks and in buckets."""

import abc
import collections
import errno
import io
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

from vit_jax.utils.bounds import MAX_WEIGHTS, open_regular
from vit_jax.utils.buckets import EXPECTED, SCHEMES, Bucket, split_url
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import find_paths

# Files that stay open; others are opened for each read.
_OPEN = 512
# Bytes of what is read ahead of its use, and of the parts in which a whole object is read.
_AHEAD, _PART = 2**30, 2**23
# Seconds that reads from a bucket are tried for, beyond the retries of each request: no image is
# replaced by another one because of a network that is away for a while.
_PATIENCE_S, _WAITS = 300.0, (1.0, 2.0, 4.0, 8.0)
# What is taken for the size of an object.
_WHOLE = 2**17
# The number of a file, and the places where a part of it starts and stops.
_Part = tuple[int, int, int | None]
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Ranges(abc.ABC):
    """Files by number. Reading is safe from many threads; all methods raise `OSError`.

    Attributes:
      paths: or URLs of the files.
      reads_ahead: whether `ahead` does something.
    """

    paths: Sequence[str]
    reads_ahead = False

    @abc.abstractmethod
    def read(self, number: int, start: int, stop: int) -> bytes:
        """The bytes of a file from `start` to `stop`; fewer if it ends before."""

    def ahead(self, number: int, start: int, stop: int) -> None:  # noqa: B027
        """Starts to read what `read` will be called for with the same arguments."""

    def read_through(self, number: int, start: int, stop: int) -> None:  # noqa: B027
        """Reads a part of a file once, so that the system has it in memory; on disks only."""

    @abc.abstractmethod
    def stamp(self, number: int) -> str:
        """A text that changes with the content of a file."""

    @abc.abstractmethod
    def open(self, number: int) -> BinaryIO:
        """Opens a file to read it from its start on; it can be positioned."""


class LocalRanges(Ranges):
    """Files on a disk or a mounted one."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, number: int, start: int, stop: int) -> bytes:
        file = self._files.get(number)
        kept = file is not None
        if file is None:
            file = open_regular(self.paths[number], max_bytes=MAX_WEIGHTS)
            with self._lock:
                kept = number not in self._files and len(self._files) < _OPEN
                if kept:
                    self._files[number] = file
        try:
            content = os.pread(file, stop - start, start)
            # One call may return only a part of what is on a network.
            while len(content) < stop - start and (
                more := os.pread(file, stop - start - len(content), start + len(content))
            ):
                content += more
            return content
        finally:
            if not kept:
                os.close(file)

    def read_through(self, number: int, start: int, stop: int) -> None:
        for place in range(start, stop, _PART):
            self.read(number, place, min(place + _PART, stop))

    def stamp(self, number: int) -> str:
        status = os.stat(self.paths[number])
        return f"{status.st_size} bytes of {status.st_mtime_ns}"

    def open(self, number: int) -> BinaryIO:
        return open(open_regular(self.paths[number], max_bytes=MAX_WEIGHTS), "rb")

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


class BucketRanges(Ranges):
    """Objects by their URLs, `gs://` or `s3://`."""

    reads_ahead = True

    def __init__(self, paths: Sequence[str]):
        self.paths = paths
        self._roots: dict[tuple[str, str], Bucket] = {}
        self._lock = threading.Lock()
        # The futures of reads that were started, and how often each will be used.
        self._started: collections.OrderedDict[_Part, list[Any]] = collections.OrderedDict()
        self._size = 0

    def _find(self, number: int) -> tuple[Bucket, str]:
        """The bucket and the name of an object."""
        scheme, bucket, name = split_url(path := self.paths[number])
        if (root := self._roots.get((scheme, bucket))) is None:
            root = self._roots.setdefault((scheme, bucket), Bucket(path, whole=True))
        return root, name

    def read(self, number: int, start: int, stop: int | None, *, patient: bool = True) -> bytes:
        """As in `Ranges`, or up to the end; `patient` is whether failures are tried again."""
        future, key = None, (number, start, stop)
        with self._lock:
            if (entry := self._started.get(key)) is not None:
                future = entry[0]
                entry[1] -= 1
                if not entry[1]:
                    self._drop(key)
        if future is not None:
            try:
                result = future.result()
                if result.state == "value":
                    return result.value
            except Exception:  # The read below reports what is wrong.
                logger.debug("a read ahead of %s failed", self.paths[number], exc_info=True)
        bucket, name = self._find(number)
        if not patient:
            return bucket.read_range(name, start, stop)
        return be_patient(lambda: bucket.read_range(name, start, stop))

    def read_tail(self, number: int, size: int) -> bytes:
        """The last `size` bytes of an object, or all of one that has fewer."""
        bucket, name = self._find(number)
        return be_patient(lambda: bucket.read_tail(name, size))

    def ahead(self, number: int, start: int, stop: int | None) -> None:
        bucket, name = self._find(number)
        key = number, start, stop
        with self._lock:
            if (entry := self._started.get(key)) is not None:
                entry[1] += 1
                return
            try:
                future = bucket.start_read(name, start, stop)
            except OSError:  # The bucket can't be opened: `read` reports it.
                return
            self._started[key] = [future, 1]
            self._size += _size_of(key)
            # Reads that were started for a loader that has ended are never used.
            while self._size > _AHEAD and len(self._started) > 1:
                self._drop(next(iter(self._started)))

    def _drop(self, key: _Part) -> None:
        del self._started[key]
        self._size -= _size_of(key)

    def stamp(self, number: int) -> str:
        bucket, name = self._find(number)
        return bucket.generation(name).hex()

    def open(self, number: int) -> BinaryIO:
        return io.BufferedReader(_Stream(*self._find(number)), buffer_size=2**16)


def _size_of(part: _Part) -> int:
    _, start, stop = part
    return _WHOLE if stop is None else stop - start


def be_patient(work: Callable[[], T]) -> T:
    """Returns the result of a request; waits and tries again where that may help."""
    begun = time.monotonic()
    for wait in itertools.chain(_WAITS, itertools.repeat(_WAITS[-1])):
        try:
            return work()
        except FileNotFoundError:
            raise
        except OSError as e:
            left = begun + _PATIENCE_S - time.monotonic()
            if e.errno == errno.EACCES or left < wait:
                raise
            logger.warning("%s; it is tried again, for %.0f s more", e.strerror, left)
            time.sleep(wait)
    raise AssertionError


class _Stream(io.RawIOBase):
    """An object, which is read in large parts; while one is used, the next one is read."""

    def __init__(self, bucket: Bucket, name: str):
        self._bucket, self._name = bucket, name
        self._pool = ThreadPoolExecutor(1)
        self._place = 0
        self._parts: dict[int, Future[bytes]] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            raise io.UnsupportedOperation("the size of an object is not known")
        self._place = offset + (self._place if whence == os.SEEK_CUR else 0)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        part, within = divmod(self._place, _PART)
        for number in (part, part + 1):
            if number not in self._parts:
                self._parts[number] = self._pool.submit(self._fetch, number)
        self._parts = {n: future for n, future in self._parts.items() if abs(n - part) < 2}
        content = self._parts[part].result()[within : within + len(buffer)]
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def _fetch(self, number: int) -> bytes:
        start = number * _PART
        return be_patient(lambda: self._bucket.read_range(self._name, start, start + _PART))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()


def open_ranges(paths: Sequence[str]) -> Ranges:
    """Files that are all on disks, or all in buckets."""
    return BucketRanges(paths) if paths[0].startswith(SCHEMES) else LocalRanges(paths)


def is_remote(path: str) -> bool:
    """Whether a path is that of an object in a bucket."""
    return path.startswith(SCHEMES)


def find_files(pattern: str, *, ending: str) -> list[str]:
    """The sorted paths or URLs that match a pattern, or that have an ending and are in a folder.

    In a bucket, a pattern without `*`, `?` or `[` that has the ending is not looked for. Raises
    `OSError` if the bucket can't be listed, `UserError` if the URL is of another form.
    """
    if not is_remote(pattern):
        if os.path.isdir(pattern):
            pattern = os.path.join(pattern, "**", f"*{ending}")
        return find_paths(pattern)
    given, special = pattern, re.search(r"[*?\[]", pattern)
    if special is None and pattern.endswith(ending):
        return [pattern]
    if special is None:
        pattern = f"{pattern.rstrip('/')}/**/*{ending}"
    try:
        scheme, name, path = split_url(pattern)
    except UserError:
        raise UserError(f"{given!r}: expected {EXPECTED}") from None
    root = Bucket(pattern, whole=True)
    start = re.split(r"[*?\[]", path)[0]
    wanted = re.compile(translate_pattern(path))
    return [f"{scheme}://{name}/{n}" for n in root.list(start) if wanted.fullmatch(n)]


def translate_pattern(pattern: str) -> str:
    """The regular expression of a pattern of a shell, in which `**` is any number of folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\])", pattern)
    meant = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        meant.get(part) or (part if re.fullmatch(r"\[[^]]+\]", part) else re.escape(part))
        for part in parts
    )
