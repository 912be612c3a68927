# SPDX-License-Identifier: Apache-2.0
"""Progress of a long piece of work: a bar in a terminal, elsewhere a line every ten seconds."""

import datetime
import math
import sys
import time

import rich.progress

from vit_jax.observe.console import console, is_live, log

_PERIOD_S = 10.0


class ProgressLog:
    """Shows the progress of work that counts units. A context manager, for the bar.

    The bar disappears when the work ends. In a log, work of less than ten seconds leaves no line.

    Args:
      work: what is done, such as "reading".
      total: number of units; None if it is not known.
      unit: what is counted, such as "images".
      done: units that were done before.
    """

    def __init__(
        self, work: str, *, total: float | None, unit: str, done: float = 0, decimals: int = 0
    ):
        self._work, self._total, self._unit, self._decimals = work, total, unit, decimals
        self._first = self._done = done
        self._started = self._logged = time.perf_counter()
        # Results that a command prints to the same terminal would run into the bar.
        shared = console.stderr and sys.stdout.isatty()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[state]}"),
            console=console,
            transient=True,
            redirect_stdout=not console.stderr,
            disable=shared or not is_live(console),
        )
        self._task = self._bar.add_task(work, total=total, state="")

    def __enter__(self) -> "ProgressLog":
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def advance(self, count: float) -> None:
        """Counts units as done; those beyond the total are ignored."""
        limit = math.inf if self._total is None else self._total
        self._done = min(self._done + count, limit)
        now = time.perf_counter()
        state = self._describe((self._done - self._first) / max(now - self._started, 1e-9))
        self._bar.update(self._task, completed=self._done, state=state)
        if self._bar.disable and now - self._logged >= _PERIOD_S:
            self._logged = now
            log(f"{self._work}  {state}")

    def _describe(self, speed: float) -> str:
        done, per_second = (f"{x:,.{self._decimals}f}" for x in (self._done, speed))
        if self._total is None:
            return f"{done} {self._unit}  {per_second} {self._unit}/s"
        text = f"{done}/{self._total:,.{self._decimals}f} {self._unit}  {per_second} {self._unit}/s"
        if not speed:
            return text
        left = datetime.timedelta(seconds=round((self._total - self._done) / speed))
        return f"{text}  ETA {left}"
