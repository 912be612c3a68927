# SPDX-License-Identifier: Apache-2.0
"""A workdir belongs to one experiment."""

import pytest

from vit_jax.utils.errors import UserError
from vit_jax.workdir import open_workdir, write_config

CONFIG = {"seed": 0, "total_steps": 8, "model": {"patch_size": (2, 2), "variant": None}}


def test_the_same_experiment_goes_on_without_a_word(tmp_path, said):
    write_config(open_workdir(str(tmp_path), CONFIG), CONFIG)
    said.clear()
    open_workdir(str(tmp_path), CONFIG)
    assert said == []


def test_a_longer_run_is_the_same_experiment_and_said(tmp_path, said):
    write_config(open_workdir(str(tmp_path), CONFIG), CONFIG)
    open_workdir(str(tmp_path), CONFIG | {"total_steps": 16})
    assert said[-1] == "config.total_steps: 8 before, 16 now"


def test_another_model_is_another_experiment(tmp_path):
    write_config(open_workdir(str(tmp_path), CONFIG), CONFIG)
    other = CONFIG | {"model": {"patch_size": (4, 4), "variant": None}}
    with pytest.raises(
        UserError, match=r"config\.model\.patch_size is \[2, 2\] there and \[4, 4\]"
    ):
        open_workdir(str(tmp_path), other)


def test_a_run_from_before_a_key_existed_goes_on_with_its_default(tmp_path, said):
    write_config(open_workdir(str(tmp_path), CONFIG), CONFIG)
    later = CONFIG | {"model": CONFIG["model"] | {"qk_norm": False}}
    open_workdir(str(tmp_path), later)
    assert said[-1] == "config keys that the run was started without: model.qk_norm=False"


def test_a_key_that_is_no_more_is_another_experiment(tmp_path):
    later = CONFIG | {"model": CONFIG["model"] | {"qk_norm": False}}
    write_config(open_workdir(str(tmp_path), later), later)
    with pytest.raises(UserError, match=r"config\.model\.qk_norm is False there and None here"):
        open_workdir(str(tmp_path), CONFIG)
