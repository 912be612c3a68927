# SPDX-License-Identifier: Apache-2.0
"""Sums up the time of the operations in a recorded trace."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

# In a TPU's plane, the line whose events are operations of the compiled program.
_TPU_LINE = "XLA Ops"
_NUMBER = re.compile(r"\.\d+$")


@dataclasses.dataclass(frozen=True)
class Operation:
    """All operations of one name.

    Attributes:
      name: of the instruction without its number, such as `dot` or `broadcast_add_fusion`, and the
        part of the model that it comes from, if the trace has it.
      seconds: sum over devices and steps, without the operations that ran inside, as in a loop.
      share: of the seconds of all operations, 0 to 1.
      calls: number of operations.
    """

    name: str
    seconds: float
    share: float
    calls: int


def read_operations(folder: Path, *, numbered: bool = False) -> list[Operation]:
    """Returns the operations of the newest trace below a folder, the longest first.

    With `numbered`, names are those of instructions, and those that differ in their number are not
    added up.
    """
    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not traces:
        return []
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for plane in jax.profiler.ProfileData.from_file(str(traces[-1])).planes:
        for line in plane.lines:
            events = [
                (event.start_ns, event.duration_ns, name)
                for event in line.events
                if (name := _name(event, line.name, numbered)) is not None
            ]
            for name, nanoseconds in _own_times(events):
                totals[name][0] += nanoseconds / 1e9
                totals[name][1] += 1
    whole = sum(seconds for seconds, _ in totals.values()) or 1.0
    operations = [
        Operation(name, seconds, seconds / whole, int(calls))
        for name, (seconds, calls) in totals.items()
    ]
    return sorted(operations, key=lambda operation: -operation.seconds)


def describe_operations(
    operations: Iterable[Operation], *, steps: int, devices: int, count: int = 10
) -> list[str]:
    """Returns lines with the longest operations, in milliseconds per step and device."""
    lines = []
    for operation in list(operations)[:count]:
        own = 1000 * operation.seconds / steps / devices
        calls = operation.calls / steps / devices
        lines.append(f"{operation.share:7.1%} {own:10,.3f} ms  {calls:6,.0f} x  {operation.name}")
    return lines


def _name(event: Any, line: str, numbered: bool) -> str | None:
    """Returns the name of the operation of an event; None if it is not an operation."""
    stats = dict(event.stats)
    if "hlo_op" not in stats and line != _TPU_LINE:
        return None
    name = str(stats.get("hlo_op", event.name)).split(" ")[0].lstrip("%")
    if numbered:
        return name
    name = _NUMBER.sub("", name)
    source = str(stats.get("tf_op", "")).rstrip(":")
    return f"{name} ({source})" if source else name


def _own_times(events: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """Yields (name, nanoseconds) of the events of a thread, without those of events inside."""
    running: list[list[Any]] = []  # end, name and own time; each within the one before
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while running and running[-1][0] <= start:
            yield tuple(running.pop()[1:])
        if running:
            running[-1][2] -= duration
        running.append([start + duration, name, duration])
    for _, name, own in running:
        yield name, own
