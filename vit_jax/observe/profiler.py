# SPDX-License-Identifier: Apache-2.0
"""A window of steps recorded by the JAX profiler."""

import dataclasses
from pathlib import Path

import jax

from vit_jax.observe.console import say
from vit_jax.utils.errors import UserError

FOLDER = "profile"


@dataclasses.dataclass(frozen=True)
class Profile:
    """Records `steps` steps after step `start`; 0 steps for none."""

    start: int = 10
    steps: int = 0


def make_profile(*, start: int = 10, steps: int = 0) -> Profile:
    """A `Profile` from config values, checked."""
    for name, value in (("start", start), ("steps", steps)):
        if value < 0:
            raise UserError(f"profile.{name}={value}: expected at least 0")
    return Profile(start, steps)


class Profiler:
    """Starts and stops the trace as the loop passes the window. A context manager."""

    def __init__(self, workdir: Path, profile: Profile):
        self._folder, self._profile, self._running = workdir / FOLDER, profile, False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def step(self, step: int) -> None:
        """Called when a step has been queued."""
        if not self._profile.steps:
            return
        if step == self._profile.start + self._profile.steps:
            self._stop()
        elif step == self._profile.start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def _stop(self) -> None:
        if self._running:
            jax.effects_barrier()
            jax.profiler.stop_trace()
            self._running = False
            say(f"wrote profile {self._folder}: open it with TensorBoard or Perfetto")
