# SPDX-License-Identifier: Apache-2.0
"""Two towers against the values of big_vision, see tests/testdata/image_text."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.models.compiled import compiled
from vit_jax.models.text import TextTransformer
from vit_jax.models.variants import make_text_transformer, make_two_towers
from vit_jax.utils.errors import UserError

CASES = Path(__file__).parents[1] / "testdata" / "image_text"
SIZES = {"width": "hidden_size", "depth": "num_layers"}
POOLINGS = {"tok": "token"}
POSITIONS = "Transformer/posembed_input/pos_embedding"


def read_case(name):
    spec = json.loads((CASES / f"{name}.json").read_text())
    with np.load(CASES / f"{name}_io.npz") as file:
        io = dict(file)
    with np.load(CASES / f"{name}.npz") as file:
        params = {rename(key.removeprefix("params/")): file[key] for key in file.files}
    if "img/cls" in params:  # Its position embedding is zero there.
        params[f"img/{POSITIONS}"] = np.pad(params[f"img/{POSITIONS}"], [(0, 0), (1, 0), (0, 0)])
    return spec, io, params


def rename(path):
    path = path.replace("Encoder_0/", "Transformer/")
    return path if POSITIONS in path else path.replace("pos_embedding", POSITIONS)


def nested(params):
    return traverse_util.unflatten_dict(params, sep="/")


def tower(config, *, pooling):
    args = {SIZES.get(key, key): value for key, value in config.items() if key != "head_zeroinit"}
    if pool := args.pop("pool_type", None):
        args[pooling] = POOLINGS.get(pool, pool)
    return args


def read_two_towers(name):
    spec, io, params = read_case(name)
    config = spec["config"]
    model = make_two_towers(
        image=tower(config["image"], pooling="classifier"),
        text=tower(config["text"], pooling="pooling") | {"context_length": spec["context_length"]},
        width=config["out_dim"][0],
        scale_init=config["temperature_init"],
        bias_init=config.get("bias_init"),
    )
    return model, params, io


def loss_of(model, params, io):
    zimg, ztxt, out = model.apply(params, io["image"], io["text"], train=True)
    logits = out["scale"] * zimg @ ztxt.T + out["bias"]
    if "b" in io:
        positive = jnp.eye(len(logits))
        return -jax.nn.log_sigmoid((2 * positive - 1) * logits).sum() / len(logits)
    rows, columns = (jnp.diag(jax.nn.log_softmax(logits, axis)) for axis in (1, 0))
    return -(rows.mean() + columns.mean()) / 2


@pytest.mark.parametrize("name", ["siglip_bv", "siglip2_bv", "lit_bv"])
def test_embeddings_loss_and_gradients_are_those_of_big_vision(name):
    model, flat, io = read_two_towers(name)
    if name == "siglip2_bv":  # What is recomputed does not change the values.
        model = model.clone(img=model.img.clone(remat="full"), txt=model.txt.clone(remat="dots"))
    params = {"params": nested(flat)}
    zimg, ztxt, out = compiled(model)(params, io["image"], io["text"], train=False)
    np.testing.assert_allclose(zimg, io["zimg"], atol=1e-5)
    np.testing.assert_allclose(ztxt, io["ztxt"], atol=1e-5)
    np.testing.assert_allclose(out["img"]["pre_logits"], io["img_pre_logits"], atol=1e-5)
    np.testing.assert_allclose(out["txt"]["encoded"], io["txt_transformed"], atol=1e-5)
    np.testing.assert_allclose(out["scale"], io["t"][0], rtol=1e-6)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: loss_of(model, p, io)))(params)
    np.testing.assert_allclose(loss, io["loss"], rtol=1e-5)
    grads = traverse_util.flatten_dict(grads["params"], sep="/")
    expected = {rename(k.removeprefix("grad:")): v for k, v in io.items() if k.startswith("grad:")}
    for path, grad in expected.items():
        np.testing.assert_allclose(grads[path], grad, atol=1e-5, rtol=1e-4, err_msg=path)
    assert len(expected) > 6


@pytest.mark.parametrize("pooling", ["map", "gap", "first", "max"])
def test_poolings_of_texts_are_those_of_big_vision(pooling):
    spec, io, params = read_case(f"text_bv_{pooling}")
    spec.pop("source")
    model = make_text_transformer(
        **tower(spec, pooling="pooling"), context_length=io["text"].shape[1]
    )
    logits, out = compiled(model)({"params": nested(params)}, io["text"], train=False)
    np.testing.assert_allclose(logits, io["logits"], atol=1e-5)
    np.testing.assert_allclose(out["pre_logits"], io["pre_logits"], atol=1e-5)


def small_text(**options):
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 24}
    known = {"vocab_size": 11, "context_length": 6, "num_classes": 4, **sizes}
    return make_text_transformer(**known | options)


def test_a_causal_tower_does_not_see_later_tokens():
    model = small_text(causal=True)
    tokens = jnp.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9]])
    params = model.init(jax.random.key(0), tokens, train=False)
    encoded = compiled(model)(params, tokens, train=False)[1]["encoded"]
    np.testing.assert_allclose(encoded[0, :3], encoded[1, :3], atol=1e-6)
    assert np.abs(encoded[0, 3:] - encoded[1, 3:]).max() > 0.01


@pytest.mark.parametrize(("eot_id", "positions"), [(None, [2, 1]), (3, [0, 4])])
def test_eot_pools_the_greatest_token_or_the_first_of_the_given_one(eot_id, positions):
    model = small_text(pooling="eot", eot_id=eot_id)
    tokens = jnp.array([[3, 2, 9, 3, 9, 0], [1, 10, 4, 4, 3, 3]])
    params = model.init(jax.random.key(0), tokens, train=False)
    out = compiled(model)(params, tokens, train=False)[1]
    np.testing.assert_array_equal(out["pre_logits"], out["encoded"][jnp.arange(2), positions])


def test_one_tower_can_be_asked_alone():
    model, flat, io = read_two_towers("siglip_bv")
    params = {"params": nested(flat)}
    zimg, ztxt, out = compiled(model)(params, io["image"], train=False)
    assert ztxt is None
    assert out.keys() == {"scale", "bias", "img"}
    np.testing.assert_allclose(zimg, io["zimg"], atol=1e-5)
    zimg, ztxt, out = compiled(model)(params, None, io["text"], train=False)
    assert zimg is None
    assert out.keys() == {"scale", "bias", "txt"}
    np.testing.assert_allclose(ztxt, io["ztxt"], atol=1e-5)


def test_initial_embeddings_have_a_direction_and_finite_gradients():
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 24}
    model = make_two_towers(
        image=sizes | {"patch_size": 4},
        text=sizes | {"vocab_size": 11, "context_length": 5},
        width=8,
        bias_init=-10.0,
    )
    images, tokens = jnp.ones((2, 8, 8, 3)), jnp.arange(10).reshape(2, 5)
    params = model.init(jax.random.key(0), images, tokens, train=False)
    zimg, ztxt, out = compiled(model)(params, images, tokens, train=False)
    for z in (zimg, ztxt):
        np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(out["scale"], 10, rtol=1e-6)
    np.testing.assert_allclose(out["bias"], -10)
    np.testing.assert_allclose(params["params"]["t"], [np.log(10)], rtol=1e-6)


def test_tokens_of_another_length_are_refused():
    model = small_text()
    with pytest.raises(UserError, match=r"tokens are \[2, 5\]: expected \[batch, 6\]"):
        jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((2, 5), jnp.int32), train=False)
        )


def test_named_sizes():
    text = make_text_transformer(variant="M", vocab_size=49408, context_length=77, num_classes=512)
    assert isinstance(text, TextTransformer)
    assert (text.hidden_size, text.num_layers, text.num_heads, text.mlp_dim) == (512, 12, 8, 2048)
    model = make_two_towers(
        image={"variant": "g-opt/16", "classifier": "map"},
        text={"variant": "So400m", "vocab_size": 256000, "context_length": 64},
    )
    assert (model.img.hidden_size, model.img.num_layers, model.img.mlp_dim) == (1536, 40, 6144)
    assert (model.txt.hidden_size, model.txt.num_classes) == (1152, 1536)


SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 24}
IMAGE, TEXT = SMALL | {"patch_size": 4}, SMALL | {"vocab_size": 9, "context_length": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": IMAGE | {"hiden_size": 3}}, "unknown config key model.image.hiden_size"),
        ({"image": IMAGE | {"num_classes": 3}}, "unknown config key model.image.num_classes"),
        ({"text": SMALL}, "model.text.vocab_size is missing"),
        ({"text": TEXT | {"variant": "B/16"}}, "model.text.variant='B/16': a text has no patches"),
        ({"text": TEXT | {"num_heads": 3}}, "model.text.num_heads=3 does not divide"),
        ({"text": TEXT | {"dropout_rate": 1.5}}, "model.text.dropout_rate=1.5"),
        ({"text": TEXT | {"eot_id": 3}}, "model.text.eot_id=3 with pooling='last'"),
        ({"text": TEXT | {"remat": "some"}}, "model.text.remat='some'"),
        ({"text": {"vocab_size": 9, "context_length": 4}}, "model.text.hidden_size is missing"),
        ({"text": TEXT | {"variant": "Q"}}, "model.text.variant='Q' is unknown"),
        ({"num_classes": 10}, "model.num_classes=10: two towers have no head"),
        ({"scale_init": 0.0}, "model.scale_init=0.0"),
        ({"width": 0}, "model.width=0"),
        ({"image": IMAGE | {"classifier": "unpooled"}}, "model.image.classifier='unpooled'"),
    ],
)
def test_a_wrong_argument_is_named_with_its_section(changes, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        make_two_towers(**{"image": IMAGE, "text": TEXT} | changes)
