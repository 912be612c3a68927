# SPDX-License-Identifier: Apache-2.0
"""Policies of timm, with the interpolation of Pillow, as timm computes them."""

from pathlib import Path

import numpy as np
import pytest

from vit_jax.data.ops.policies import (
    ACTIONS,
    DEIT_STYLE,
    TIMM_COLORS,
    TIMM_STYLE,
    AutoAugment,
    RandAugment,
)

GOLDEN = dict(np.load(Path(__file__).parents[2] / "testdata" / "torch" / "policy.npz"))
IMAGE = GOLDEN["image"]
NAMES = {
    "Rotate": "rotate",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateXRel": "translate_x_relative",
    "TranslateYRel": "translate_y_relative",
    "SolarizeAdd": "solarize_add",
    "SolarizeIncreasing": "solarize_increasing",
}


class Sign(np.random.Generator):
    """A generator that gives one sign."""

    def __init__(self, sign):
        super().__init__(np.random.PCG64(0))
        self.sign = sign

    def random(self, *_, **__):
        return 0.9 if self.sign > 0 else 0.1


@pytest.mark.parametrize("call", [name for name in GOLDEN if name != "image"])
def test_actions_are_those_of_timm(call):
    name, level = call.split()
    action = (ACTIONS | TIMM_COLORS)[NAMES[name]]
    for image in (IMAGE, np.ascontiguousarray(IMAGE[:, ::-1])[:, ::-1]):
        found = action(image, abs(float(level)) / 10, Sign(float(level)), TIMM_STYLE)
        np.testing.assert_array_equal(found, GOLDEN[call])


@pytest.mark.parametrize("make", [RandAugment, AutoAugment])
def test_variants_draw_the_same_and_differ_in_interpolation_alone(make):
    policy = {RandAugment: "rand-m9-mstd0.5-inc1", AutoAugment: "original"}[make]
    differences = []
    for seed in range(60):
        a, b = (
            make(policy, variant=v).change(IMAGE, np.random.default_rng(seed))
            for v in ("opencv", "timm")
        )
        differences.append(np.abs(a.astype(int) - b).mean())
    assert 0.2 < np.mean(np.array(differences) == 0) < 0.95
    assert max(differences) < 60


def test_the_styles_differ_at_the_border_and_by_interpolation():
    ours = ACTIONS["rotate"](IMAGE, 1.0, Sign(1), DEIT_STYLE)
    theirs = GOLDEN["Rotate 10"]
    assert (ours != theirs).mean() > 0.3
