# SPDX-License-Identifier: Apache-2.0
"""Learning rates as functions of the number of updates made."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from vit_jax.utils.durations import Clock, duration_keys, find_duration, to_steps
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import bind

Schedule = Literal["cosine", "linear", "rsqrt", "constant"]

# Of "rsqrt", unless the config says another: updates after which the rate is 1/sqrt(2).
TIMESCALE = 10_000
_STEMS = ("warmup", "cooldown")


def make_schedule(
    *,
    lr: float,
    total_steps: int,
    schedule: Schedule = "cosine",
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    start_lr: float = 0.0,
    end_lr: float = 0.0,
    timescale: int | None = None,
) -> optax.Schedule:
    """Linear warmup from `start_lr` to `lr`, a shape from there on, a linear cooldown at the end.

    Counts from 0, as optax does: under warmup the first update has `start_lr`, and the rate is
    `end_lr` at `total_steps`. With w updates of warmup and c of cooldown out of T, the shape s is
    over the T - w after the warmup, and the cooldown makes end_lr + (s - end_lr) (T - t) / c of it
    when T - t < c.

    Args:
      lr: after the warmup.
      total_steps: T.
      schedule: "cosine" and "linear" fall to `end_lr`; "rsqrt" is lr / sqrt(1 + (t - w) /
        timescale), as in arXiv:2106.04560; "constant" stays.
      warmup_steps: w.
      cooldown_steps: c.
      start_lr: at update 0.
      end_lr: at T.
      timescale: of "rsqrt", in updates; `TIMESCALE` by default.

    Raises:
      UserError: a duration that does not fit, or a value that the schedule does not have.
    """
    warmup_and_cooldown = warmup_steps + cooldown_steps
    if not 0 <= warmup_steps < max(total_steps, 1):
        raise UserError(
            f"optimizer.warmup_steps={warmup_steps}: expected 0 or more, and less than "
            f"total_steps={total_steps}"
        )
    if cooldown_steps < 0 or warmup_and_cooldown > total_steps:
        raise UserError(
            f"optimizer.cooldown_steps={cooldown_steps}: expected 0 or more, and with "
            f"warmup_steps={warmup_steps} at most total_steps={total_steps}"
        )
    for key, value in (("start_lr", start_lr), ("end_lr", end_lr)):
        if value < 0:
            raise UserError(f"optimizer.{key}={value}: expected at least 0")
    if schedule in ("constant", "rsqrt") and end_lr and not cooldown_steps:
        raise UserError(f"optimizer.end_lr={end_lr}: a {schedule} schedule has none but a cooldown")
    if start_lr and not warmup_steps:
        raise UserError(f"optimizer.start_lr={start_lr}: expected a warmup that starts there")
    if timescale is not None and (schedule != "rsqrt" or timescale < 1):
        raise UserError(
            f"optimizer.timescale={timescale}: expected at least 1, and optimizer.schedule='rsqrt'"
        )
    scale = timescale or TIMESCALE
    steps = total_steps - warmup_steps
    decays = {
        "cosine": lambda: optax.cosine_decay_schedule(lr, steps, alpha=end_lr / lr if lr else 0.0),
        "linear": lambda: optax.linear_schedule(lr, end_lr, steps),
        "rsqrt": lambda: lambda count: lr / jnp.sqrt(1 + count / scale),
        "constant": lambda: optax.constant_schedule(lr),
    }
    rate = decays[schedule]()
    if warmup_steps:
        warmup = optax.linear_schedule(start_lr, lr, warmup_steps)
        rate = optax.join_schedules([warmup, rate], [warmup_steps])
    if not cooldown_steps:
        return rate

    def cool_down(count: jax.typing.ArrayLike) -> jax.Array:
        left = jnp.clip((total_steps - jnp.asarray(count)) / cooldown_steps, 0, 1)
        return jnp.where(left < 1, end_lr + (rate(count) - end_lr) * left, rate(count))

    return cool_down


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """A schedule as a config gives it: `make_schedule`, with durations in one of four units."""

    schedule: Schedule = "cosine"
    warmup_steps: int | None = None
    warmup_epochs: float | None = None
    warmup_examples: float | None = None
    warmup_percent: float | None = None
    cooldown_steps: int | None = None
    cooldown_epochs: float | None = None
    cooldown_examples: float | None = None
    cooldown_percent: float | None = None
    start_lr: float = 0.0
    end_lr: float = 0.0
    timescale: int | None = None

    def make(self, *, lr: float, total_steps: int, clock: Clock | None) -> optax.Schedule:
        """The schedule of a run.

        Raises:
          UserError: see `make_schedule` and `durations.find_duration`.
        """
        steps = {}
        for stem in _STEMS:
            keys = duration_keys(stem)
            found = find_duration(vars(self), keys, prefix="optimizer.")
            if found:
                key, value = found
                steps[stem] = to_steps(value, keys[key], clock=clock, total_steps=total_steps)
        return make_schedule(
            lr=lr,
            total_steps=total_steps,
            schedule=self.schedule,
            warmup_steps=steps.get("warmup", 0),
            cooldown_steps=steps.get("cooldown", 0),
            start_lr=self.start_lr,
            end_lr=self.end_lr,
            timescale=self.timescale,
        )

    def replace(self, changes: Mapping[str, Any], *, key: str) -> "ScheduleOptions":
        """These options with some others; a duration replaces one in another unit.

        Raises:
          UserError: an unknown key, or a value of the wrong type.
        """
        bind(changes, ScheduleOptions, key=key)
        cleared: dict[str, Any] = {}
        for stem in _STEMS:
            keys = duration_keys(stem)
            if any(k in changes for k in keys):
                cleared |= dict.fromkeys(keys)
        return dataclasses.replace(self, **(cleared | dict(changes)))


def drop_other_units(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for writing down: of each duration the key that is given, or steps of 0."""
    kept = dict(options)
    for stem in _STEMS:
        keys = duration_keys(stem)
        found = find_duration(options, keys, prefix="optimizer.") or (f"{stem}_steps", 0)
        kept = {k: v for k, v in kept.items() if k not in keys} | dict([found])
    return kept
