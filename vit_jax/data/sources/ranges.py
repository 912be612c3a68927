# SPDX-License-Identifier: Apache-2.0
"""Large files of which parts are read, by path."""

import abc
import os
import threading
from collections.abc import Sequence
from typing import BinaryIO

from vit_jax.utils.bounds import MAX_WEIGHTS, open_regular

# Files that stay open; others are opened for each read.
_OPEN = 512


class Ranges(abc.ABC):
    """Files by number. Reading is safe from many threads; all methods raise `OSError`."""

    paths: Sequence[str]

    @abc.abstractmethod
    def read(self, number: int, start: int, stop: int) -> bytes:
        """The bytes of a file from `start` to `stop`; fewer if it ends before."""

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

    def stamp(self, number: int) -> str:
        status = os.stat(self.paths[number])
        return f"{status.st_size} bytes of {status.st_mtime_ns}"

    def open(self, number: int) -> BinaryIO:
        return open(open_regular(self.paths[number], max_bytes=MAX_WEIGHTS), "rb")

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)
