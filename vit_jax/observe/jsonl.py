# SPDX-License-Identifier: Apache-2.0
"""Files of one JSON object a line; half a line that a crash leaves is not read, and cut off."""

import collections
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vit_jax.observe.console import log
from vit_jax.utils.layout import METRICS

# Lines that may wait for space on the disk.
_MAX_WAITING = 10_000


class LineWriter:
    """Appends objects as whole lines, after cutting off half a line that a crash left.

    A full disk or a workdir that can't be written to does not end a run: the error is logged once,
    and lines wait until they can be written.
    """

    def __init__(self, path: Path):
        self._path = path
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=_MAX_WAITING)
        self._failing = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends an object, after those that wait."""
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
    """Cuts off what follows the last newline of a binary file; returns its length in bytes."""
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


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records of a workdir up to the first line that is torn or damaged."""
    records = []
    for record in _read_lines(workdir / METRICS):
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            break
        records.append(record)
    return records


def _read_lines(path: Path) -> Iterator[Any]:
    """Yields the JSON value of each line; None for a line that is not JSON."""
    if path.exists():
        for line in path.read_text(errors="replace").split("\n"):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Appends an object as a separate line, even after half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        torn = file.read() not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the objects that `append_record` wrote, without lines that are torn or damaged."""
    return [record for record in _read_lines(path) if isinstance(record, dict)]
