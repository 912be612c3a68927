# SPDX-License-Identifier: Apache-2.0
"""A workdir belongs to one experiment: what may change on resume, and what may not."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from tests.training.test_step import Quadratic
from vit_jax.checkpoint.state import TrainState
from vit_jax.checkpoint.workdir import write_config
from vit_jax.config.schema import Resume
from vit_jax.observe.divergence import append_rollback
from vit_jax.observe.ledger import Ledger
from vit_jax.training.phases import Phases
from vit_jax.training.resume import check_data, open_workdir, restore
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
    assert said[-1] == (
        "total_steps: 8 before, 16 now; the learning rate follows the schedule of the new "
        "length from here on, so the result is not that of a run that had this length from its "
        "start"
    )


def test_a_run_that_is_refused_logs_no_change_of_its_length(tmp_path, said):
    write_config(open_workdir(str(tmp_path), CONFIG), CONFIG)
    said.clear()
    with pytest.raises(UserError, match=r"seed is 0 there and 1 here"):
        open_workdir(str(tmp_path), CONFIG | {"seed": 1, "total_steps": 16})
    assert said == []


@pytest.mark.parametrize(
    ("optimizer", "other"),
    [
        ({"schedule": "cosine"}, True),
        ({"schedule": "constant", "warmup_steps": 2, "cooldown_steps": 0}, False),
        ({"schedule": "constant", "warmup_percent": 5.0}, True),
        ({"schedule": "rsqrt", "cooldown_epochs": 1.0}, True),
        ({"schedule": "rsqrt", "schedules": [["head/.*", {"schedule": "linear"}]]}, True),
        ({"schedule": "rsqrt", "schedules": [["head/.*", {"start_lr": 0.1}]]}, False),
    ],
)
def test_another_schedule_is_said_where_it_depends_on_the_length(optimizer, other, tmp_path, said):
    config = CONFIG | {"optimizer": optimizer}
    write_config(open_workdir(str(tmp_path), config), config)
    open_workdir(str(tmp_path), config | {"total_steps": 4})
    assert ("schedule of the new length" in said[-1]) is other


def test_no_schedule_is_claimed_of_a_run_that_is_past_its_length(tmp_path, said):
    write_config(open_workdir(str(tmp_path), CONFIG), CONFIG)
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    for total in (8, 5):
        open_workdir(str(tmp_path), CONFIG | {"total_steps": 5}, total_steps=total)
        assert said[-1] == "total_steps: 8 before, 5 now"
    open_workdir(str(tmp_path), CONFIG | {"total_steps": 16}, total_steps=16)
    assert "schedule of the new length" in said[-1]


SECTION = CONFIG | {"optimizer": {"sam": {"rho": 0.05}}}
NO_SECTION = CONFIG | {"optimizer": {"sam": None}}


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (NO_SECTION, SECTION, r"optimizer\.sam is None there and \{'rho': 0\.05\} here"),
        (SECTION, NO_SECTION, r"optimizer\.sam is \{'rho': 0\.05\} there and None here"),
        (NO_SECTION, CONFIG | {"optimizer": {"sam": {}}}, r"sam is None there and \{\} here"),
        (SECTION, CONFIG | {"optimizer": {"sam": {"rho": 0.1}}}, r"sam\.rho is 0\.05 there"),
        (SECTION, CONFIG | {"optimizer": {}}, r"sam\.rho is 0\.05 there and None here"),
        (SECTION, CONFIG | {"optimizer": {"sam": 1}}, r"sam is \{'rho': 0\.05\} there and 1"),
    ],
)
def test_a_section_that_comes_or_goes_is_another_experiment(before, now, message, tmp_path):
    write_config(open_workdir(str(tmp_path), before), before)
    with pytest.raises(UserError, match=message) as error:
        open_workdir(str(tmp_path), now)
    allow = str(error.value).rpartition("--config.resume.allow=")[2]
    open_workdir(str(tmp_path), now, resume=Resume(allow=allow))


def test_a_key_that_the_run_did_not_have_must_have_its_default(tmp_path, said):
    def resolve(config):
        return config | {"model": {"qk_norm": False, "rope": None} | config["model"]}

    write_config(open_workdir(str(tmp_path), CONFIG), CONFIG)
    said.clear()
    same = {"qk_norm": False, "rope": None}
    open_workdir(str(tmp_path), CONFIG | {"model": CONFIG["model"] | same}, resolve=resolve)
    (line,) = said
    assert line.endswith("started without: model.qk_norm=False, model.rope=None")
    for other, message in (
        ({"qk_norm": True, "rope": None}, "model.qk_norm is not set there and True here"),
        ({"qk_norm": False, "rope": {"theta": 1}}, "model.rope.theta is not set there and 1 here"),
    ):
        config = CONFIG | {"model": CONFIG["model"] | other}
        with pytest.raises(UserError, match=message):
            open_workdir(str(tmp_path), config, resolve=resolve)


WHOLE = CONFIG | {"data": {"batch_size": 8}, "optimizer": {"lr": 0.1}}


def write_checkpoint(workdir, step, config=WHOLE):
    folder = workdir / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"step": step, "config": config}))


@pytest.mark.parametrize("content", [None, "", "{}", "null", "[1]", "{", '{"seed": 0}', "\0" * 99])
def test_a_config_that_was_lost_is_taken_from_the_newest_checkpoint(content, tmp_path, said):
    write_checkpoint(tmp_path, 4, WHOLE | {"seed": 3})
    write_checkpoint(tmp_path, 10)
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    open_workdir(str(tmp_path), WHOLE)
    (line,) = said
    assert line.startswith(f"{tmp_path / 'config.json'} ")
    assert line.endswith(f"taken from {tmp_path / 'checkpoints/10/run.json'} in its place")
    with pytest.raises(UserError, match=r"seed is 0 there and 1 here"):
        open_workdir(str(tmp_path), WHOLE | SEED)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "{"])
def test_a_config_that_is_lost_for_good_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json .*, and no checkpoint has the config"):
        open_workdir(str(tmp_path), WHOLE)


def write_progress(workdir, *, saved):
    write_config(open_workdir(str(workdir), WHOLE), WHOLE)
    ledger = Ledger(workdir, step=0, total_steps=8, seconds=Phases().seconds, active=True)
    ledger.write_progress(saved=saved)
    (workdir / "metrics.jsonl").write_text('{"step": 6, "train/loss": 1.0}\n')


def test_a_run_whose_checkpoints_are_gone_is_not_started_from_scratch(tmp_path):
    write_progress(tmp_path, saved=4)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        UserError, match=r"step 4 was saved, and there is no checkpoint in .*/check"
    ):
        open_workdir(str(tmp_path), WHOLE)
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl is of steps that were taken, and there"):
        open_workdir(str(tmp_path), WHOLE)
    before.pop(tmp_path / "ledger.jsonl")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_without_a_checkpoint_yet_starts_again_and_says_so(tmp_path, said):
    write_progress(tmp_path, saved=None)
    said.clear()
    open_workdir(str(tmp_path), WHOLE)
    assert said == [f"{tmp_path} has no checkpoint yet: the run starts at step 0 again"]


def test_a_checkpoint_that_is_gone_is_said_where_an_older_one_is_left(tmp_path, said):
    write_progress(tmp_path, saved=8)
    write_checkpoint(tmp_path, 4)
    said.clear()
    open_workdir(str(tmp_path), WHOLE)
    assert said == ["the checkpoint of step 8, which was saved, is gone: the newest is of 4"]


def test_another_model_is_another_experiment(tmp_path):
    write_config(open_workdir(str(tmp_path), WHOLE), WHOLE)
    other = WHOLE | {"model": {"patch_size": (4, 4), "variant": None}}
    with pytest.raises(UserError, match=r"model\.patch_size is \[2, 2\] there and \[4, 4\]"):
        open_workdir(str(tmp_path), other)


def test_a_run_from_before_a_key_existed_goes_on_with_its_default(tmp_path, said):
    write_config(open_workdir(str(tmp_path), WHOLE), WHOLE)
    later = WHOLE | {"model": WHOLE["model"] | {"qk_norm": False}}
    open_workdir(str(tmp_path), later)
    assert said[-1] == "config keys that the run was started without: model.qk_norm=False"


def test_a_key_that_is_no_more_is_another_experiment(tmp_path):
    later = WHOLE | {"model": WHOLE["model"] | {"qk_norm": False}}
    write_config(open_workdir(str(tmp_path), later), later)
    with pytest.raises(UserError, match=r"model\.qk_norm is False there and None here"):
        open_workdir(str(tmp_path), WHOLE)


SEED = {"seed": 1}


@pytest.mark.parametrize("allow", ["seed", ("seed",), "config.seed, model"])
def test_what_is_allowed_may_differ_and_is_said(allow, tmp_path, said):
    write_config(open_workdir(str(tmp_path), WHOLE), WHOLE)
    open_workdir(str(tmp_path), WHOLE | SEED, resume=Resume(allow=allow))
    assert said[-1] == "seed: 0 before, 1 now"


def test_all_that_differs_is_named_with_what_allows_it(tmp_path):
    write_config(open_workdir(str(tmp_path), WHOLE), WHOLE)
    other = WHOLE | SEED | {"model": {"patch_size": (4, 4), "variant": None}}
    with pytest.raises(UserError, match=r"seed is 0 there and 1 here") as error:
        open_workdir(str(tmp_path), other)
    assert "--config.resume.allow=model.patch_size,seed" in str(error.value)
    with pytest.raises(UserError, match=r"patch_size is"):
        open_workdir(str(tmp_path), other, resume=Resume(allow="seed"))
    open_workdir(str(tmp_path), other, resume=Resume(allow="seed,model"))


def test_a_key_to_allow_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"resume\.allow: 'sead' is not a key; did you mean 'seed'"):
        open_workdir(str(tmp_path), WHOLE, resume=Resume(allow="sead"))


def test_other_records_are_refused_unless_allowed(said):
    before, now = {"data": "aa"}, {"data": "bb"}
    check_data("w", now, now, Resume())
    check_data("w", {}, now, Resume())
    with pytest.raises(UserError, match=r"data\.content is aa there and bb here"):
        check_data("w", before, now, Resume())
    check_data("w", before, now, Resume(allow="data.content"))
    assert "data.content is aa there" in said[-1]


class Follower(Quadratic):
    """Copies its average in the third update."""

    keeps_average = True

    def follow_average(self, params, average, before, step):
        due = (before < 3) & (step >= 3)
        return jax.tree.map(lambda x, a: jnp.where(due, a, x), params, average), average


@pytest.mark.parametrize(("past", "value"), [(None, 1.0), (2, 1.0), (4, 2.0)])
def test_what_is_due_in_a_step_that_is_left_out_is_done_on_resume(past, value, tmp_path, said):
    ones, sharding = jnp.ones(2), SingleDeviceSharding(jax.devices()[0])
    saved = TrainState(jnp.int32(1), {"kernel": ones}, (), {"kernel": 2 * ones})
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved
    )
    settings = SimpleNamespace(lora=SimpleNamespace(rank=0), init_from=None)
    experiment: Any = SimpleNamespace(
        objective=Follower(), settings=settings, abstract_state=shapes
    )
    checkpoints: Any = SimpleNamespace(
        workdir=tmp_path, latest_step=lambda: 1, restore=lambda _: saved, path=str
    )
    if past is not None:
        append_rollback(tmp_path, to=1, past=past, reason="loss")
    start, state = restore(experiment, checkpoints)
    assert start == int(state.step) == (past or 1)
    np.testing.assert_array_equal(state.params["kernel"], [value, value])
