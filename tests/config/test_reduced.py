# SPDX-License-Identifier: Apache-2.0
"""Configs without what a plan, an evaluation or a benchmark does not need."""

import copy

import pytest

from tests.tiny import tiny_config
from vit_jax.config.reduced import reduce_for_evaluation, reduce_for_planning, reduce_for_timing
from vit_jax.utils.errors import UserError


def test_a_plan_needs_no_dataset(tmp_path):
    config = tiny_config(str(tmp_path), data__name="folder:/nowhere").to_dict()
    prepared = reduce_for_planning(config, num_classes=1000, image_size=64)
    assert prepared["data"]["name"] == "blank:1000,64"
    assert "evals" not in prepared
    prepared = reduce_for_planning(dict(config, total_steps=None, epochs=3), num_classes=7)
    assert prepared["total_steps"] > 0
    assert "epochs" not in prepared
    with pytest.raises(UserError, match="--num_classes"):
        reduce_for_planning(config, image_size=64)


def test_an_evaluation_loads_all_that_a_checkpoint_has():
    config = {"seed": 1, "adapt": {"dont_load": ("head/.*",), "posemb_resize": "bicubic"}}
    before = copy.deepcopy(config)
    reduced = reduce_for_evaluation(config | {"init_from": "weights.npz"})
    assert reduced["adapt"] == {"posemb_resize": "bicubic"}
    assert reduced["init_from"] is None
    assert reduced["seed"] == 1
    assert config == before


def test_a_benchmark_of_few_steps_has_no_warmup():
    optimizer = {"name": "adamw", "warmup_steps": 1000, "cooldown_epochs": 1}
    reduced = reduce_for_timing({"optimizer": optimizer, "total_steps": 10**6}, steps=7)
    assert reduced["optimizer"] == {"name": "adamw"}
    assert (reduced["total_steps"], reduced["log_every"]) == (7, 7)
