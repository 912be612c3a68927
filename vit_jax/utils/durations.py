# SPDX-License-Identifier: Apache-2.0
"""Durations in a config, each in one unit: steps, epochs, examples or percent of the run.

The keys of a duration share a stem: `warmup_steps`, `warmup_epochs`, `warmup_examples` and
`warmup_percent`. For a period, the key of the steps is the stem alone: `every`, `every_epochs`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import check_type

UNITS = ("steps", "epochs", "examples", "percent")
# The length of a run has no percentage.
LENGTH = {"total_steps": "steps", "epochs": "epochs", "examples": "examples"}


@dataclasses.dataclass(frozen=True)
class Clock:
    """Converts epochs and examples to steps.

    Attributes:
      batch_size: examples in a step, the mean where steps differ.
      epoch_examples: returns the number of examples in an epoch; only called for epochs.
    """

    batch_size: float
    epoch_examples: Callable[[], int]


def duration_keys(stem: str) -> dict[str, str]:
    """Returns the unit of each key of a duration."""
    steps = stem if stem.endswith("every") else f"{stem}_steps"
    return {steps: "steps"} | {f"{stem}_{unit}": unit for unit in UNITS[1:]}


def find_duration(
    section: Mapping[str, Any], keys: Mapping[str, str], *, prefix: str = ""
) -> tuple[str, Any] | None:
    """Returns the key of a duration that a section has, and its value; None if it has none.

    Args:
      section: of the config.
      keys: units by key, from `duration_keys`.
      prefix: of keys in errors, such as "optimizer.".

    Raises:
      UserError: the section has several keys of the duration, or a value does not fit its unit.
    """
    given = {key: section[key] for key in keys if section.get(key) is not None}
    if len(given) > 1:
        listed = " and ".join(f"{prefix}{key}={value}" for key, value in given.items())
        others = " or ".join(f"--config.{prefix}{key}=none" for key in given)
        raise UserError(f"{listed}: expected exactly one of them; add {others}")
    for key, value in given.items():
        name, unit = prefix + key, keys[key]
        check_type(value, int if unit == "steps" else float, key=name)
        if not 0 <= value < math.inf:
            raise UserError(f"{name}={value}: expected 0 or more {unit}")
        if unit == "percent" and value > 100:
            raise UserError(f"{name}={value}: expected a part of the run, 0 to 100")
        return key, value
    return None


def to_steps(
    value: float, unit: str, *, clock: Clock | None, total_steps: int | None = None
) -> int:
    """Converts a duration to the nearest number of steps.

    Args:
      value: number of units.
      unit: one of `UNITS`.
      clock: needed for epochs and examples.
      total_steps: of the run; needed for percent.
    """
    if unit == "steps":
        return int(value)
    if unit == "percent":
        assert total_steps is not None
        return round(value / 100 * total_steps)
    assert clock is not None
    examples = value * clock.epoch_examples() if unit == "epochs" else value
    return round(examples / clock.batch_size)


def count_steps(
    duration: Mapping[str, Any],
    *,
    key: str,
    clock: Clock | None,
    total_steps: int,
    unless: str,
) -> int:
    """Returns the steps of a duration within a run, given as a dict such as `{"percent": 5}`.

    Args:
      duration: its unit and its value.
      key: what has the duration, for errors.
      clock: needed for epochs and examples.
      total_steps: of the run.
      unless: what is wrong if the run is not longer, for the error.

    Raises:
      UserError: it is not one duration, or not shorter than the run.
    """
    found = find_duration(duration, dict(zip(UNITS, UNITS, strict=True)), prefix=f"{key}: ")
    if found is None or len(duration) > 1:
        raise UserError(f"{key} has {duration}; expected one of {', '.join(UNITS)}")
    unit, value = found
    steps = to_steps(value, unit, clock=clock, total_steps=total_steps)
    if steps >= total_steps:
        raise UserError(
            f"{key}: {unit}={value} is not shorter than the {total_steps} steps of the run: "
            f"{unless}"
        )
    return steps


def split_every(
    section: Mapping[str, Any], stem: str, *, prefix: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates a period in epochs, examples or percent from the other keys of a section.

    Returns:
      `(rest, period)`: period has one key; it is empty if the section has steps or no period.

    Raises:
      UserError: see `find_duration`.
    """
    keys = duration_keys(stem)
    found = find_duration(section, keys, prefix=prefix)
    rest = {key: value for key, value in section.items() if key not in keys or key == stem}
    if found is None or found[0] == stem:
        return rest, {}
    rest.pop(stem, None)
    return rest, dict([found])


def every_steps(given: Mapping[str, Any], stem: str, *, clock: Clock, total_steps: int) -> int:
    """Converts a period of `split_every` to steps: at least 1, or 0 for a period of 0."""
    ((key, value),) = given.items()
    steps = to_steps(value, duration_keys(stem)[key], clock=clock, total_steps=total_steps)
    return max(steps, 1) if value else 0
