# SPDX-License-Identifier: Apache-2.0
"""Durations of a config: in steps, epochs, examples or percent of the run, one of them each.

The keys of a duration share a stem: `warmup_steps`, `warmup_epochs`, `warmup_examples` and
`warmup_percent`; of what happens every so often the key of the steps is the stem: `every`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import check_type

UNITS = ("steps", "epochs", "examples", "percent")
# The length of a run, of which there is no percentage.
LENGTH = {"total_steps": "steps", "epochs": "epochs", "examples": "examples"}


@dataclasses.dataclass(frozen=True)
class Clock:
    """What turns epochs and examples into steps.

    Attributes:
      batch_size: examples a step.
      epoch_examples: gives the examples of an epoch; only called where epochs are asked for.
    """

    batch_size: int
    epoch_examples: Callable[[], int]


def duration_keys(stem: str) -> dict[str, str]:
    """The unit of each key of a duration."""
    steps = stem if stem.endswith("every") else f"{stem}_steps"
    return {steps: "steps"} | {f"{stem}_{unit}": unit for unit in UNITS[1:]}


def find_duration(
    section: Mapping[str, Any], keys: Mapping[str, str], *, prefix: str = ""
) -> tuple[str, Any] | None:
    """The key of a duration that is given, and its value; None if none is.

    Args:
      section: of the config.
      keys: of the duration, from `duration_keys`.
      prefix: of keys in errors, such as "optimizer.".

    Raises:
      UserError: several are given, or a value is no number of its unit.
    """
    given = {key: section[key] for key in keys if section.get(key) is not None}
    if len(given) > 1:
        listed = " and ".join(f"{prefix}{key}={value}" for key, value in given.items())
        raise UserError(f"{listed}: expected exactly one of them")
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
    """The nearest number of steps to a duration.

    Args:
      value: number of units.
      unit: of `UNITS`.
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


def split_every(
    section: Mapping[str, Any], stem: str, *, prefix: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes `every_epochs` and the like out of a section.

    Returns:
      The rest of the section, and what was taken out: a dict of one key, or an empty one where
      the section gives steps or nothing.

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
    """What `split_every` took out, in steps: at least 1, but for a duration of 0."""
    ((key, value),) = given.items()
    steps = to_steps(value, duration_keys(stem)[key], clock=clock, total_steps=total_steps)
    return max(steps, 1) if value else 0
