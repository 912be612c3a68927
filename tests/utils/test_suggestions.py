# SPDX-License-Identifier: Apache-2.0
"""Which name, key or folder an error suggests."""

import pytest

from vit_jax.utils.suggestions import (
    find_near_path,
    suggest,
    suggest_flag,
    suggest_key,
    suggest_workdir,
)

OPTIMIZERS = ("adam", "adamw", "sgd", "schedule_free_adamw")
SCHEDULES = ("cosine", "linear", "exponential", "rsqrt", "constant")
KEYS = {
    "epochs": (),
    "optimizer.lr": (),
    "optimizer.weight_decay": (),
    "optimizer.momentum": ("lars", "sgd"),
    "data.batch_size": (),
    "evals.val.batch_size": (),
    "evals.val.every": (),
    "checkpoint.every": (),
}


@pytest.mark.parametrize(
    ("name", "options", "meant"),
    [
        ("adamW", OPTIMIZERS, "adamw"),
        ("Adam_W", OPTIMIZERS, "adamw"),
        ("sgdd", OPTIMIZERS, "sgd"),
        ("nesterov", OPTIMIZERS, "sgd"),
        ("RandomHorizontalFlip", ("flip_lr", "resize"), "flip_lr"),
        ("CrossEntropy", ("softmax", "sigmoid"), "softmax"),
        ("torch.nn.CrossEntropyLoss", ("softmax", "sigmoid"), "softmax"),
        ("torch.optim.AdamW", OPTIMIZERS, "adamw"),
        ("FusedSGD", OPTIMIZERS, "sgd"),
        ("CosineAnnealingLR", SCHEDULES, "cosine"),
        ("torch.optim.lr_scheduler.OneCycleLR", SCHEDULES, "cosine"),
        ("LinearLR", SCHEDULES, "linear"),
        ("photo.JPG", ("photo.jpg", "a.jpg"), "photo.jpg"),
        ("16-mixed", ("bfloat16", "float32"), "bfloat16"),
        ("B-16", ("B/16", "B/8"), "B/16"),
    ],
)
def test_a_name_in_another_spelling_or_of_another_project(name, options, meant):
    assert suggest(name, options) == f"; did you mean {meant!r}?"


def test_a_name_that_is_like_none_lists_what_there_is():
    assert suggest("rmsprop", ("sgd", "adam")) == "; there is: adam, sgd"
    assert suggest("rmsprop", ()) == ""
    assert suggest("zzz", map(str, range(100, 200))).endswith(", 139, ... (100 in all)")


@pytest.mark.parametrize(
    ("key", "allowed", "meant"),
    [
        # At the top, the key of a section.
        ("weight_decay", ("epochs",), "'--config.optimizer.weight_decay'"),
        ("lr", ("epochs",), "'--config.optimizer.lr'"),
        ("LR", ("epochs",), "'--config.optimizer.lr'"),
        ("epoch", ("epochs", "seed"), "'--config.epochs'"),
        # That of training, and not that of an evaluator.
        ("batch_size", ("epochs",), "'--config.data.batch_size'"),
        ("every", ("epochs",), "'--config.checkpoint.every'"),
        # In the wrong section.
        ("data.lr", ("batch_size",), "'--config.optimizer.lr'"),
        # The nearest of the section comes before that of another one.
        ("evals.val.evry", ("every",), "'--config.evals.val.every'"),
        ("wieght_decay", ("epochs",), "'--config.optimizer.weight_decay'"),
        # Of timm, Lightning and others.
        ("model.drop_path", ("depth",), "'--config.model.stochastic_depth_rate'"),
        ("random_flip", ("epochs",), "'--config.objective.flip'"),
        ("max_epochs", ("epochs",), "'--config.epochs'"),
        ("opt", ("optimizer",), "'--config.optimizer.name'"),
        ("early_stopping", ("epochs",), "'--config.stop.metric' or '--config.stop.patience'"),
        # A name that several keys have elsewhere: that of the section comes first.
        ("monitor", ("epochs",), "'--config.stop.metric' or '--config.checkpoint.keep_best'"),
        ("stop.monitor", ("metric", "patience"), "'--config.stop.metric'"),
        ("checkpoint.monitor", ("every",), "'--config.checkpoint.keep_best'"),
        ("strategy", (), "'--config.mesh.data' or '--config.mesh.fsdp'"),
    ],
)
def test_an_unknown_key_is_looked_for_in_the_whole_config(key, allowed, meant):
    assert suggest_key(key, allowed, KEYS) == f"; did you mean {meant}?"


@pytest.mark.parametrize(
    ("key", "below", "meant"),
    [
        ("trainer", ["max_epochs"], "epochs"),
        ("training", ["batch_size"], "data.batch_size"),
        ("optim", ["lr"], "optimizer.lr"),
        ("TRAIN", ["EPOCHS"], "epochs"),
        ("model", ["vit", "drop_path"], "model.stochastic_depth_rate"),
        ("scheduler", ["name"], "optimizer.schedule"),
        ("optimizer.init_args", ["lr"], "optimizer.lr"),
        ("callbacks", ["early_stopping", "monitor"], "stop.metric"),
        # A section with nearly the name.
        ("evls", ["val", "every"], "evals.val.every"),
    ],
)
def test_a_section_of_another_project_is_looked_up_by_its_leaf(key, below, meant):
    hint = suggest_key(key, ("epochs", "tracking"), KEYS, below=below)
    assert hint.startswith(f"; did you mean '--config.{meant}'")


def test_a_section_of_another_project_is_not_taken_for_one_that_is_spelled_like_it():
    hint = suggest_key("trainer", ("epochs", "tracking"), KEYS, below=["no_such_key"])
    assert hint == "; there is: epochs, tracking"


def test_a_key_of_another_part_is_said_to_be_that():
    hint = suggest_key("optimizer.momentum", ("b1", "b2"), KEYS)
    assert hint == "; it is a key of optimizer.name='lars' or 'sgd'"


def test_a_key_that_a_part_from_outside_lacks_is_not_meant_by_itself():
    assert suggest_key("model.zzz", ("layers",), {"model.zzz": ()}) == "; there is: layers"


def test_a_key_that_is_like_none_lists_those_of_its_section():
    assert suggest_key("data.zzz", ("name", "split"), KEYS) == "; there is: name, split"


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr=0.1", "; did you mean '--config.optimizer.lr'?"),
        ("batch-size", "; did you mean '--config.data.batch_size'?"),
        ("epochs", "; did you mean '--config.epochs'?"),
        ("drop-path", "; did you mean '--config.model.stochastic_depth_rate'?"),
        ("output_dir", "; did you mean '--workdir'?"),
        ("sweep", "; did you mean 'vit_jax sweep'?"),
        ("--optimizer.lr=0.1", "; did you mean '--config.optimizer.lr'?"),
        ("lr=0.1", "; did you mean '--config.optimizer.lr'?"),
        ("zzz", ""),
    ],
)
def test_a_flag_of_another_project_is_a_key_of_the_config(flag, meant):
    assert suggest_flag(flag) == meant


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of two runs, one of a sweep, and other files."""
    monkeypatch.chdir(tmp_path)
    for run in ("runs/a", "runs/lr/lr=1"):
        (tmp_path / run / "checkpoints" / "4").mkdir(parents=True)
        (tmp_path / run / "config.json").write_text("{}")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").touch()
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("runs", "runs holds 2 workdirs: did you mean 'runs/a' or 'runs/lr/lr=1'?"),
        ("runs/lr", "runs/lr holds the workdir of a run: did you mean 'runs/lr/lr=1'?"),
        ("runs/a/checkpoints", "is within a workdir: did you mean 'runs/a'?"),
        ("runs/a/checkpoints/4", "is within a workdir: did you mean 'runs/a'?"),
        ("runs/a/config.json", "is within a workdir: did you mean 'runs/a'?"),
        ("run/a", "it does not exist; did you mean 'runs/a'?"),
        ("elsewhere", "it does not exist"),
        ("configs/digits.py", "is a config file: give the folder"),
        ("configs", "holds Python files, such as configs/digits.py"),
        ("photos", "photos holds cat"),
        ("empty", "empty is empty: no run has begun there"),
        ("runs/a", None),
    ],
)
def test_a_path_that_is_no_workdir_is_named_with_what_to_give_instead(place, path, words):
    hint = suggest_workdir(place.__class__(path))
    assert hint == "" if words is None else words in hint


def test_a_folder_within_the_current_workdir_is_that_workdir(place, monkeypatch):
    monkeypatch.chdir(place / "runs" / "a" / "checkpoints")
    found = suggest_workdir(place.__class__("4"))
    assert found.endswith(f"did you mean {str(place / 'runs' / 'a')!r}?")


def test_a_path_is_nearly_named_in_any_of_its_folders(place):
    make = place.__class__
    assert find_near_path(make("run/a")) == make("runs/a")
    assert find_near_path(make("config/digit.py")) == make("configs/digits.py")
    assert find_near_path(place / "run") == place / "runs"
    assert find_near_path(make("nowhere/a")) is None
