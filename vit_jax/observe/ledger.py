# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run goes, over all of its restarts: `WORKDIR/ledger.jsonl`.

Each start, progress and end is a line; a run without an end was killed. `summarize` adds them up.
"""

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.observe.jsonl import LineWriter, read_records
from vit_jax.utils.layout import LEDGER

# What a second is spent on; `step` is what training is for.
KINDS = ("step", "compile", "data_wait", "save", "evaluation")
# More than any step or second since 1970: a number above it was damaged.
_MOST = 10**15
# Start of the cause where a run is complete before its last step.
_EARLY = "finished early: "
# Seconds from one record to the next at most, while steps are taken.
_PACE_S = 30.0


class Ledger:
    """Writes down what the time of a run goes into.

    Args:
      step: step after which the run starts.
      seconds: returns the seconds spent so far by kind.
      active: False for one that does nothing, on all processes but one.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        total_steps: int,
        seconds: Callable[[], Mapping[str, float]],
        active: bool,
    ):
        self._writer = LineWriter(workdir / LEDGER) if active else None
        self._seconds, self._written = seconds, time.monotonic()
        self._step, self._ended = step, False
        self._write("start", total=total_steps, host=socket.gethostname(), pid=os.getpid())

    def took(self, step: int) -> None:
        """Notes that a step has been taken."""
        self._step = step
        if time.monotonic() - self._written > _PACE_S:
            self.write_progress()

    def write_progress(self, **more: Any) -> None:
        """Writes how far it is."""
        self._write("progress", **more)

    def write_rollback(self, *, to: int, past: int) -> None:
        """Writes that the steps after `to` are left out, up to `past`."""
        self._write("rollback", to=to, past=past)
        self._step = past

    def write_straggler(self, process: int, host: str, *, wait: float, others: float) -> None:
        """Writes which process the others wait for: shares of time in which data is waited for."""
        shares = {"wait": round(wait, 3), "others": round(others, 3)}
        self._write("straggler", process=process, host=host, **shares)

    def end_early(self, reason: str) -> None:
        """Writes why the run is complete before its last step."""
        self.end(f"{_EARLY}{reason}")

    def end(self, cause: str) -> None:
        """Writes why it ended; the first cause counts."""
        if not self._ended:
            self._ended = True
            self._write("end", cause=cause)

    def _write(self, event: str, **more: Any) -> None:
        self._written = time.monotonic()
        if self._writer is not None:
            seconds = {kind: round(value, 3) for kind, value in self._seconds().items()}
            record = {"event": event, "time": round(time.time(), 3), "step": self._step}
            self._writer.write(record | more | {"seconds": seconds})


@dataclasses.dataclass(frozen=True)
class Summary:
    """All starts of a run together.

    Attributes:
      step: the last step.
      causes: why each start ended, as far as it has.
      seconds: by kind, with `down` (from one start to the next) and `repeated` (steps taken again,
        by the speed of their start); both are no part of `step`.
      lost: steps that were taken and not saved.
      steps_per_second: of the last start, without compilation, evaluation and saves.
      saved: step of the last checkpoint.
      time: time of the last record, in seconds since 1970.
    """

    step: int
    total: int
    starts: int
    causes: tuple[str, ...]
    seconds: Mapping[str, float]
    lost: int
    steps_per_second: float | None
    saved: int | None
    time: float

    @property
    def goodput(self) -> float:
        """Share of the time since the first start that went into steps that count."""
        whole = sum(self.seconds.values())
        return self.seconds["step"] / whole if whole else 0.0


def read_ledger(workdir: Path) -> list[dict[str, Any]]:
    """The records of a workdir; what is damaged is logged and left out."""
    return read_records(workdir / LEDGER, _is_whole)


def is_complete_early(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the newest start of a run ended before its last step, and not to resume."""
    last = records[-1] if records else {}
    return last.get("event") == "end" and last["cause"].startswith(_EARLY)


# What a record must have, by event; all have the first ones.
_NUMBERS = {"start": ("total",), "rollback": ("to", "past")}


def _is_whole(record: Mapping[str, Any]) -> bool:
    event, seconds = record.get("event"), record.get("seconds")
    if not isinstance(event, str) or not isinstance(seconds, dict):
        return False
    if event == "end" and not isinstance(record.get("cause"), str):
        return False
    whole = [record.get(name) for name in ("step", *_NUMBERS.get(event, ()))]
    if "saved" in record and record["saved"] is not None:
        whole.append(record["saved"])
    numbers = [record.get("time"), *(seconds.get(kind) for kind in KINDS)]
    return all(type(n) is int and 0 <= n < _MOST for n in whole) and all(
        type(n) in (int, float) and 0 <= n < _MOST for n in numbers
    )


def summarize(records: Sequence[Mapping[str, Any]]) -> Summary | None:
    """Adds up the records of a ledger; None if there are none."""
    starts = [i for i, r in enumerate(records) if r["event"] == "start"]
    if not starts:
        return None
    seconds: dict[str, float] = dict.fromkeys((*KINDS, "repeated", "down"), 0.0)
    causes, lost, previous = [], 0, None
    speed = saved = None

    def repeat(steps: int) -> None:
        nonlocal lost
        lost += steps
        again = min(steps / speed if speed else 0.0, seconds["step"])
        seconds["step"] -= again
        seconds["repeated"] += again

    for begin, stop in zip(starts, [*starts[1:], len(records)], strict=True):
        run = records[begin:stop]
        first, last = run[0], run[-1]
        if previous is not None:
            repeat(max(0, previous["step"] - first["step"]))
            seconds["down"] += max(0.0, first["time"] - previous["time"])
        for kind in KINDS:
            seconds[kind] += last["seconds"].get(kind, 0.0)
        dropped = sum(r["past"] - r["to"] for r in run if r["event"] == "rollback")
        taken = last["step"] - first["step"]
        busy = last["seconds"]["step"] + last["seconds"]["data_wait"]
        speed = taken / busy if taken > 0 and busy > 0 else None
        if speed:
            repeat(dropped)
        saved = next((r["saved"] for r in reversed(run) if "saved" in r), saved)
        if last["event"] == "end":
            causes.append(last["cause"])
        elif stop < len(records):
            causes.append("killed")
        previous = last
    assert previous is not None
    return Summary(
        step=previous["step"],
        total=records[starts[-1]]["total"],
        starts=len(starts),
        causes=tuple(causes),
        seconds=seconds,
        lost=lost,
        steps_per_second=speed,
        saved=saved,
        time=previous["time"],
    )
