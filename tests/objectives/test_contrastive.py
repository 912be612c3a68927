# SPDX-License-Identifier: Apache-2.0
"""The contrastive objective: against values of big_vision, on meshes, in micro-batches, frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.models.test_two_towers import nested, read_two_towers, rename
from tests.pairs import IMAGE, LENGTH, TEXT, pairs_config
from vit_jax.models.lora import Lora, merge_adapters
from vit_jax.objectives.contrastive import Contrastive
from vit_jax.parallel.mesh import make_mesh
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten


@pytest.mark.parametrize(
    ("case", "loss", "form"),
    [
        ("siglip_bv", "sigmoid", "gathered"),
        ("siglip_bv", "sigmoid", "ring"),
        ("lit_bv", "softmax", "gathered"),
    ],
)
def test_loss_and_gradients_of_both_towers_are_those_of_big_vision(case, loss, form):
    model, flat, io = read_two_towers(case)
    mesh = make_mesh(devices=jax.devices()[:1])
    objective = Contrastive(model, mesh, loss, form)
    batch = {"image": jnp.asarray(io["image"]), "tokens": jnp.asarray(io["text"])}
    grad = jax.value_and_grad(objective.loss, has_aux=True)
    (value, metrics), grads = jax.jit(grad)(nested(flat), batch, jax.random.key(0))
    np.testing.assert_allclose(value, io["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["scale"], io["t"][0], rtol=1e-6)
    assert ("bias" in metrics) == ("b" in io)
    if "ncorrect" in io:
        np.testing.assert_allclose(metrics["image_to_text_top1"], io["ncorrect"], rtol=1e-6)
    grads = traverse_util.flatten_dict(grads, sep="/")
    expected = {rename(k.removeprefix("grad:")): v for k, v in io.items() if k.startswith("grad:")}
    assert {"t", "txt/head/kernel"} < expected.keys()
    for path, want in expected.items():
        np.testing.assert_allclose(grads[path], want, atol=1e-5, rtol=1e-4, err_msg=path)


def two_updates(data_dir, *, devices=None, **changes):
    """Metrics of two plain gradient steps, and the parameters after them."""
    plain = {"name": "sgd", "lr": 0.1, "momentum": 0.5, "schedule": "constant"}
    config = pairs_config(
        data_dir,
        total_steps=2,
        evals={},
        optimizer=plain | changes.pop("optimizer", {}),
        **changes,
    )
    experiment = Experiment.from_config(config, devices=devices)
    state, found = experiment.init_state(), []
    batches = experiment.train_batches(0)
    for _ in range(2):
        state, metrics = experiment.train_step(state, next(batches))
        found.append({k: float(v) for k, v in metrics.items() if not v.ndim})
    return found, flatten(state.params)


GATHERED = {"objective": {"name": "contrastive", "form": "gathered"}}


@pytest.fixture(scope="module")
def on_one_device(data_dir):
    return two_updates(data_dir, devices=jax.devices()[:1], **GATHERED)


WAYS = {
    "ring, all axes, micro-batches": {
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "optimizer": {"accum_steps": 2},
    },
    "ring on data": {"mesh": {"data": 8}},
    "ring on fsdp": {"mesh": {"data": 1, "fsdp": 8}},
    "gathered, all axes": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, **GATHERED},
    "micro-batches": {"mesh": {"data": 2, "tensor": 4}, "optimizer": {"accum_steps": 8}},
}


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=[pytest.mark.slow] * ("all axes, m" not in w)) for w in WAYS]
)
def test_losses_and_updates_do_not_depend_on_mesh_form_or_micro_batches(
    way, on_one_device, data_dir
):
    metrics, params = two_updates(data_dir, **WAYS[way])
    want, want_params = on_one_device
    for got, known in zip(metrics, want, strict=True):
        assert got == pytest.approx(known, rel=1e-5)
    assert metrics[1]["loss"] != metrics[0]["loss"]
    for path, value in params.items():
        np.testing.assert_allclose(value, want_params[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_the_scale_is_bounded_after_an_update_and_has_a_learning_rate_of_its_own(data_dir):
    metrics, params = two_updates(
        data_dir,
        devices=jax.devices()[:1],
        objective={"name": "contrastive", "loss": "softmax", "max_scale": 100.0},
        model={"name": "two_towers", "image": IMAGE, "text": TEXT, "scale_init": 99.9},
        optimizer={"lr": 0.01, "lr_multipliers": (("t", 1e4),)},
    )
    assert metrics[0]["scale"] == pytest.approx(99.9)
    assert "bias" not in metrics[0]
    # A step of this length leaves the bounds on one side or the other.
    assert metrics[1]["scale"] in (pytest.approx(100), pytest.approx(1))
    assert float(params["t"][0]) in (pytest.approx(np.log(100)), 0)


def test_a_frozen_image_tower_stays_as_it_is(data_dir):
    changes = {"devices": jax.devices()[:1], **GATHERED}
    metrics, params = two_updates(data_dir, optimizer={"freeze": ("img/.*",)}, **changes)
    experiment = Experiment.from_config(pairs_config(data_dir), devices=jax.devices()[:1])
    first = flatten(experiment.init_state().params)
    for path, value in params.items():
        same = np.array_equal(value, first[path])
        assert same == path.startswith("img/"), path
    assert "bias" in metrics[0]


def test_adapters_of_one_tower_are_trained_beside_the_scale(data_dir):
    """And what is listed in `lora.train`, but nothing else."""
    lora = {"rank": 2, "targets": ("txt/.*/(query|value)/kernel",), "train": ("t", "txt/head/.*")}
    devices = jax.devices()[:1]
    adapted, plain = (
        Experiment.from_config(pairs_config(data_dir, **changes), devices=devices)
        for changes in ({"lora": lora}, {})
    )
    tokens = jnp.arange(2 * LENGTH).reshape(2, LENGTH)
    batch = {"image": jnp.zeros((2, 24, 24, 3), jnp.uint8), "tokens": tokens}
    shapes = flatten(jax.eval_shape(adapted.objective.init, jax.random.key(0), batch))
    rng = np.random.default_rng(0)
    params = {path: rng.normal(0, 0.3, x.shape).astype(np.float32) for path, x in shapes.items()}
    trained, frozen = map(flatten, adapted.optimizer.rules.split(nested(params)))
    adapters = {path for path in params if "/lora/" in path}
    assert len(adapters) == 4
    assert all(path.startswith("txt/") for path in adapters)
    assert trained.keys() == adapters | {"t"} | {p for p in params if p.startswith("txt/head/")}
    assert frozen.keys() == params.keys() - trained.keys()
    # The adapted model is the one with merged kernels.
    merged = merge_adapters(params, Lora(**lora))
    np.testing.assert_allclose(
        jax.jit(adapted.objective.embed_texts)(nested(params), tokens),
        jax.jit(plain.objective.embed_texts)(nested(merged), tokens),
        atol=1e-5,
    )


def test_the_text_tower_is_that_of_the_tokenizer_unless_it_is_stated(data_dir):
    def make(**text):
        text = {key: value for key, value in (TEXT | text).items() if value != "leave out"}
        config = pairs_config(data_dir, model__text=text)
        return Experiment.from_config(config, devices=jax.devices()[:1])

    fitted = make(vocab_size=None, context_length="leave out")
    assert fitted.config["model"]["text"]["vocab_size"] == 259
    assert fitted.config["model"]["text"]["context_length"] == LENGTH
    # More than the tokenizer needs, as of a checkpoint whose vocabulary was padded.
    assert make(vocab_size=320).config["model"]["text"]["vocab_size"] == 320
    for wrong, message in (
        ({"vocab_size": 258}, "has a vocabulary of 259, and model.text.vocab_size=258"),
        ({"context_length": 8}, "makes 52 tokens, and model.text.context_length=8"),
    ):
        with pytest.raises(UserError, match=message):
            make(**wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": IMAGE}, "expected model.name='two_towers', or objective.name="),
        (
            {"data__name": "digits", "data__tokenizer": None, "evals": {}},
            "digits has no captions: expected data that has",
        ),
        ({"data__tokenizer": None}, "data.tokenizer=None with objective.name='contrastive'"),
        (
            {"data__tokenizer": "bytes(length=40)"},
            "makes 40 tokens, and model.text.context_length=52: expected the same",
        ),
        (
            {"model__text__vocab_size": 100},
            "has a vocabulary of 259, and model.text.vocab_size=100: expected at least as many",
        ),
        ({"data__batch_size": 1, "mesh": {"data": 1}}, "data.batch_size=1 with objective.name="),
        ({"objective__mixup": 0.2}, "objective.mixup=0.2: an image mixed of two has no caption"),
        ({"objective__max_scale": 0.5}, "objective.max_scale=0.5: expected more than 1"),
        (
            {"objective__loss": "softmax", "objective__form": "ring"},
            "objective.form='ring' with objective.loss='softmax'",
        ),
        ({"objective": {"name": "supervised"}}, "two towers have no head for classes"),
        (
            {"objective": {"name": "linear_probe"}, "evals": {}},
            "objective.name='linear_probe' trains a model of images alone",
        ),
        (
            {"evals__val__name": "classification"},
            "'zero_shot' for 'contrastive'",
        ),
        (
            {"evals__val__templates": "no slot.txt"},
            None,
        ),
        (
            {
                "evals__val__data_name": "digits",
                "evals__val__name": "retrieval",
                "evals__val__preprocess": "decode|resize(12)",
            },
            "evals.val.name='retrieval': digits has no captions",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message, data_dir):
    config = pairs_config(data_dir, **changes)
    if message is None:  # Files are read when a run opens its data.
        with pytest.raises(UserError, match=r"evals\.val\.templates='no slot\.txt' can't be read"):
            Experiment.from_config(config).evaluators[0].open()
        return
    devices = jax.devices()[:1]
    with pytest.raises(UserError) as e:
        Experiment.from_config(config, devices=devices)
    assert message in str(e.value)
    assert "\n" not in str(e.value)
