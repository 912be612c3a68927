# SPDX-License-Identifier: Apache-2.0
"""What `config.precision` sets, and what contradicts it."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from tests.tiny import tiny_config
from vit_jax.checkpoint.workdir import read_config
from vit_jax.config.precision import PRECISIONS, apply_precision
from vit_jax.optim.base_optimizers import BASE_OPTIMIZERS
from vit_jax.runtime.chips import GPUS, TPUS
from vit_jax.training.experiment import Experiment
from vit_jax.training.run import train
from vit_jax.utils.errors import UserError


def build(data_dir, **changes):
    return Experiment.from_config(tiny_config(data_dir, **changes), devices=jax.devices()[:1])


def dtypes(tree):
    return {str(x.dtype) for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize(
    ("name", "dtype", "moments", "float8"),
    [
        (None, "float32", "float32", False),
        ("float32", "float32", "float32", False),
        ("bfloat16", "bfloat16", "float32", False),
        ("bfloat16_moments", "bfloat16", "bfloat16", False),
        ("float8", "bfloat16", "float32", True),
    ],
)
def test_a_policy_says_what_computes_in_what(name, dtype, moments, float8, data_dir):
    experiment = build(data_dir, precision=name)
    assert (experiment.model.dtype, experiment.model.float8) == (dtype, float8)
    state = experiment.abstract_state
    opt_state: Any = state.opt_state
    adam = next(s for s in opt_state if hasattr(s, "mu"))
    assert dtypes(adam.mu) == {moments}
    assert dtypes((state.params, adam.nu)) == {"float32"}
    # How it is run is no part of what is saved as the model.
    assert "float8" not in experiment.description["model"]
    assert experiment.description["model"]["dtype"] == dtype


@pytest.mark.parametrize("name", [None, *PRECISIONS])
def test_the_resolved_config_comes_to_the_same(name, data_dir):
    config = build(data_dir, precision=name).config
    again = Experiment.from_config(json.loads(json.dumps(config)), devices=jax.devices()[:1])
    assert json.dumps(again.config) == json.dumps(config)
    assert again.model.float8 == (name == "float8")


@pytest.mark.parametrize(
    "optimizer", sorted(BASE_OPTIMIZERS.keys() - {"lars", "schedule_free_adamw"})
)
def test_the_first_moment_of_any_optimizer_that_has_one_can_be_bfloat16(optimizer):
    _, _, section = apply_precision("bfloat16_moments", {}, {"name": optimizer})
    state = BASE_OPTIMIZERS[optimizer](**{k: v for k, v in section.items() if k != "name"}).tx.init(
        {"encoderblock_0": {"MlpBlock_0": {"Dense_0": {"kernel": np.zeros((4, 4), np.float32)}}}}
    )
    assert "bfloat16" in {str(x.dtype) for x in jax.tree.leaves(state) if hasattr(x, "dtype")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16"}, r"precision='bf16' is unknown; did you mean 'bfloat16'\?"),
        (
            {"precision": "bfloat16", "model__dtype": "float32"},
            "model.dtype='float32' with precision='bfloat16': expected 'bfloat16', which that sets",
        ),
        (
            {"precision": "bfloat16_moments", "optimizer__mu_dtype": "float32"},
            "optimizer.mu_dtype='float32' with precision='bfloat16_moments': expected 'bfloat16'",
        ),
        (
            {"precision": "bfloat16_moments", "optimizer": {"name": "lars", "lr": 0.1}},
            "optimizer.name='lars' keeps no moment .* expected precision='bfloat16'",
        ),
        ({"model__float8": True}, r"unknown config key model\.float8"),
    ],
)
def test_contradictions_are_refused(changes, message, data_dir):
    with pytest.raises(UserError, match=message) as error:
        build(data_dir, **changes)
    assert "\n" not in str(error.value)


def test_the_same_value_given_twice_is_no_contradiction(data_dir):
    assert build(data_dir, precision="bfloat16", model__dtype="bfloat16").model.dtype == "bfloat16"


def test_a_run_in_float8_says_that_it_is_emulated_where_it_is(data_dir, tmp_path, said):
    config = tiny_config(
        data_dir, precision="float8", total_steps=3, mesh={"data": 2, "fsdp": 2, "tensor": 2}
    )
    train(config, tmp_path / "run")
    line = "precision=float8: cpu is not known to multiply in float8: emulated, and slow"
    assert said.count(line) == 1
    assert read_config(tmp_path / "run")["precision"] == "float8"


def test_float8_is_in_the_hardware_from_hopper_and_tpu7x_on():
    found = {name for name, chip in (TPUS | GPUS).items() if chip.float8}
    assert found == {"tpu7x", "h100", "h200", "b200"}
