# SPDX-License-Identifier: Apache-2.0
"""Runs with each objective: on any mesh, stopped and resumed, and one after the other."""

import functools
import json

import cv2
import jax
import numpy as np
import pytest

from tests.tiny import tiny_config
from tests.training.test_run import assert_same, stop_at
from vit_jax.checkpoint.pretrained.adapt import describe_objective_params
from vit_jax.checkpoint.pretrained.load import load_params, load_pretrained
from vit_jax.checkpoint.pretrained.weights import OBJECTIVE_PARAMS
from vit_jax.evaluators.reconstruction import encode_grid
from vit_jax.objectives.depth import Depth
from vit_jax.objectives.linear_probe import LinearProbe
from vit_jax.objectives.mae import MaskedAutoencoder
from vit_jax.objectives.segmentation import Segmentation
from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.progress import Monitor
from vit_jax.training.experiment import Experiment
from vit_jax.training.run import train
from vit_jax.utils.errors import UserError

MODEL = {"patch_size": 2, "hidden_size": 16, "num_layers": 1, "num_heads": 4, "mlp_dim": 32}
FIXED = MODEL | {"position_embedding": "sincos2d_mae"}
DINO_HEAD = {"prototypes": 24, "head_width": 16, "bottleneck": 8}
VAL = {"split": "test[:50]", "preprocess": "decode", "every": 2}


def changes(name, teacher):
    """Of the tiny config, for an objective."""
    if name == "mae":
        decoder = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
        return {
            "model": FIXED,
            "objective": {"name": "mae", **decoder},
            "evals": {"val": VAL | {"name": "reconstruction"}},
        }
    if name == "linear_probe":
        return {
            "model": FIXED,
            "objective": {"name": "linear_probe", "lr_factors": (0.5, 1.0)},
            "optimizer__grad_clip_norm": None,
            "evals": {
                "val": VAL | {"name": "probes", "choose": True},
                "test": VAL | {"name": "probes", "split": "test[50:90]"},
            },
        }
    if name.startswith("dino"):
        parts = {"centering": "sinkhorn", "last_layer": "weight_norm", "ibot_head": "separate"}
        parts |= {"gram_weight": 2.0, "gram_start": {"steps": 1}, "gram_updates": ({"steps": 3},)}
        options = {"ibot_weight": 1.0, "koleo_weight": 0.1, "mask_ratio": (0.2, 0.5)}
        views = (
            ("global", 1, "decode|random_shift(2)"),
            ("local", 2, "decode|random_crop(4)"),
        )
        gram = ("gram", 2, "decode|random_shift(1)|resize(12)")
        full = name == "dino_sinkhorn"
        return {
            "model": MODEL,
            "data__views": (*views, gram) if full else views,
            "data__same_draws": ("gram",) if full else (),
            "objective": {"name": "dino", **DINO_HEAD, **options, "momentum": 0.9}
            | (parts if full else {}),
            "optimizer__train_after": (("dino_head/prototypes/.*", {"steps": 1}),),
            "optimizer__grad_clip_groups": ("dino_head/.*",),
            "optimizer__weight_decay_end": 0.3,
            "evals": {
                "knn": VAL | {"name": "knn", "train_split": "train[:100]", "k": (5,)},
                "patches": VAL | {"name": "patches"},
            },
        }
    return {
        "model": MODEL | {"distillation_token": True},
        "objective": {"name": "distillation", "teacher": teacher, "mixup": 0.2},
        "evals": {"val": VAL},
    }


NAMES = ["mae", "linear_probe", "distillation", "dino", "dino_sinkhorn"]


@pytest.fixture(scope="module")
def teacher(data_dir, tmp_path_factory):
    """A workdir with a model of another width."""
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    config = tiny_config(data_dir, total_steps=3, model__hidden_size=8, evals={})
    train(config, str(workdir), command="train")
    return str(workdir)


@pytest.fixture(scope="module")
def run_dir(data_dir, teacher, tmp_path_factory):
    """Gives the workdir of an uninterrupted run with an objective."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def make(name):
        config = tiny_config(data_dir, total_steps=4, checkpoint__every=2, **changes(name, teacher))
        train(config, str(folder / name), command="train")
        return folder / name

    return make


@pytest.mark.parametrize(
    "name",
    [n if n == "dino_sinkhorn" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_losses_do_not_depend_on_the_mesh(name, data_dir, teacher):
    options = changes(name, teacher) | {"evals": {}}
    want = run_losses(data_dir, options, devices=jax.devices()[:1])
    got = run_losses(data_dir, options, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def run_losses(data_dir, options, *, mesh=None, devices=None):
    config = tiny_config(data_dir, total_steps=5, mesh=mesh or {}, **options)
    experiment = Experiment.from_config(config, devices=devices)
    state, found = experiment.init_state(), []
    batches = experiment.train_batches(0)
    for _ in range(5):
        state, metrics = experiment.train_step(state, next(batches))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize(
    "name", [n if n == "distillation" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_a_stopped_run_ends_as_an_uninterrupted_one(
    name, run_dir, data_dir, teacher, tmp_path, monkeypatch
):
    config = tiny_config(data_dir, total_steps=4, checkpoint__every=2, **changes(name, teacher))
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "step", stop_at(3))
        with pytest.raises(KeyboardInterrupt):
            train(config, str(tmp_path / "w"), command="train")
    train(config, str(tmp_path / "w"), command="train")
    assert_same(load_params(tmp_path / "w")[0], load_params(run_dir(name))[0])


def test_a_teacher_leaves_nothing_in_the_checkpoint(run_dir):
    student = load_pretrained(str(run_dir("distillation")))
    assert student.model["distillation_token"]
    assert not student.objective_params
    stored = json.loads((run_dir("distillation") / "checkpoints/4/training/_METADATA").read_text())
    assert not any("teacher" in key for key in stored["tree_metadata"])


def test_an_autoencoder_is_fine_tuned_without_its_decoder(run_dir, data_dir, said):
    config = tiny_config(data_dir, init_from=str(run_dir("mae")), model=FIXED, evals={})
    state = Experiment.from_config(config).init_state()
    source = load_params(run_dir("mae"))[0]
    assert_same(state.params["Transformer"], source["Transformer"])
    assert "decoder" in source
    assert "decoder" not in state.params
    notes = [line.strip() for line in said if line.startswith("  decoder")]
    assert notes == ["decoder: only for pre-training: dropped"]
    assert any("head: none in the file: initialised" in line for line in said)


def test_the_same_objective_takes_its_own_parameters_over(run_dir, data_dir, teacher):
    """So that a checkpoint is evaluated with the decoder that it was trained with."""
    workdir = run_dir("mae")
    experiment = Experiment.from_config(tiny_config(data_dir, **changes("mae", teacher)))
    weights = load_pretrained(str(workdir))
    params, notes = experiment.fit_params(weights, experiment.initial_params())
    assert_same(params, load_params(workdir)[0])
    assert "decoder: kept" in notes
    last = read_metrics(workdir)[-1]
    (evaluator,) = experiment.evaluators
    again = evaluator.run(experiment.place_params(params))
    np.testing.assert_allclose(again["loss"], last["val/loss"], rtol=1e-6)


def test_learned_positions_and_a_register_go_on_from_an_autoencoder(run_dir, data_dir):
    config = tiny_config(
        data_dir,
        init_from=str(run_dir("mae")),
        model=MODEL | {"classifier": "gap", "num_registers": 1},
        evals={},
    )
    state = Experiment.from_config(config).init_state()
    source = load_params(run_dir("mae"))[0]
    np.testing.assert_array_equal(state.params["Transformer"]["registers"], source["cls"])


def test_an_autoencoder_shows_what_it_reconstructs(run_dir):
    grid = cv2.imread(str(run_dir("mae") / "evals/val_4.png"))
    assert grid.shape == (3 * 64, 8 * 64, 3)
    records = [r for r in read_metrics(run_dir("mae")) if "val/loss" in r]
    assert [r["step"] for r in records] == [2, 4]
    assert {r["val/count"] for r in records} == {50}


def test_a_probe_starts_from_an_autoencoder_and_names_the_best_head(
    run_dir, data_dir, teacher, tmp_path, said
):
    options = changes("linear_probe", teacher) | {"init_from": str(run_dir("mae"))}
    train(tiny_config(data_dir, total_steps=4, **options), str(tmp_path / "w"), command="train")
    source, params = load_params(run_dir("mae"))[0], load_params(tmp_path / "w")[0]
    assert_same(params["Transformer"], source["Transformer"])
    assert "  probe: none like it in the file: initialised" in said
    assert "  decoder: only for pre-training: dropped" in said
    last = read_metrics(tmp_path / "w")[-1]
    assert last["test/count"] == 40
    heads = {name: last[f"val/{name}_top1"] for name in ("x0.5", "x1")}
    assert last["val/top1"] == max(heads.values())
    best = max(heads, key=heads.get)
    assert f"  best head       {best} optimizer.lr, chosen on val" in said
    assert any(line.startswith("  test accuracy ") for line in said)
    assert describe_objective_params(load_pretrained(str(tmp_path / "w"))) == [
        "probe: the heads of a linear probe: dropped"
    ]


def test_loading_knows_what_objectives_add(data_dir):
    own = {*MaskedAutoencoder.objective_params, *LinearProbe.objective_params}
    own |= {Segmentation.head_params, Depth.head_params}
    gram = {"gram_weight": 1.0, "gram_start": {"steps": 1}}
    for change in ({}, {"ibot_head": "separate"} | gram):
        options = changes("dino", None)
        options["objective"] |= change
        own |= set(
            Experiment.from_config(tiny_config(data_dir, **options)).objective.objective_params
        )
    assert own == OBJECTIVE_PARAMS.keys()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mae", {"model": FIXED | {"num_classes": 10}}, r"model\.num_classes=10"),
        (
            "mae",
            {"model": {"name": "mixer", "variant": "S/8"}, "objective": {"name": "supervised"}}
            | {"evals": {"val": VAL | {"name": "patches"}}},
            r"evals\.val\.name='patches' is for the patches of model\.name='vit'",
        ),
        ("mae", {"evals": {"val": VAL}}, r"evals\.val\.name='classification'"),
        ("mae", {"model": {"name": "mixer", "variant": "S/8"}}, "expected model.name='vit'"),
        (
            "linear_probe",
            {"evals": {"val": VAL | {"name": "reconstruction"}}},
            "is for objective.name='mae'",
        ),
        ("linear_probe", {"optimizer__grad_clip_norm": 1.0}, r"optimizer\.grad_clip_norm=1\.0"),
        (
            "distillation",
            {"evals": {"val": VAL | {"name": "probes"}}},
            "is for objective.name='linear_probe'",
        ),
        ("dino", {"data__views": ()}, "needs a second global crop"),
        ("dino", {"ema_decay": 0.9}, r"ema_decay=0\.9 with objective\.name='dino'"),
        ("dino", {"evals": {"val": VAL}}, r"evals\.val\.name='classification'"),
        ("mae", {"data__views": (("local", 1, "decode"),)}, "takes one image of each record"),
        ("distillation", {"model": MODEL | {"num_classes": 12}}, "10 classes and the student 12"),
        ("mae", {"data__repeats": 0}, r"data\.repeats=0: expected 1 to data\.batch_size=16"),
    ],
)
def test_what_does_not_go_together_is_refused(name, change, words, data_dir, teacher):
    config = tiny_config(data_dir, **(changes(name, teacher) | change))
    with pytest.raises(UserError, match=words) as caught:
        Experiment.from_config(config).objective.notes()
    assert "\n" not in str(caught.value)


def test_a_student_learns_from_images_without_labels(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(16):
        folder = tmp_path / "train"
        folder.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 256, (8, 8, 3), np.uint8))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    data = {
        "data__name": f"pairs:{tmp_path}",
        "data__preprocess": "decode|resize(8)",
        "data__views": (
            ("global", 1, "decode|resize(8)|flip_lr"),
            ("local", 2, "decode|resize(8)|random_crop(4)"),
        ),
        "data__batch_size": 8,
    }
    options = changes("dino", None) | data | {"evals": {}}
    experiment = Experiment.from_config(tiny_config(None, total_steps=3, **options))
    assert "label" not in experiment.abstract_batch
    batch = next(experiment.train_batches(0))
    assert "label" not in batch
    # Finite losses are those of the same step on batches with labels.
    _, metrics = jax.eval_shape(experiment.train_step, experiment.abstract_state, batch)
    assert metrics["loss"].shape == ()


def test_pictures_of_patches_are_written_as_training_continues(data_dir, tmp_path):
    workdir, evals = tmp_path / "w", {"patches": VAL | {"name": "patches"}}
    train(tiny_config(data_dir, total_steps=4, ema_decay=0.9, evals=evals), str(workdir))
    written = sorted(path.name for path in (workdir / "evals").glob("*.png"))
    names = ("patches_2", "patches_4", "patches_ema_2", "patches_ema_4")
    assert written == [f"{name}.png" for name in names]
    picture = cv2.imread(str(workdir / "evals/patches_4.png"))
    assert picture.shape == (2 * 64, 8 * 64, 3)
    records = [r for r in read_metrics(workdir) if "patches/patch_cosine" in r]
    assert [r["step"] for r in records] == [2, 4]
    assert all(-1 <= r["patches_ema/patch_cosine"] <= 1 for r in records)
    report = (workdir / "report.html").read_text()
    assert report.index("patches, step 4") < report.index("patches, step 2")
    assert report.count('alt="picture of patches') == 4


def test_a_gram_teacher_is_read_from_a_file(run_dir, data_dir, teacher, said):
    options = changes("dino_sinkhorn", None)
    source = str(run_dir("mae"))
    gram = {"gram_teacher": source, "gram_start": None, "gram_updates": ()}
    options["objective"] |= gram
    options["model"] = FIXED
    state = Experiment.from_config(tiny_config(data_dir, **options)).init_state()
    want = load_params(run_dir("mae"))[0]
    for tree in (state.params, state.ema_params):
        assert_same(tree["gram_teacher"]["Transformer"], want["Transformer"])
    assert f"Gram teacher from {source}" in said
    options["objective"]["gram_teacher"] = teacher
    experiment = Experiment.from_config(tiny_config(data_dir, **options))
    with pytest.raises(
        UserError, match=r"objective\.gram_teacher=.*a width of 8 and the model one"
    ):
        experiment.init_state()


def test_a_wrong_gram_teacher_is_refused_before_anything_is_compiled(
    data_dir, teacher, tmp_path, said
):
    options = changes("dino_sinkhorn", None)
    options["objective"] |= {"gram_start": None, "gram_updates": ()}
    for source, words in ((teacher, "a width of 8 and the model one"), ("nowhere.npz", "nowhere")):
        options["objective"]["gram_teacher"] = source
        with pytest.raises(UserError, match=rf"^objective\.gram_teacher=.*{words}"):
            train(tiny_config(data_dir, **options), str(tmp_path / "new"))
    assert not any(line.startswith("compiling") for line in said)
    assert not (tmp_path / "new/config.json").exists()


def test_koleo_is_refused_for_micro_batches_of_one_image(data_dir):
    config = tiny_config(data_dir, optimizer__accum_steps=16, **changes("dino", None))
    with pytest.raises(UserError, match=r"koleo_weight=0\.1 with \(micro-\)batches of 1"):
        Experiment.from_config(config, devices=jax.devices()[:1])


def test_a_model_of_one_channel_starts_from_one_of_three(data_dir, teacher):
    options = {
        "model__hidden_size": 8,
        "data__preprocess": "decode|luma",
        "evals__val__preprocess": "decode|luma",
    }
    experiment = Experiment.from_config(tiny_config(data_dir, init_from=teacher, **options))
    read = experiment.read_init_from()
    assert read is not None
    assert "embedding/kernel: 3 input channels in the file, 1 here: summed" in read[1]
    wrong = {
        "pixel_mean": ((0.4, 0.5, 0.6), "3 numbers for images of 1 channel"),
        "color_jitter": (0.3, r"is for images of three channels, and data\.preprocess makes 1"),
    }
    for key, (value, words) in wrong.items():
        objective = {"name": "supervised", key: value}
        config = tiny_config(data_dir, objective=objective, **options)
        with pytest.raises(UserError, match=rf"objective\.{key}=.*{words}"):
            _ = Experiment.from_config(config).abstract_state


def test_pictures_of_one_channel_are_grey():
    rows = [np.full((2, 64, 64, 1), 7.0), np.full((2, 64, 64, 3), 9.0)]
    picture = cv2.imdecode(np.frombuffer(encode_grid(rows), np.uint8), cv2.IMREAD_COLOR)
    assert np.all(picture[:64] == 7)
    assert np.all(picture[64:] == 9)
