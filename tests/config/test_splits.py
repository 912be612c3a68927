# SPDX-License-Identifier: Apache-2.0
"""The splits of a config on data that has none of its own."""

import pytest

from tests.images import write_folder
from vit_jax.config.build import build_parts
from vit_jax.config.load import load_config
from vit_jax.config.splits import use_cut

CLASSES = {"cat": 20, "dog": 30}


def adapt(name, split, evals):
    config = {"data": {"name": name, "split": split}, "evals": evals}
    adapted = use_cut(config)
    assert config["data"]["split"] == split
    found = {key: section and section["split"] for key, section in adapted["evals"].items()}
    return adapted["data"]["split"], found


@pytest.fixture
def flat(tmp_path):
    """A folder of classes, without splits: 40 images to train on, and 5 in each other split."""
    return f"folder:{write_folder(tmp_path / 'flat', CLASSES)}"


@pytest.mark.parametrize("name", ["folder", "augreg:Ti_16"])
def test_configs_read_the_splits_of_a_folder_without_any(name, flat, said):
    overrides = {"data.name": flat, "data.batch_size": 32, "optimizer.accum_steps": 1}
    parts = build_parts(load_config(name, overrides))
    sizes = {e.name: (e.data.split, len(e.data.open())) for e in parts.evaluators}
    assert sizes == {"val": ("validation", 5), "test": ("test", 5)}
    assert (parts.train_data.split, len(parts.train_data.open())) == ("train", 40)
    assert any(
        f"{flat}: as it has a validation split, data.split='train[:9" in line for line in said
    )
    # What a workdir keeps is what was used, so that other commands need not adapt it.
    said.clear()
    assert build_parts(parts.config).config == parts.config
    assert said == []


def test_splits_that_the_data_has_stay_as_they_are(tmp_path):
    counts = {f"{split}/{name}": n for split in ("train", "val") for name, n in CLASSES.items()}
    name = f"folder:{write_folder(tmp_path, counts)}"
    evals = {"val": {"split": "train[98%:]"}}
    assert adapt(name, "train[:98%]", evals) == ("train[:98%]", {"val": "train[98%:]"})


@pytest.mark.parametrize(
    ("split", "evals"),
    [
        ("train", {"val": {"split": "train[98%:]"}}),
        ("train[:50%]", {"val": {"split": "train[98%:]"}}),
        ("train[:98%]", {"val": {"split": "validation"}, "none": None}),
        ("train[:98%]", {"val": {"split": "train[98%:]", "data_name": "digits"}}),
        ("train[:98%]", {}),
    ],
)
def test_what_is_not_cut_off_the_end_of_train_stays_as_it_is(split, evals, flat):
    assert adapt(flat, split, evals)[0] == split


def test_a_count_is_as_good_as_a_share(flat):
    evals = {"val": {"split": "train[36:]"}, "test": {"split": "test"}, "none": None}
    expected = {"val": "validation", "test": "test", "none": None}
    assert adapt(flat, "train[:36]", evals) == ("train", expected)
