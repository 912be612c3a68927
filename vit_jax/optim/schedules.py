# SPDX-License-Identifier: Apache-2.0
"""Learning rates as functions of the number of updates."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from vit_jax.utils.durations import Clock, duration_keys, find_duration, to_steps
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import bind

Schedule = Literal["cosine", "linear", "exponential", "rsqrt", "constant"]
DecayFrom = Literal["warmup", "start"]

# Default of "rsqrt": the number of updates until the rate has fallen by 1/sqrt(2).
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
    decay_from: DecayFrom = "warmup",
    hold_steps: int = 1,
) -> optax.Schedule:
    """Makes a schedule: linear warmup from `start_lr` to `lr`, a shape, a linear cooldown.

    The schedule maps the number of updates made, an int scalar, to a float32 scalar. With warmup
    the first update has `start_lr`; the rate is `end_lr` at `total_steps`. With w updates of warmup
    and c of cooldown out of T, the shape s covers the T - w updates after the warmup, and the
    cooldown turns it into end_lr + (s - end_lr) (T - t) / c when T - t < c.

    Args:
      lr: rate after the warmup.
      total_steps: T.
      schedule: "cosine" and "linear" fall to `end_lr`; "exponential" changes to `end_lr` by the
        same factor in each update; "rsqrt" is lr / sqrt(1 + (t - w) / timescale), as in
        arXiv:2106.04560; "constant" stays.
      warmup_steps: w.
      cooldown_steps: c.
      start_lr: rate at update 0.
      end_lr: rate at T.
      timescale: timescale of "rsqrt" in updates; `TIMESCALE` by default.
      decay_from: where "cosine" and "linear" start to fall: after the "warmup", or at the "start"
        of the run, so that the warmup ends on a curve over all T updates, as timm's does.
      hold_steps: the rate changes after so many updates, to that of the first of them.

    Raises:
      UserError: a duration does not fit, or the schedule has no use for a value.
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
    if schedule == "exponential" and not (lr and end_lr):
        raise UserError(
            f"optimizer.lr={lr} and optimizer.end_lr={end_lr}: expected both above 0, since an "
            "exponential schedule goes from one to the other"
        )
    if start_lr and not warmup_steps:
        raise UserError(f"optimizer.start_lr={start_lr}: expected a warmup that starts there")
    if timescale is not None and (schedule != "rsqrt" or timescale < 1):
        raise UserError(
            f"optimizer.timescale={timescale}: expected at least 1, and optimizer.schedule='rsqrt'"
        )
    if decay_from == "start" and schedule not in ("cosine", "linear"):
        raise UserError(
            f"optimizer.decay_from='start': expected optimizer.schedule='cosine' or 'linear', not "
            f"{schedule!r}"
        )
    scale = timescale or TIMESCALE
    skipped = 0 if decay_from == "start" else warmup_steps
    steps = total_steps - skipped
    decays = {
        "cosine": lambda: optax.cosine_decay_schedule(lr, steps, alpha=end_lr / lr if lr else 0.0),
        "linear": lambda: optax.linear_schedule(lr, end_lr, steps),
        "exponential": lambda: optax.exponential_decay(lr, steps, end_lr / lr, end_value=end_lr),
        "rsqrt": lambda: lambda count: lr / jnp.sqrt(1 + count / scale),
        "constant": lambda: optax.constant_schedule(lr),
    }
    rate = decays[schedule]()
    if warmup_steps:
        warmup, decay = optax.linear_schedule(start_lr, lr, warmup_steps), rate
        after = decay if skipped else lambda count: decay(count + warmup_steps)
        rate = optax.join_schedules([warmup, after], [warmup_steps])
    if cooldown_steps:
        rate = _cool_down(rate, total_steps, cooldown_steps, end_lr)
    if hold_steps > 1:
        return lambda count: rate(jnp.asarray(count) // hold_steps * hold_steps)
    return rate


def _cool_down(
    rate: optax.Schedule, total_steps: int, cooldown_steps: int, end_lr: float
) -> optax.Schedule:
    def cool_down(count: jax.typing.ArrayLike) -> jax.Array:
        left = jnp.clip((total_steps - jnp.asarray(count)) / cooldown_steps, 0, 1)
        return jnp.where(left < 1, end_lr + (rate(count) - end_lr) * left, rate(count))

    return cool_down


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The arguments of `make_schedule` in a config, with durations in one of four units.

    `lr_every` is "step", or "epoch" for a rate that changes between epochs alone.
    """

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
    decay_from: DecayFrom = "warmup"
    lr_every: Literal["step", "epoch"] = "step"

    def make(self, *, lr: float, total_steps: int, clock: Clock | None) -> optax.Schedule:
        """Makes the schedule of a run; errors are those of `make_schedule` and `find_duration`."""
        options = drop_other_units(vars(self))
        for stem in _STEMS:
            for key, unit in duration_keys(stem).items():
                if key in options:
                    duration = options.pop(key)
                    steps = to_steps(duration, unit, clock=clock, total_steps=total_steps)
                    options[f"{stem}_steps"] = steps
        if options.pop("lr_every") == "epoch":
            assert clock is not None
            # Whole batches, as a loader has that leaves out the last one.
            options["hold_steps"] = max(1, clock.epoch_examples() // clock.batch_size)
        return make_schedule(lr=lr, total_steps=total_steps, **options)

    def replace(self, changes: Mapping[str, Any], *, key: str) -> "ScheduleOptions":
        """Returns these options with changes; a duration replaces one in another unit.

        Raises `UserError` if a key is unknown, or a value has the wrong type.
        """
        bind(changes, ScheduleOptions, key=key)
        durations = [keys for keys in map(duration_keys, _STEMS) if keys.keys() & changes.keys()]
        cleared = {key: None for keys in durations for key in keys}
        return dataclasses.replace(self, **(cleared | dict(changes)))


def drop_other_units(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options to record: for each duration only the given key, or 0 steps."""
    kept = dict(options)
    for stem in _STEMS:
        keys = duration_keys(stem)
        found = find_duration(options, keys, prefix="optimizer.") or (f"{stem}_steps", 0)
        kept = {k: v for k, v in kept.items() if k not in keys} | dict([found])
    return kept


def cosine_between(start: float, end: float, steps: int) -> optax.Schedule:
    """Returns a schedule from `start` at update 0 to `end` at update `steps`, along half a cosine.

    It maps the number of updates made, an int scalar, to a float32 scalar.
    """

    def value(count: jax.typing.ArrayLike) -> jax.Array:
        share = jnp.clip(jnp.asarray(count, jnp.float32) / max(steps, 1), 0, 1)
        return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * share))

    return value


def linear_between(start: float, end: float, steps: int) -> optax.Schedule:
    """Returns a schedule that is linear over `steps` updates, the first `start` and the last `end`.

    Later updates have `end`. It maps the number of updates made, an int scalar, to a float32
    scalar.
    """

    def value(count: jax.typing.ArrayLike) -> jax.Array:
        share = jnp.clip(jnp.asarray(count, jnp.float32) / max(steps - 1, 1), 0, 1)
        return start + (end - start) * (share if steps > 1 else jnp.ones_like(share))

    return value
