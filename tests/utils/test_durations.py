# SPDX-License-Identifier: Apache-2.0
"""Durations in steps, epochs, examples or percent."""

import pytest

from vit_jax.utils.durations import (
    LENGTH,
    Clock,
    duration_keys,
    every_steps,
    find_duration,
    split_every,
    to_steps,
)
from vit_jax.utils.errors import UserError

CLOCK = Clock(batch_size=10, epoch_examples=lambda: 204)


@pytest.mark.parametrize(
    ("value", "unit", "steps"),
    [(7, "steps", 7), (0.5, "epochs", 10), (2, "epochs", 41), (96, "examples", 10),
     (5, "percent", 50)],
)  # fmt: skip
def test_every_unit_becomes_steps(value, unit, steps):
    assert to_steps(value, unit, clock=CLOCK, total_steps=1000) == steps


def test_the_data_is_only_counted_for_epochs():
    def count():
        raise AssertionError

    assert to_steps(50, "examples", clock=Clock(10, count)) == 5


def test_cadences_are_taken_out_and_at_least_one_step():
    rest, given = split_every({"every_epochs": 0.01, "split": "test"}, "every")
    assert (rest, given) == ({"split": "test"}, {"every_epochs": 0.01})
    assert every_steps(given, "every", clock=CLOCK, total_steps=9) == 1
    assert every_steps({"every_percent": 0}, "every", clock=CLOCK, total_steps=9) == 0
    assert split_every({"log_every": 5}, "log_every") == ({"log_every": 5}, {})


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        (
            {"epochs": 3, "examples": 9},
            LENGTH,
            "^epochs=3 and examples=9: expected exactly one of them",
        ),
        ({"total_steps": 1.5}, LENGTH, "total_steps=1.5 is a float; expected int"),
        ({"epochs": "x"}, LENGTH, "epochs='x' is a str; expected float"),
        ({"epochs": -1}, LENGTH, "epochs=-1: expected 0 or more epochs"),
        ({"epochs": float("nan")}, LENGTH, "epochs=nan: expected 0 or more"),
        ({"every_percent": 200}, duration_keys("every"), "every_percent=200: .*0 to 100"),
        ({"every": 1, "every_epochs": 2}, duration_keys("every"), "every=1 and every_epochs=2"),
    ],
)
def test_contradictions_and_odd_values_are_refused(section, keys, message):
    with pytest.raises(UserError, match=message):
        find_duration(section, keys)
