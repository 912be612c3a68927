# SPDX-License-Identifier: Apache-2.0
"""Training and using a model on images of any size."""

from typing import Any

import jax
import numpy as np
import pytest
from fastapi.testclient import TestClient

from tests.models.compiled import compiled
from tests.serve.test_serve import HERE, encode
from tests.tiny import tiny_config
from tests.trained import write_model
from vit_jax.checkpoint.pretrained.huggingface_export import make_huggingface
from vit_jax.checkpoint.pretrained.timm_config import make_timm_config
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.data.ops.patches import to_column
from vit_jax.data.pipeline import DatasetSpec, read_step, train_batches
from vit_jax.data.rows import unpack
from vit_jax.inference.figures import draw_positions
from vit_jax.inference.model import load_model
from vit_jax.serve.app import make_app
from vit_jax.training.experiment import Experiment
from vit_jax.training.previews import preview_first_batch
from vit_jax.utils.errors import UserError

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 4, "mlp_dim": 32}
MODEL = SIZES | {"patch_size": 4, "posemb_grid": (3, 3), "classifier": "map"}
LINE = "decode|resize(12, 20)|patches(4, 12)"
VAL = {"split": "test[:50]", "preprocess": "decode|resize(20, 12)|patches(4, 20)"}


def config(data_dir, **changes):
    options = {"model": MODEL, "data__preprocess": LINE, "evals": {"val": VAL}}
    return tiny_config(data_dir, **(options | changes))


def spec(data_dir, **options):
    given = {"name": "digits", "split": "train", "preprocess": LINE, "batch_size": 8, "key": "data"}
    return DatasetSpec(**(given | {"data_dir": data_dir, "num_threads": 0} | options))


def test_a_step_trains_on_patches_and_evaluation_may_have_another_budget(data_dir):
    experiment = Experiment.from_config(config(data_dir))
    batch = next(experiment.train_batches(0))
    assert batch["image"].shape == (16, 13 * 4, 4, 3)
    state, metrics = experiment.train_step(experiment.init_state(), batch)
    assert np.isfinite(metrics["loss"])
    results = experiment.evaluators[0].run(state.params)
    assert results["count"] == 50
    assert experiment.description["preprocess"]["eval"] == VAL["preprocess"]
    assert "any_size" not in experiment.description["model"]


def test_budgets_take_turns_and_any_step_can_be_first(data_dir):
    budgets = ((6, 16), (12, 8), (24, 4))
    data = spec(data_dir, budgets=budgets)
    batches = train_batches(data, seed=0, step=0)
    first = [next(batches) for _ in range(7)]
    sizes = dict(budgets)
    for batch in first:
        count, height = batch["image"].shape[:2]
        assert sizes[height // 4 - 1] == count
    for rounds in (first[:3], first[3:6]):
        assert sorted(len(batch["label"]) for batch in rounds) == [4, 8, 16]
    later = train_batches(data, seed=0, step=4)
    for batch in first[4:]:
        np.testing.assert_array_equal(next(later)["image"], batch["image"])
    halves = [
        next(train_batches(data, seed=0, step=5, shards=(i,), num_shards=2))["image"]
        for i in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(halves), first[5]["image"])
    batch, records = read_step(data, seed=0, step=5)
    np.testing.assert_array_equal(batch["image"], first[5]["image"])
    assert len(records) == len(batch["label"])
    assert data.images_per_step == 28 / 3


def test_examples_follow_each_other_over_batches_of_all_sizes(data_dir):
    data = spec(data_dir, budgets=((6, 16), (12, 8), (24, 4)))
    plain = spec(data_dir, batch_size=28)
    labels = [next(batches)["label"] for batches in [train_batches(data, seed=0, step=0)] * 3]
    want = next(train_batches(plain, seed=0, step=0))["label"]
    np.testing.assert_array_equal(np.concatenate(labels), want)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("naflex") / "model.npz"
    return write_model(path, posemb_grid=(2, 2), classifier="gap", position_embedding="learned")


def test_predictions_do_not_depend_on_padding(file):
    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    models = [
        load_model(file, preprocess=line, devices=jax.devices()[:1])
        for line in ("decode|resize(12, 20)", "decode|resize(12, 20)|patches(4, 15)")
    ]
    whole, patches = (model(model.preprocess(image)).logits for model in models)
    np.testing.assert_allclose(patches, whole, atol=1e-5)
    more = load_model(file, preprocess="decode|patches(4, 40)", devices=jax.devices()[:1])
    shapes = [(24, 40), (40, 24), (8, 99)]
    images = [np.resize(image, (*shape, 3)) for shape in shapes]
    together = more(np.stack([more.preprocess(x) for x in images])).logits
    for x, logits in zip(images, together, strict=True):
        np.testing.assert_allclose(more(more.preprocess(x)).logits[0], logits, atol=1e-5)


def test_served_images_of_any_size_have_predictions_and_no_overlay(file):
    model = load_model(file, preprocess="decode|patches(4, 16)", devices=jax.devices()[:1])
    with TestClient(make_app(model), base_url=HERE) as client:
        content = encode(14, 20)
        reply = client.post("/v1/predict?overlay=true", content=content).json()
    assert reply["overlay"] is None
    best = model(model.preprocess(content)).top(1)
    assert reply["predictions"][0]["label"] == best[0]


def test_mirrored_patches_are_refused(file):
    model = load_model(file, preprocess="decode|patches(4, 16)", devices=jax.devices()[:1])
    with pytest.raises(UserError, match="expected None for patches"):
        model(np.zeros((1, *model.image_shape), np.uint8), tta="flip")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": MODEL | {"posemb_grid": None}}, "need a model.posemb_grid"),
        ({"model": MODEL | {"patch_size": 2}}, "patches of 4 pixels, and model.patch_size"),
        ({"objective": {"mixup": 0.2}}, "nothing on the device changes or mixes"),
        ({"objective": {"name": "linear_probe"}}, "which needs images of one size"),
        ({"data__budgets": ((0, 8),)}, "at least 1"),
        ({"data__budgets": ((8, 8),), "data__preprocess": "decode|resize(8)"}, "to end in"),
        (
            {"data__preprocess": "decode|resize(8)"},
            r"evals.val.preprocess='decode.*patches\(4, 20\)' makes patches of images of any size, "
            r"and data.preprocess='decode\|resize\(8\)' images of one size: expected the same",
        ),
        (
            {"evals": {"val": VAL | {"preprocess": "decode|resize(8)"}}},
            r"evals.val.preprocess='decode\|resize\(8\)' makes images of one size, and "
            r"data.preprocess='decode.*patches\(4, 12\)' patches of images of any size: expected",
        ),
        (
            {"evals": {"val": VAL | {"preprocess": "decode|patches(2, 20)"}}},
            "evals.val.preprocess='decode.*': patches of 2 pixels, and model.patch_size",
        ),
        ({"evals": {"val": VAL | {"name": "patch_sizes", "sizes": (2, 4)}}}, "needs whole images"),
        ({"evals": {"val": VAL | {"name": "corruptions"}}}, "needs whole images"),
        ({"evals": {"val": VAL | {"name": "patches"}}}, "needs whole images"),
        ({"model": MODEL | {"patch_sizes": (2, 4)}}, r"model.patch_sizes=\(2, 4\) with data.prep"),
    ],
)
def test_what_needs_images_of_one_size_is_refused(data_dir, changes, words):
    with pytest.raises(UserError, match=words):
        Experiment.from_config(config(data_dir, **changes))


def test_a_file_of_a_model_for_several_patches_is_used_at_any_of_them(tmp_path):
    options = {"kernel_size": (3, 3), "patch_sizes": (2, 4), "posemb_grid": (2, 2)}
    file = write_model(tmp_path / "flexi.npz", **options, position_embedding="learned")
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    logits = {}
    for size in (2, 4, 8):
        model = load_model(file, model={"patch_size": size}, devices=jax.devices()[:1])
        assert model.module.kernel_size == (3, 3)
        assert model.module.patch_size == (size, size)
        logits[size] = model(images).logits
    assert not np.allclose(logits[2], logits[4])
    stated = load_model(file, devices=jax.devices()[:1])
    np.testing.assert_array_equal(stated(images).logits, logits[4])


ROW = {"data__preprocess": "decode|resize(12, 20)|inception_patches(4, 48)"}
ROW |= {"data__images_per_row": 4, "data__size_spread": 2.0, "data__drop_patches": (0.0, 0.3)}


@pytest.mark.parametrize("classifier", ["map", pytest.param("gap", marks=pytest.mark.slow)])
def test_packed_images_have_the_outputs_of_the_images_alone(data_dir, classifier):
    """The rows of the data, cut into images again, give the same logits one by one."""
    model = MODEL | {"classifier": classifier}
    experiment: Any = Experiment.from_config(
        config(data_dir, model=model, **(ROW | {"data__drop_patches": (0.0, 0.0)})),
        devices=jax.devices()[:1],
    )
    batch = next(experiment.train_batches(0))
    rows = {name: np.asarray(x) for name, x in batch.items()}
    params = jax.tree.map(
        lambda x: np.random.default_rng(x.size).normal(scale=0.3, size=x.shape).astype(np.float32),
        experiment.initial_params(),
    )
    augmented = jax.jit(experiment.objective.augment)(batch, jax.random.key(0))
    packed = compiled(experiment.objective.model)(
        {"params": params}, augmented["image"], train=False
    )
    grids = rows["grids"].reshape(-1, 2)
    padded = np.stack(
        [
            to_column(image[: height * 4, : width * 4], size=4, budget=48)
            for image, (height, width) in zip(unpack(rows), grids, strict=True)
        ]
    )
    alone = jax.jit(experiment.objective.predict)(params, {"image": padded})["logits"]
    np.testing.assert_allclose(packed[0], alone, atol=1e-5)
    assert np.ptp(alone, axis=0).max() > 0.1
    loss, metrics = jax.jit(experiment.objective.loss)(params, augmented, jax.random.key(0))
    labels = rows["label"].ravel()
    want = np.asarray(jax.nn.logsumexp(alone, axis=1)) - np.asarray(alone)[range(16), labels]
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-5)
    assert metrics["padding"] == (rows["places"][..., 0] == 0).mean()


def test_packed_rows_give_equal_losses_on_each_mesh(data_dir):
    losses = []
    for mesh, devices, accum in (({}, 1, 1), ({"fsdp": 2, "tensor": 2, "data": 1}, 4, 2)):
        experiment = Experiment.from_config(
            config(data_dir, **ROW, mesh=mesh, optimizer__accum_steps=accum),
            devices=jax.devices()[:devices],
        )
        state, batches = experiment.init_state(), experiment.train_batches(0)
        own = []
        for _ in range(2):
            state, metrics = experiment.train_step(state, next(batches))
            own.append([float(metrics[name]) for name in ("loss", "top1", "padding")])
        losses.append(own)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert 0 <= losses[0][0][2] < 0.05


def test_the_first_batch_of_packed_rows_is_shown_as_images(data_dir):
    experiment = Experiment.from_config(config(data_dir, **ROW), devices=jax.devices()[:1])
    images, targets = preview_first_batch(experiment)
    assert len(images) == len(np.asarray(targets)) == 16
    assert images.any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"mixup": 0.2}}, "nothing on the device changes or mixes"),
        ({"model": MODEL | {"classifier": "token"}}, "classifier='gap' or 'map'"),
        ({"data__images_per_row": 3}, "does not divide data.batch_size"),
        ({"optimizer__accum_steps": 8}, "does not divide data.batch_size / data.images_per_row=4"),
    ],
)
def test_what_rows_of_several_images_do_not_take_is_refused(data_dir, changes, words):
    with pytest.raises(UserError, match=words):
        Experiment.from_config(config(data_dir, **(ROW | changes)), devices=jax.devices()[:1])


def test_a_model_that_resizes_its_parameters_is_written_only_for_programs_that_do(tmp_path):
    options = {"kernel_size": (3, 3), "posemb_grid": (2, 2), "position_embedding": "learned"}
    file = write_model(tmp_path / "flexi.npz", **options, size=12)
    for size, words in ((4, "its kernel of 3x3 pixels"), (3, "its position embeddings of 2x2")):
        model = load_model(file, model={"patch_size": size}, devices=jax.devices()[:1])
        weights = Weights(
            params=model.list_params(),
            layout="test",
            model=dict(model.arguments),
            preprocess={"image_size": (12, 12)},
        )
        for make in (make_huggingface, make_timm_config):
            with pytest.raises(ValueError, match=words):
                make(weights)


def test_positions_are_drawn_on_their_own_grid(tmp_path):
    options = {"kernel_size": (3, 3), "posemb_grid": (2, 3), "position_embedding": "learned"}
    file = write_model(tmp_path / "flexi.npz", **options)
    model = load_model(file, model={"patch_size": 2}, devices=jax.devices()[:1])
    width, height = draw_positions(model).picture.size
    assert height < width
