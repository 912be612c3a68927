# SPDX-License-Identifier: Apache-2.0
"""Files of one JSON object a line.

A damaged line is skipped and named, and the others are read; half a line that a crash leaves at the
end is cut off.
"""

import codecs
import collections
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vit_jax.observe.console import log
from vit_jax.utils.bounds import MAX_LINE, MAX_TABLE, open_regular, read_bytes
from vit_jax.utils.layout import METRICS

# Lines that may wait for space on the disk.
_MAX_WAITING = 10_000
# Damaged lines of a file that are listed by their numbers.
_MAX_NAMED = 5


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
                log(f"{self._path} can't be written to ({e.strerror}): continues, and tries again")
            self._failing = True
            return
        if self._failing:
            log(f"{self._path} can be written again")
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
    """Cuts off half a line after the last newline of a binary file; returns its length in bytes.

    A whole object there, whose newline an editor removed, gets its newline back.
    """
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
        file.seek(length)
        if isinstance(_parse(file.read()), dict):
            file.write(b"\n")
            return end + 1
        os.ftruncate(file.fileno(), length)
    file.seek(length)
    return length


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records of a workdir, each with a `step`; damaged lines are named and skipped."""
    return list(iterate_metrics(workdir))


def iterate_metrics(workdir: Path) -> Iterator[dict[str, Any]]:
    """Yields what `read_metrics` returns; a long run has more records than memory should hold."""
    for _, record in _read_lines(workdir / METRICS, _is_metrics):
        yield record


def drop_metrics_after(workdir: Path, step: int) -> None:
    """Cuts the records of steps after `step` off the end of `metrics.jsonl`.

    The file is shortened where it is, which takes no space on the disk; damaged lines before stay.
    An error is logged, and the file stays as it is.
    """
    path = workdir / METRICS
    end = 0
    for stop, record in _read_lines(path, _is_metrics):
        if record["step"] <= step:
            end = stop
    try:
        os.close(open_regular(path, max_bytes=MAX_TABLE))
        with open(path, "r+b", buffering=0) as file:
            # A damaged line may be of a step that is kept.
            for line in _split(file.read()[end:]):
                record = _parse(line)
                if not line.endswith(b"\n") or (_is_metrics(record) and record["step"] > step):
                    break
                end += len(line)
            if end < file.seek(0, os.SEEK_END):
                os.ftruncate(file.fileno(), end)
    except FileNotFoundError:
        pass
    except OSError as e:
        log(
            f"{path} can't be shortened to step {step} ({e.strerror}): records of later steps "
            "are kept"
        )


def _is_metrics(value: Any) -> bool:
    """Whether a value is a record of metrics: a dict of numbers, one of them the step."""
    return (
        isinstance(value, dict)
        and type(value.get("step")) is int
        and all(_is_number(number) for number in value.values())
    )


def _is_number(value: Any) -> bool:
    """Whether a value is a number that arithmetic with floats takes; it refuses longer integers."""
    if isinstance(value, float):
        return True
    return isinstance(value, int) and abs(value) <= sys.float_info.max


def _read_lines(path: Path, is_whole: Callable[[Any], bool]) -> Iterator[tuple[int, Any]]:
    """Yields the values of the lines that are whole, each with its end in the file in bytes.

    Other lines are logged, once in a process, as is a file that can't be read; half a line at the
    end is not, since another process may be writing it.
    """
    try:
        content = read_bytes(path, max_bytes=MAX_TABLE)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as e:
        _log_once(f"{path} can't be read ({e.strerror}): it counts as empty")
        return
    damaged, end = [], 0
    for number, line in enumerate(_split(content), 1):
        value = _parse(line)
        end += len(line)
        if is_whole(value):
            yield end, value
        elif line.endswith(b"\n") and line.strip():
            damaged.append(number)
    if damaged:
        few = ", ".join(map(str, damaged[:_MAX_NAMED])) + ", ..." * (len(damaged) > _MAX_NAMED)
        what = f"line {few} is" if len(damaged) == 1 else f"{len(damaged)} lines ({few}) are"
        _log_once(f"{path}: {what} damaged, and skipped")


def _split(content: bytes) -> Iterator[bytes]:
    """Splits a file into lines, which keep their line breaks."""
    yield from io.BytesIO(content)


def _parse(line: bytes) -> Any:
    """Returns the value of a line; None if it is damaged.

    A byte order mark of an editor, and zeros that a crash of the machine leaves, are no part of it.
    """
    if len(line) > MAX_LINE:
        return None
    try:
        return json.loads(line.strip(b"\0\r\n ").removeprefix(codecs.BOM_UTF8).decode())
    except (ValueError, RecursionError):
        return None


@functools.cache
def _log_once(text: str) -> None:
    log(text)


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Appends an object as a separate line, even after half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        torn = file.read() not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


def read_records(
    path: Path, is_whole: Callable[[dict[str, Any]], bool] = lambda _: True
) -> list[dict[str, Any]]:
    """Returns the objects for which `is_whole` holds; other lines are logged and skipped."""
    lines = _read_lines(path, lambda value: isinstance(value, dict) and is_whole(value))
    return [record for _, record in lines]
