# SPDX-License-Identifier: Apache-2.0
"""A workdir belongs to one experiment: what may change on resume, and what may not."""

import pytest

from vit_jax.checkpoint.workdir import write_config
from vit_jax.config.schema import Resume
from vit_jax.training.resume import check_data, open_workdir
from vit_jax.utils.errors import UserError

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


SEED = {"seed": 1}


@pytest.mark.parametrize("allow", ["seed", ("seed",), "config.seed, model"])
def test_what_is_allowed_may_differ_and_is_said(allow, tmp_path, said):
    write_config(open_workdir(str(tmp_path), CONFIG), CONFIG)
    open_workdir(str(tmp_path), CONFIG | SEED, resume=Resume(allow=allow))
    assert said[-1] == "config.seed: 0 before, 1 now"


def test_all_that_differs_is_named_with_what_allows_it(tmp_path):
    write_config(open_workdir(str(tmp_path), CONFIG), CONFIG)
    other = CONFIG | SEED | {"model": {"patch_size": (4, 4), "variant": None}}
    with pytest.raises(UserError, match=r"seed is 0 there and 1 here") as error:
        open_workdir(str(tmp_path), other)
    assert "--config.resume.allow=model.patch_size,seed" in str(error.value)
    with pytest.raises(UserError, match=r"patch_size is"):
        open_workdir(str(tmp_path), other, resume=Resume(allow="seed"))
    open_workdir(str(tmp_path), other, resume=Resume(allow="seed,model"))


def test_a_key_to_allow_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"resume\.allow: 'sead' is no key; did you mean 'seed'"):
        open_workdir(str(tmp_path), CONFIG, resume=Resume(allow="sead"))


def test_other_records_are_refused_unless_allowed(said):
    before, now = {"data": "aa"}, {"data": "bb"}
    check_data("w", now, now, Resume())
    check_data("w", {}, now, Resume())
    with pytest.raises(UserError, match=r"data\.content is aa there and bb here"):
        check_data("w", before, now, Resume())
    check_data("w", before, now, Resume(allow="data.content"))
    assert "data.content is aa there" in said[-1]
