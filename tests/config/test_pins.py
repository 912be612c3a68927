# SPDX-License-Identifier: Apache-2.0
"""The commits of datasets of the hub that a run reads."""

import json

import pytest
from ml_collections import ConfigDict

from tests.hub_server import forget_all, hub, parquet, push_birds
from tests.tiny import tiny_config
from vit_jax.checkpoint.workdir import read_config
from vit_jax.config.pins import find_pins, use_pins
from vit_jax.data.sources.tfds import NotPreparedError, preparing_nothing
from vit_jax.training.run import train
from vit_jax.utils.errors import UserError

__all__ = ["hub"]

NAME = "hf:me/birds"


def test_names_get_the_commit_that_is_read(hub, tmp_path):
    commit = push_birds(hub)
    sections = {
        "data": {"mixture": ((NAME, "train", 1.0), ("folder:x", "train", 2.0))},
        "evals": {"val": {"data_name": f"{NAME}#label=label"}, "test": {"data_name": None}},
        "init_from": "hf:me/weights",
    }
    config = ConfigDict(sections)
    pins = find_pins(config, tmp_path / "none")
    assert pins == {
        NAME: f"{NAME}@{commit}",
        f"{NAME}#label=label": f"{NAME}@{commit}#label=label",
    }
    pinned = use_pins(config, pins)
    assert pinned["data"]["mixture"] == (
        (f"{NAME}@{commit}", "train", 1.0),
        *sections["data"]["mixture"][1:],
    )
    assert pinned["evals"]["val"]["data_name"] == f"{NAME}@{commit}#label=label"
    assert pinned["evals"]["test"] == {"data_name": None}
    assert pinned["init_from"] == "hf:me/weights"


def test_a_run_that_resumes_reads_the_commit_of_its_config(hub, tmp_path):
    first = push_birds(hub)
    required = {key: {} for key in ("data", "model", "optimizer", "evals")}
    config = required | {"data": {"name": NAME, "split": "train"}}
    recorded = use_pins(config, find_pins(config, tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    hub.push("me/birds", {"data/train-00000-of-00001.parquet": parquet([7], [0])})
    forget_all()
    hub.requests.clear()
    assert find_pins(config, tmp_path) == {NAME: f"{NAME}@{first}"}
    assert hub.requests == []
    other = config | {"data": {"name": f"{NAME}@main"}}
    assert first not in str(find_pins(other, tmp_path))


def test_configs_of_other_data_ask_nothing(hub, tmp_path):
    assert find_pins({"data": {"name": "cifar10"}, "init_from": "hf:a/b"}, tmp_path) == {}
    with pytest.raises(UserError, match="there is no dataset"):
        find_pins({"data": {"name": "hf:me/none"}}, tmp_path)
    assert find_pins({"data": {"name": "hf:./x"}}, tmp_path) == {"hf:./x": "hf:./x"}


def test_nothing_is_downloaded_where_nothing_may_be(hub, tmp_path):
    push_birds(hub)
    config = {"data": {"name": NAME}}
    with preparing_nothing(), pytest.raises(NotPreparedError, match="is not in the cache yet"):
        find_pins(config, tmp_path)
    assert hub.requests == []


@pytest.mark.slow
def test_a_run_records_its_commit_and_resumes_with_it(hub, tmp_path):
    first = push_birds(hub)
    changes = {"data__name": NAME, "data__preprocess": "decode|resize(8)", "data__batch_size": 8}
    evals = {"val": {"split": "test", "preprocess": "decode|resize(8)", "every": 2}}
    changes |= {"evals": evals, "total_steps": 6, "checkpoint__every": 2}
    config = tiny_config("", **changes | {"total_steps": 4})
    train(config, str(tmp_path / "run"))
    assert read_config(tmp_path / "run")["data"]["name"] == f"{NAME}@{first}"
    hub.push("me/birds", {"data/train-00000-of-00001.parquet": parquet([7], [0])})
    forget_all()
    config = tiny_config("", **changes)
    assert train(config, str(tmp_path / "run")).step == 6
    with pytest.raises(UserError, match=r"data.name is 'hf:me/birds@\w+' there and"):
        train(tiny_config("", **changes | {"data__name": f"{NAME}@main"}), str(tmp_path / "run"))
