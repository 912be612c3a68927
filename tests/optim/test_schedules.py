# SPDX-License-Identifier: Apache-2.0
"""Schedules between two values, against those of the code of DINOv2."""

import json
from pathlib import Path

import numpy as np
import pytest

from vit_jax.optim.schedules import cosine_between, linear_between

GOLDEN = Path(__file__).parents[1] / "testdata" / "dino" / "ssl_schedules.json"


def test_schedules_are_those_of_dinov2():
    spec = json.loads(GOLDEN.read_text())
    epoch, steps = 1250, np.asarray(spec["iteration"])
    total, warmup = 100 * epoch, spec["config"]["teacher_temp_epochs"] * epoch
    found = {
        "wd": cosine_between(0.04, 0.4, total),
        "momentum": cosine_between(0.992, 1.0, total),
        "teacher_temp": linear_between(0.04, 0.07, warmup),
    }
    for name, schedule in found.items():
        np.testing.assert_allclose(schedule(steps), spec[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_schedule_without_a_length_is_at_its_end(steps):
    assert linear_between(0.04, 0.07, steps)(0) == pytest.approx(0.07)


def test_later_updates_have_the_last_value():
    assert cosine_between(0.5, 1.0, 10)(25) == 1.0
    assert linear_between(0.5, 1.0, 10)(25) == 1.0
