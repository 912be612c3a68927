# SPDX-License-Identifier: Apache-2.0
"""Records a window of steps with the JAX profiler, and logs the longest operations."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from vit_jax.observe.console import log
from vit_jax.observe.trace import describe_operations, read_operations
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.layout import PROFILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """The window of steps to record.

    Attributes:
      start: steps of this start of the run before the window, at least 1.
      steps: length of the window; 0 to record nothing.
    """

    start: int = 10
    steps: int = 0

    def __post_init__(self) -> None:
        for key, value, least in (("start", self.start, 1), ("steps", self.steps, 0)):
            if value < least:
                raise UserError(f"profile.{key}={value}: expected at least {least}")


class Profiler:
    """Starts and stops the trace as the loop passes the window. A context manager.

    Args:
      workdir: the trace is written to its folder `profile`.
      active: False on all processes but one, to do nothing.
    """

    def __init__(self, workdir: Path, profile: Profile, *, active: bool):
        self._folder, self._profile = workdir / PROFILE, profile
        self._active, self._running, self._taken = active and profile.steps > 0, False, 0

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def step(self, state: Any) -> None:
        """Counts a step that was dispatched; `state` is its result, any tree of arrays."""
        if not self._active:
            return
        self._taken += 1
        if self._taken == self._profile.start:
            try:
                # A trace that can't be written when it ends would keep JAX from starting others.
                self._folder.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(str(self._folder))
            except (OSError, RuntimeError) as e:
                self._give_up(e)
            else:
                self._running = True
        elif self._taken == self._profile.start + self._profile.steps:
            jax.block_until_ready(state)
            self._stop()

    def _give_up(self, error: Exception) -> None:
        self._active = False
        log(f"{self._folder} can't be written ({describe_error(error)}): continues without it")

    def _stop(self) -> None:
        if self._running:
            self._running = False
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as e:
                return self._give_up(e)
            log(f"wrote profile {self._folder}: open it with TensorBoard or Perfetto")
            operations = read_operations(self._folder)
            steps, devices = self._taken - self._profile.start, jax.local_device_count()
            if steps > 0 and operations:
                log("slowest operations, in a step on each device:")
                for line in describe_operations(operations, steps=steps, devices=devices):
                    log(line)
