# SPDX-License-Identifier: Apache-2.0
"""What is known of each key of a config."""

import dataclasses

import pytest

from vit_jax.config.schema import (
    RENAMED,
    SECTIONS,
    Config,
    may_change,
    per_host_keys,
    read_config,
    read_section,
    top_level,
)
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import keywords


@pytest.mark.parametrize(
    "key",
    [
        *("total_steps", "epochs", "examples", "log_every", "log_every_epochs", "init_from"),
        *("mesh.fsdp", "evals.val.every", "evals.val.name", "checkpoint.every_percent"),
        *("tracking.trackers", "watchdog.step", "resume.allow", "profile.steps"),
        *("data.data_dir", "data.num_threads", "data.max_corrupt", "data.max_ram_gb"),
    ],
)
def test_length_place_and_cadence_may_change_on_resume(key):
    assert may_change(key)


@pytest.mark.parametrize(
    "key",
    [
        *("seed", "precision", "ema_decay", "model.hidden_size", "optimizer.lr", "objective.name"),
        *("data.name", "data.batch_size", "data.preprocess", "data.repeats", "data", "unknown"),
    ],
)
def test_what_is_trained_may_not(key):
    assert not may_change(key)


def test_hosts_may_keep_their_data_and_use_their_cores_as_they_like():
    assert per_host_keys() == ["data.data_dir", "data.num_threads", "data.max_ram_gb"]


def test_the_keys_as_written_are_those_of_the_schema():
    fields = {field.name: field for field in dataclasses.fields(Config)}
    assert keywords(top_level).keys() == fields.keys()
    assert {"data", "model", "optimizer", "evals", "watchdog"} <= set(SECTIONS)
    for new in RENAMED.values():
        assert new.partition(".")[0] in fields


def test_a_section_that_is_left_out_or_none_has_its_defaults():
    given = {"model": {}, "data": {}, "optimizer": {}, "watchdog": None}
    read = read_config(given)
    assert (read["watchdog"], read["evals"], read["log_every"]) == ({}, {}, None)
    limits, args = read_section("watchdog", read["watchdog"] | {"step": 7})
    assert (limits.step, args["step"], args["save"]) == (7, 7, limits.save)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": None}, "data=None is a NoneType; expected dict"),
        ({"model": 3}, "model=3 is an int; expected dict"),
        ({"watchdog": 3}, "watchdog=3 is an int; expected dict or None"),
        (
            {"warmup_steps": 3},
            "unknown config key warmup_steps; did you mean '--config.optimizer.warmup_steps'?",
        ),
        (
            {"batch_eval": 3},
            "unknown config key batch_eval; did you mean '--config.evals.NAME.batch_size'?",
        ),
        (
            {"pretrained_dir": "x"},
            "unknown config key pretrained_dir; did you mean '--config.init_from'?",
        ),
        ({"sede": 3}, "unknown config key sede; did you mean '--config.seed'"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(UserError) as error:
        read_config({"model": {}, "data": {}, "optimizer": {}} | change)
    assert words in str(error.value)


def test_a_missing_section_is_named():
    with pytest.raises(UserError, match=r"data is missing, and has no default"):
        read_config({"model": {}, "optimizer": {}})
