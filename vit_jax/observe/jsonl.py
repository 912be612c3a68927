# SPDX-License-Identifier: Apache-2.0
"""Files of one JSON object a line, that never hold half of one for longer than a crash."""

import collections
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.observe.console import log

# Lines that wait for room on the disk.
_MAX_WAITING = 10_000


class LineWriter:
    """Appends objects as whole lines; what a crash left of a last one is cut off first.

    A disk that is full, or a workdir that can't be written to, ends nothing: it is said once, and
    the lines wait until they can be written.
    """

    def __init__(self, path: Path):
        self._path = path
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=_MAX_WAITING)
        self._failing = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends an object, and those that wait."""
        self._waiting.append(json.dumps(record).encode() + b"\n")
        try:
            self._flush()
        except OSError as e:
            if not self._failing:
                log(f"{self._path} can't be written to ({e.strerror}): goes on, and tries again")
            self._failing = True
            return
        if self._failing:
            log(f"{self._path} is written to again")
            self._failing = False

    def _flush(self) -> None:
        with open(self._path, "a+b", buffering=0) as file:
            end = cut_torn_line(file)
            while self._waiting:
                line = self._waiting[0]
                try:
                    if file.write(line) != len(line):
                        raise OSError(28, "No space left on device")
                except OSError:
                    os.ftruncate(file.fileno(), end)
                    raise
                end += len(line)
                self._waiting.popleft()


def cut_torn_line(file: Any) -> int:
    """Cuts off what follows the last line break of a binary file; returns its length."""
    end = file.seek(0, os.SEEK_END)
    length = end
    while length:
        start = max(0, length - 4096)
        file.seek(start)
        position = file.read(length - start).rfind(b"\n")
        if position >= 0:
            length = start + position + 1
            break
        length = start
    if length != end:
        os.ftruncate(file.fileno(), length)
    file.seek(length)
    return length
