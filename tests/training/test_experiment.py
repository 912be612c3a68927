# SPDX-License-Identifier: Apache-2.0
"""What a config comes to: durations, rates, and what is said of them."""

import gc

import numpy as np
import pytest

from tests.images import write_folder
from tests.tiny import tiny_config
from vit_jax.checkpoint.pretrained.adapt import compare_preprocess
from vit_jax.checkpoint.pretrained.npz import write_npz
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.checkpoint.workdir import write_config
from vit_jax.data.ops.transforms import Random
from vit_jax.objectives.supervised import Supervised
from vit_jax.optim.summary import describe_rates, group_params, summarize_params
from vit_jax.training.experiment import Experiment
from vit_jax.training.resume import open_workdir
from vit_jax.training.run import make_longer_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import trust_parts
from vit_jax.utils.tree import flatten


def build(data_dir, **changes):
    return Experiment.from_config(tiny_config(data_dir, **changes), epoch_examples=160)


@pytest.mark.parametrize(
    ("length", "steps", "longer"),
    [
        ({"total_steps": 8}, 8, "--config.total_steps=16"),
        ({"epochs": 2.5}, 25, "--config.epochs=5.0"),
        ({"examples": 320}, 20, "--config.examples=640"),
    ],
)
def test_the_length_of_a_run_has_three_units(length, steps, longer, data_dir):
    experiment = build(data_dir, **({"total_steps": None} | length))
    assert experiment.total_steps == steps
    # The length that was given is replaced, in either way to write it.
    (key,) = length
    for given in ("", f" --config.{key}=3 --config.seed=1", f" --config.{key} 3 --config.seed=1"):
        command = f"python -m vit_jax.main '--config=a b'{given} --config.{key}s=1"
        seed = " --config.seed=1" if given else ""
        assert make_longer_command(command, experiment) == (
            f"python -m vit_jax.main '--config=a b'{seed} --config.{key}s=1 {longer}"
        )


def test_shapes_and_values_of_a_state_take_one_trace(data_dir, monkeypatch):
    experiment, traced, init = build(data_dir), [], Supervised.init
    monkeypatch.setattr(Supervised, "init", lambda *x: traced.append(x) or init(*x))
    shapes = experiment.abstract_state
    gc.collect()
    state = experiment.init_state()
    assert len(traced) == 1
    assert {p: (x.shape, x.sharding) for p, x in flatten(state).items()} == {
        p: (x.shape, x.sharding) for p, x in flatten(shapes).items()
    }


@pytest.mark.parametrize(("total", "every"), [(4, 1), (50, 1), (240, 2), (4000, 40), (90_000, 900)])
def test_a_hundredth_of_the_steps_is_logged_by_default(total, every, data_dir):
    experiment = build(data_dir, total_steps=total, log_every=None)
    assert experiment.settings.log_every == every
    assert experiment.config["log_every"] is None  # A longer run has another period.


def test_cadences_have_four_units_and_stay_as_given(data_dir):
    experiment = build(
        data_dir,
        total_steps=40,
        checkpoint={"every_epochs": 0.5},
        evals={"val": {"split": "test", "preprocess": "decode", "every_percent": 25}},
        log_every=None,
        log_every_examples=64,
        optimizer={"lr": 0.1, "warmup_percent": 10},
    )
    assert experiment.settings.checkpoint.every == 5
    assert experiment.evaluators[0].every == 10
    assert experiment.config["log_every_examples"] == 64
    assert experiment.config["checkpoint"]["every_epochs"] == 0.5
    assert experiment.config["evals"]["val"]["every_percent"] == 25
    assert experiment.config["optimizer"]["warmup_percent"] == 10
    assert "warmup_steps" not in experiment.config["optimizer"]
    assert float(experiment.optimizer.schedule(4)) == pytest.approx(0.1)
    # The resolved config comes to the same.
    again = Experiment.from_config(experiment.config, epoch_examples=160)
    assert again.config == experiment.config


def test_defaults_are_written_down_as_steps(data_dir):
    config = build(data_dir).config
    assert config["optimizer"]["warmup_steps"] == 2
    assert config["optimizer"]["cooldown_steps"] == 0
    assert not {key for key in config["optimizer"] if key.endswith(("_epochs", "_percent"))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, "total_steps=8 and epochs=3: expected exactly one of them"),
        ({"total_steps": None}, "total_steps=None and epochs=None and examples=None: expected"),
        ({"total_steps": None, "examples": 3}, "examples=3: expected at least 1 step"),
        ({"checkpoint__every_epochs": 3}, r"checkpoint\.every=4 and checkpoint\.every_epochs=3"),
        ({"log_every_percent": 3}, "^log_every=2 and log_every_percent=3"),
        ({"evals__val__every_epoch": 3}, r"unknown config key evals\.val\.every_epoch"),
        ({"ema_decay": 1.0}, r"ema_decay=1\.0: expected 0 <= value < 1"),
    ],
)
def test_contradictions_are_refused(changes, message, data_dir):
    with pytest.raises(UserError, match=message):
        build(data_dir, **changes)


def test_another_batch_size_changes_the_learning_rate_and_it_is_said(data_dir):
    scaling = {"optimizer__lr_scaling": "linear", "optimizer__base_batch_size": 64}
    experiment = build(data_dir, **scaling)
    assert describe_rates(experiment.optimizer) == [
        "learning rate: peak 0.0025 for batches of 16: 0.01 for 64, times 0.25",
        "weight decay: 0.1 x learning rate = 0.00025 x schedule",
    ]


def test_decay_by_the_schedule_is_said_in_both_conventions(data_dir):
    options = {"lr": 1e-3, "weight_decay": 1e-4, "weight_decay_times": "schedule"}
    assert describe_rates(build(data_dir, optimizer=options).optimizer) == [
        "learning rate: peak 0.001",
        "weight decay: 0.1 x learning rate = 0.0001 x schedule",
    ]


def test_parameters_that_are_treated_alike_are_one_row(data_dir):
    experiment = build(
        data_dir,
        model__num_layers=2,
        optimizer__freeze=("embedding/.*",),
        optimizer__layer_decay=0.5,
        optimizer__schedules=(("head/kernel", {"schedule": "constant"}),),
    )
    rows = summarize_params(experiment.optimizer, experiment.abstract_state.params)
    assert group_params(rows) == [
        ("trained", "12", "4,096", "yes", "x 0.25 to 0.5"),
        ("schedule of head/kernel", "1", "160", "yes", "x 1"),
        ("trained", "25", "682", "no", "x 0.125 to 1"),
        ("frozen", "2", "208", "no", ""),
    ]


def test_a_longer_run_may_be_counted_otherwise_but_keeps_its_warmup(data_dir, tmp_path):
    def start(**changes):
        config = build(data_dir, evals={}, **changes).config
        write_config(open_workdir(str(tmp_path), config), config)

    warmup = {"optimizer": {"lr": 1e-2, "warmup_percent": 25}}
    start(total_steps=4, **warmup)
    start(total_steps=None, epochs=2, **warmup)
    start(total_steps=None, examples=640, log_every=None, log_every_epochs=1, **warmup)
    start(total_steps=80, checkpoint={"every_percent": 50}, **warmup)
    with pytest.raises(UserError, match=r"optimizer\.warmup_percent is 25 there"):
        start(total_steps=80, optimizer={"lr": 1e-2, "warmup_steps": 20})


def test_a_head_that_is_kept_for_other_classes_is_named(tmp_path, said):
    write_folder(tmp_path / "own", {"train/cat": 8, "train/dog": 8})
    data = {"data__name": f"folder:{tmp_path / 'own'}", "data__preprocess": "decode|resize(8)"}

    def make(**changes):
        return build("", **data, evals={}, **changes)

    experiment = make()
    params = {k: np.full_like(v, 0.1) for k, v in flatten(experiment.initial_params()).items()}
    model = experiment.description["model"]
    for names in (("dog", "cat"), ("cat", "dog")):
        weights = Weights(params=params, layout="test", model=model, class_names=names)
        write_npz(tmp_path / f"{names[0]}.npz", weights)
    make(init_from=str(tmp_path / "dog.npz")).init_state()
    (line,) = [line for line in said if "class 0 was" in line]
    assert "head: class 0 was 'dog' and is 'cat'" in line
    said.clear()
    make(init_from=str(tmp_path / "cat.npz")).init_state()
    assert "  head: kept, 2 classes" in said
    assert not any("class 0 was" in line for line in said)


def test_evaluators_on_other_data_have_the_labels_of_the_run(tmp_path, said):
    write_folder(tmp_path / "own", {f"train/{name}": 8 for name in ("cat", "dog", "eel")})
    write_folder(tmp_path / "some", {"test/dog": 1, "test/eel": 1})
    write_folder(tmp_path / "other", {"test/cat": 1, "test/fox": 1})
    line = "decode|resize(8)"
    options = {"data__name": f"folder:{tmp_path / 'own'}", "data__preprocess": line}

    def make(other, **evaluator):
        evaluator |= {"data_name": f"folder:{tmp_path / other}", "preprocess": line}
        return build("", **options, evals={"val": {"split": "test"} | evaluator})

    data = make("some").evaluators[0].data
    assert data.info.class_names == ("cat", "dog", "eel")
    source = data.open()
    assert {(source.describe(i).split("/")[-2], int(source[i]["label"])) for i in (0, 1)} == {
        ("dog", 1),
        ("eel", 2),
    }
    assert any(line.startswith("val: folder:") and "2 of 2 labels" in line for line in said)
    with pytest.raises(
        UserError, match=r"evals\.val\.data_name: folder:.*other has 2 classes.*lacks 'fox'"
    ):
        make("other")
    # A classifier that is fit to the other data needs no classes of the run.
    (near,) = make("other", name="knn", train_split="test", k=(1,)).evaluators
    assert near.data.info.class_names == ("cat", "fox")


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("decode|inception_crop(8)|flip_lr", "decode|resize(8, method='bilinear')"),
        ("decode|resize(8)|tests.training.test_experiment:half", None),
    ],
)
def test_without_evaluators_images_are_prepared_without_random_choices(line, want, data_dir):
    trust_parts("tests.training.test_experiment")
    experiment = build(data_dir, evals={}, data__preprocess=line)
    assert experiment.description["preprocess"]["eval"] == want
    assert compare_preprocess({"eval": "decode"}, {"mean": 0.5, "std": 0.5, "eval": None}) == []


class Half(Random):
    """Halves images, as a stand-in for an operation from outside that changes their size."""

    def change(self, image, rng):
        return image[::2, ::2]


def half():
    return Half()
