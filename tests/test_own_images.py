# SPDX-License-Identifier: Apache-2.0
"""Runs on the user's own images, from the config to the workdir."""

import json

import numpy as np
import pytest

from tests.images import encode, write_folder
from tests.tiny import tiny_config
from vit_jax.observe.jsonl import read_metrics
from vit_jax.training.experiment import Experiment
from vit_jax.training.run import train
from vit_jax.utils.errors import UserError

COUNTS = {"train/cat": 20, "train/dog": 20, "test/cat": 5, "test/dog": 6}


def config(name=None, **changes):
    """A run of four steps on a folder; `None` leaves a key out."""
    own = {
        "total_steps": 4,
        "data__name": name,
        "data__preprocess": "decode|resize(8)",
        "data__batch_size": 8,
        "evals__val": {"split": "test", "preprocess": "decode|resize(8)", "every": 2},
        "checkpoint__every": 2,
        "optimizer__warmup_steps": 0,
        "log_every": 1,
    }
    made = tiny_config("", **(own | changes))
    for key in [key for key, value in made.data.items() if value is None]:
        del made.data[key]
    return made


def run(made, workdir):
    train(made, str(workdir), command="train")


def refuse(call, *words):
    with pytest.raises(UserError) as error:
        call()
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def animals(tmp_path):
    return f"folder:{write_folder(tmp_path / 'animals', COUNTS)}"


def test_class_names_stand_in_the_workdir_and_guard_it(animals, tmp_path, said):
    workdir = tmp_path / "w"
    run(config(animals, total_steps=2), workdir)
    labels = workdir / "labels.txt"
    assert labels.read_text() == "cat\ndog\n"
    assert f"wrote {labels}: 2 class names" in said
    assert "images: train 40, val 11 (test)" in said
    labels.unlink()  # as in a run of an earlier version
    run(config(animals, total_steps=4), workdir)
    assert labels.read_text() == "cat\ndog\n"
    labels.write_text("cat\neel\n")
    again = config(animals, total_steps=6)
    refuse(lambda: run(again, workdir), "labels.txt", "label 1 is 'eel' there and 'dog' here")
    labels.write_text("cat\n")
    refuse(lambda: run(again, workdir), "labels.txt has 1 classes, the data 2")


def test_corrupt_images_are_counted_in_the_metrics(animals, tmp_path, said):
    (tmp_path / "animals/train/cat/000.png").write_bytes(b"")
    (tmp_path / "animals/test/cat/000.png").write_bytes(b"")
    run(config(animals, total_steps=10, log_every=10), tmp_path / "w")
    records = read_metrics(tmp_path / "w")
    (_, trained) = [r for r in records if "train/loss" in r]  # after the first step and the last
    # Two epochs of 40, and what is loaded ahead of them.
    assert 2 <= trained["data/corrupt"] <= 5
    assert any("images/s" in line and "  corrupt " in line for line in said)
    evaluated = [r for r in records if "val/count" in r]
    assert {(r["val/count"], r["val/corrupt"]) for r in evaluated} == {(10, 1)}
    assert any("val/corrupt 1" in line.split("  ") for line in said)


def test_too_many_corrupt_images_stop_the_run(animals, tmp_path):
    for path in (tmp_path / "animals/train/cat").iterdir():
        path.write_bytes(b"")
    refuse(lambda: run(config(animals, total_steps=50), tmp_path / "w"), "data.max_corrupt=0.001")
    made = config(animals, data__max_corrupt=2.0)
    refuse(lambda: Experiment.from_config(made), "data.max_corrupt=2.0", "0 to 1")


def test_an_evaluation_without_images_is_refused(animals, tmp_path):
    for path in (tmp_path / "animals/test").rglob("*.png"):
        path.write_bytes(b"")
    refuse(lambda: run(config(animals), tmp_path / "w"), "evals.val", "no image of test")


@pytest.fixture
def mixture(animals, tmp_path):
    other = write_folder(tmp_path / "other", {"cat": 20, "dog": 30})
    return ((animals, "train", 0.7), (f"folder:{other}", "train", 0.3))


def test_a_mixture_is_trained_on_and_goes_on(animals, mixture, tmp_path):
    changes = {"data__split": None, "data__mixture": mixture, "evals__val__data_name": animals}
    for steps in (2, 4):
        run(config(total_steps=steps, **changes), tmp_path / "w")
    assert read_metrics(tmp_path / "w")[-1]["val/count"] == 11
    written = json.loads((tmp_path / "w" / "config.json").read_text())
    assert written["data"]["mixture"] == [list(part) for part in mixture]
    other = config(**changes | {"data__mixture": (*mixture[:1], (*mixture[1][:2], 0.5))})
    refuse(lambda: run(other, tmp_path / "w"), "data.mixture", "another experiment")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evals__val__data_name": None}, ["evals.val.data_name is missing", "data.mixture"]),
        ({"data__split": "train"}, ["data.mixture and", "data.split='train'"]),
        ({"data__mixture": ()}, ["data.name is missing"]),
        ({"data__mixture": (("folder:x", "train"),)}, ["data.mixture=", "expected tuple"]),
        ({"data__mixture": (("folder:x", "train", 0.0),)}, ["data.mixture: weight 0.0"]),
    ],
)
def test_mixtures_that_will_not_do_are_refused(changes, words, animals, mixture):
    made = {"data__split": None, "data__mixture": mixture, "evals__val__data_name": animals}
    refuse(lambda: Experiment.from_config(config(**made | changes)), *words)


def test_an_evaluation_may_be_on_another_dataset(animals, tmp_path):
    write_folder(tmp_path / "more", {"test/cat": 7, "test/dog": 2})
    made = config(animals, evals__val__data_name=f"folder:{tmp_path / 'more'}")
    (evaluator,) = Experiment.from_config(made).evaluators
    assert len(evaluator.data.open()) == 9
    write_folder(tmp_path / "wrong", {"test/cat": 7, "test/elk": 2})
    made = config(animals, evals__val__data_name=f"folder:{tmp_path / 'wrong'}")
    refuse(lambda: Experiment.from_config(made), "evals.val.data_name", "'elk'", "'dog'")


def test_a_batch_is_no_larger_than_the_split(animals, tmp_path):
    made = config(animals, data__batch_size=48)
    refuse(lambda: run(made, tmp_path / "w"), "data.batch_size=48", "40 examples", "batch_size=32")
    made = config(animals, data__batch_size=48, total_steps=None, epochs=2)
    refuse(lambda: Experiment.from_config(made), "data.batch_size=48", "40 examples")


def test_fewer_classes_than_the_data_has_are_refused(animals):
    made = config(animals, model__num_classes=1)
    refuse(lambda: Experiment.from_config(made), "model.num_classes=1", "2 classes of folder:")


def test_several_labels_are_trained_with_sigmoids(tmp_path):
    labels = ["red|round", "green", "", "round"] * 5
    (tmp_path / "list.csv").write_text(
        "image,labels\n" + "".join(f"{n}.png,{text}\n" for n, text in enumerate(labels))
    )
    for number in range(len(labels)):
        (tmp_path / f"{number}.png").write_bytes(encode(number))
    name = f"manifest:{tmp_path / 'list.csv'}"
    changes = {"evals__val__split": "validation"}
    refuse(lambda: Experiment.from_config(config(name, **changes)), "objective.loss='sigmoid'")
    made = config(name, objective={"loss": "sigmoid", "mixup": 0.2}, total_steps=2, **changes)
    assert Experiment.from_config(made).abstract_batch["label"].shape == (8, 3)
    run(made, tmp_path / "w")
    assert (tmp_path / "w" / "labels.txt").read_text() == "green\nred\nround\n"
    assert np.isfinite(read_metrics(tmp_path / "w")[-1]["val/loss"])
