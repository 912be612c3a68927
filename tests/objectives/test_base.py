# SPDX-License-Identifier: Apache-2.0
"""What every objective gets from the base class."""

import pytest

from vit_jax.objectives.base import Objective, headless
from vit_jax.objectives.kinds import OBJECTIVES


class Minimal(Objective):
    """An objective with nothing but what it must have."""

    def init(self, rng, batch):
        return {}

    def augment(self, batch, rng):
        return batch

    def loss(self, params, batch, rng):
        return 0.0, {"loss": 0.0}

    def predict(self, params, batch):
        return {}


def test_optional_parts_have_defaults():
    objective = Minimal()
    assert objective.classifies
    assert [objective.objective_params, objective.frozen, objective.head_names] == [()] * 3
    assert [objective.constants(), objective.notes(), objective.lr_multipliers()] == [{}, (), ()]
    assert objective.update_statistics({"a": 1}, {"loss": 2}) == ({"a": 1}, {"loss": 2})


@pytest.mark.parametrize("part", ["init", "augment", "loss", "predict"])
def test_an_objective_without_a_necessary_part_can_not_be_made(part):
    incomplete = type("Incomplete", (Minimal,), {part: getattr(Objective, part)})
    with pytest.raises(TypeError, match=part):
        incomplete()


def test_constructors_state_whether_the_model_has_a_head():
    assert {name for name, make in OBJECTIVES.items() if getattr(make, "headless", False)} == {
        "mae",
        "dino",
        "linear_probe",
        "contrastive",
        "depth",
        "segmentation",
    }

    @headless
    def make_minimal(*, model):
        return Minimal()

    assert make_minimal.headless
    assert isinstance(make_minimal(model=None), Minimal)
