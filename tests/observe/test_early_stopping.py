# SPDX-License-Identifier: Apache-2.0
"""When a run that no longer improves ends."""

import math

import pytest

from vit_jax.observe.early_stopping import Stop
from vit_jax.utils.errors import UserError


def reason(values, *, metric="val/loss", patience=2):
    return Stop(metric=metric, patience=patience).find_reason(dict(enumerate(values)))


def test_a_run_ends_after_that_many_evaluations_without_improvement():
    assert reason([]) is None
    assert reason([3.0, 2.0, 2.5]) is None
    assert reason([3.0, 2.0, 2.5, 2.1]) == (
        "val/loss was best at step 1, 2, 2 evaluations ago (stop.patience=2)"
    )
    assert reason([3.0, 2.0, 2.5, 1.9, 2.5]) is None
    assert reason([3.0, 2.0, 2.5, 2.1], patience=3) is None


def test_equal_results_are_no_improvement_and_the_name_tells_which_are_better():
    assert reason([2.0, 2.0, 2.0]) is not None
    assert reason([0.5, 0.6, 0.7], metric="val/top1") is None
    assert reason([0.5, 0.6, 0.7]) is not None
    assert reason([0.7, 0.6, 0.5], metric="val_ema/top1") is not None


def test_results_that_are_not_finite_are_no_improvement():
    assert reason([math.nan, 2.0, math.nan, -math.inf]) is not None
    assert reason([math.nan, 2.0, math.nan, 1.0]) is None
    assert "was never finite in 2 evaluations" in reason([math.nan, math.inf])


def test_a_run_without_the_section_takes_all_steps():
    assert Stop().find_reason({1: 1.0, 2: 1.0, 3: 1.0}) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "val/loss"}, "stop.metric='val/loss' and stop.patience=None: expected both"),
        ({"patience": 3}, "stop.metric=None and stop.patience=3: expected both"),
        ({"metric": "val/loss", "patience": 0}, "stop.patience=0: expected at least 1"),
    ],
)
def test_half_a_rule_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Stop(**options)
