# SPDX-License-Identifier: Apache-2.0
"""Ends a process that hangs, so that the job is started again rather than waiting forever.

`runtime.heartbeat` ends the other processes of the job.
"""

import contextlib
import dataclasses
import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vit_jax.runtime.preemption import end_to_run_again, report
from vit_jax.utils.errors import UserError
from vit_jax.utils.signals import RUN_AGAIN

# Seconds for the report before the process ends: the workdir may be what hangs.
_REPORT_S = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds after which a process counts as hung, by phase; 0 for no limit.

    Attributes:
      compile: from the start of the process to the end of the first step.
      step: from one step to the next, including the wait for data.
      save: time that training waits for a checkpoint.
      evaluation: time of all evaluators that are due.
      peer: time without a sign of life from another process of the job.
    """

    compile: float = 7200
    step: float = 1800
    save: float = 3600
    evaluation: float = 14400
    peer: float = 60

    def __post_init__(self) -> None:
        for key, value in dataclasses.asdict(self).items():
            if value < 0:
                raise UserError(f"watchdog.{key}={value}: expected seconds, or 0 for no limit")


class Watchdog:
    """Watches the main thread from another thread, within its context.

    Args:
      watched: returns the phase of the main thread and the `time.monotonic` of its start.
      workdir: the stacks of all threads are written to `watchdog-PROCESS.txt` in it.
      on_exit: called, with the phase, before the process ends; an attribute, since what it needs
        may be made while the watchdog already runs.
    """

    def __init__(
        self,
        limits: Limits,
        watched: Callable[[], tuple[str, float]],
        *,
        workdir: Path,
        process: int,
        on_exit: Callable[[str], None] = lambda _: None,
    ):
        self._limits = dataclasses.asdict(limits)
        self._file = workdir / f"watchdog-{process}.txt"
        self._process, self.on_exit = process, on_exit
        self._watched, self._not_before = watched, 0.0
        self._stop = threading.Event()
        positive = [limit for limit in self._limits.values() if limit]
        self._poll = min(1.0, min(positive, default=1.0) / 4)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._not_before = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the watch; may be called again."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._poll):
            now = time.monotonic()
            if now - last > 2 * self._poll + 1:
                # The process or the machine was suspended: the time until now does not count.
                self._not_before = now
            last = now
            phase, since = self._watched()
            seconds = now - max(since, self._not_before)
            if (limit := self._limits[phase]) and seconds > limit:
                self._end(phase, seconds)

    def _end(self, phase: str, seconds: float) -> None:
        words = (
            f"process {self._process} hangs: {seconds:.0f} s in the phase {phase!r}, more than "
            f"watchdog.{phase}={self._limits[phase]:g}; ends with code {RUN_AGAIN}, to be started "
            "again"
        )
        end_to_run_again(lambda: self._report(words, phase), timeout=_REPORT_S)

    def _report(self, words: str, phase: str) -> None:
        report(words)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        with contextlib.suppress(OSError), open(self._file, "w") as file:
            print(words, file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
        self.on_exit(phase)
