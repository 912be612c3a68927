# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer: sizes, classifiers, heads, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.compiled import compiled
from vit_jax.models.variants import make_vit
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import count, flatten

TINY = {"patch_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "mlp_dim": 32}


def init(model, shape=(2, 8, 8, 3), seed=0):
    images = jax.random.uniform(jax.random.key(9), shape, minval=-1)
    return model.init(jax.random.key(seed), images, train=False)["params"], images


@pytest.mark.parametrize(
    ("variant", "size", "parameters"),
    [
        ("Ti/16", 224, 5_717_416),
        ("S/16", 224, 22_050_664),
        ("S/32", 224, 22_878_952),
        ("B/8", 224, 86_576_872),
        ("B/16", 224, 86_567_656),
        ("B/32", 224, 88_224_232),
        ("L/16", 224, 304_326_632),
        ("L/32", 224, 306_535_400),
        ("H/14", 224, 632_045_800),
        ("B/16-gap-norep", 224, 86_566_120),
        ("R+Ti/16", 224, 6_337_704),
        ("R26+S/32", 224, 36_431_912),
        ("R26+B/32", 224, 101_383_976),
        ("R50+B/16", 224, 98_659_112),
        ("R50+L/32", 224, 328_994_856),
    ],
)
def test_named_sizes_have_the_published_parameter_counts(variant, size, parameters):
    # A scan is traced once for all blocks.
    model = make_vit(num_classes=1000, variant=variant, scan=True)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    assert count(shapes) == parameters


@pytest.mark.parametrize("variant", ["S/16", "S/32", "B/32"])
def test_gap_norep_differs_by_the_class_token_only(variant):
    def size(variant):
        model = make_vit(num_classes=1000, variant=variant, scan=True)
        image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        return count(jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image))

    # The token itself and its position embedding.
    width = make_vit(num_classes=1000, variant=variant).hidden_size
    assert size(variant) - size(f"{variant}-gap-norep") == 2 * width


def test_hybrids_have_as_many_tokens_as_their_names_say_but_for_the_smallest():
    for variant, grid in (("R50+B/16", 14), ("R26+S/32", 7), ("R50+L/32", 7), ("R+Ti/16", 7)):
        assert make_vit(num_classes=2, variant=variant).grid((224, 224)) == (grid, grid)


@pytest.mark.parametrize(
    ("variant", "width", "depth"), [("g", 1408, 40), ("G/14", 1664, 48), ("So400m/14", 1152, 27)]
)
def test_large_sizes_exist_at_any_patch_size(variant, width, depth):
    model = make_vit(num_classes=10, variant=variant, patch_size=28)
    assert (model.hidden_size, model.num_layers, model.patch_size) == (width, depth, (28, 28))


def test_given_sizes_change_a_named_one():
    model = make_vit(num_classes=10, variant="B/16", num_layers=3)
    assert (model.num_layers, model.hidden_size, model.patch_size) == (3, 768, (16, 16))


@pytest.mark.parametrize(
    ("classifier", "shape", "tokens"),
    [
        ("token", (2, 5), 7),
        ("gap", (2, 5), 6),
        ("unpooled", (2, 6, 5), 6),
        ("token_unpooled", (2, 7, 5), 7),
    ],
)
def test_classifiers_on_rectangular_images(classifier, shape, tokens):
    model = make_vit(num_classes=5, classifier=classifier, **TINY)
    params, images = init(model, (2, 8, 12, 3))
    logits, out = compiled(model)({"params": params}, images, train=False)
    assert logits.shape == shape
    assert out["encoded"].shape == (2, tokens, 16)
    assert ("cls" in params) == (tokens == 7)


def test_gap_is_the_mean_of_the_encoded_tokens():
    model = make_vit(num_classes=5, classifier="gap", **TINY)
    params, images = init(model)
    _, out = compiled(model)({"params": params}, images, train=False)
    np.testing.assert_allclose(out["pre_logits"], out["encoded"].mean(axis=1), rtol=1e-6)


def test_fine_tuning_head_is_one_linear_layer_that_starts_at_zero():
    model = make_vit(num_classes=5, head_bias_init=-3.0, **TINY)
    params, images = init(model)
    logits, _ = compiled(model)({"params": params}, images, train=False)
    assert "pre_logits" not in params
    np.testing.assert_array_equal(logits, np.full((2, 5), -3.0))


def test_pre_training_head_has_one_hidden_tanh_layer():
    model = make_vit(num_classes=5, representation_size=7, **TINY)
    params, images = init(model)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (7, 5))
    logits, out = compiled(model)({"params": params}, images, train=False)
    hidden = np.tanh(
        np.asarray(out["encoded"][:, 0]) @ params["pre_logits"]["kernel"]
        + params["pre_logits"]["bias"]
    )
    np.testing.assert_allclose(out["pre_logits"], hidden, atol=1e-5)
    np.testing.assert_allclose(logits, hidden @ params["head"]["kernel"], atol=1e-5)


def test_patches_are_read_row_by_row():
    model = make_vit(num_classes=0, classifier="unpooled", **TINY)
    params, images = init(model, (1, 8, 8, 3))
    # Without position embeddings, swapping two patches of the image swaps their tokens.
    params["Transformer"]["posembed_input"]["pos_embedding"] *= 0
    swapped = images.at[:, :4, 4:].set(images[:, 4:, :4]).at[:, 4:, :4].set(images[:, :4, 4:])
    encoded = compiled(model)({"params": params}, images, train=False)[0]
    encoded_swapped = compiled(model)({"params": params}, swapped, train=False)[0]
    np.testing.assert_allclose(encoded_swapped, encoded[:, jnp.array([0, 2, 1, 3])], atol=1e-5)


@pytest.mark.parametrize("rate", ["dropout_rate", "attention_dropout_rate"])
def test_dropout_acts_in_training_only(rate):
    model = make_vit(num_classes=0, **TINY, **{rate: 0.5})
    params, images = init(model)

    def run(train, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return compiled(model)({"params": params}, images, train=train, rngs=rngs)[0]

    assert np.abs(run(True, 0) - run(True, 1)).max() > 1e-3
    np.testing.assert_array_equal(run(False, 0), run(False, 1))


def test_bfloat16_compute_keeps_parameters_and_logits_in_float32():
    half = make_vit(num_classes=5, dtype="bfloat16", **TINY)
    full = make_vit(num_classes=5, **TINY)
    params, images = init(half)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (16, 5))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits, out = compiled(half)({"params": params}, images, train=False)
    assert logits.dtype == jnp.float32
    assert out["encoded"].dtype == jnp.bfloat16
    want, _ = compiled(full)({"params": params}, images, train=False)
    difference = np.abs(logits - want).max()
    assert 0 < difference < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "model.num_heads=3 does not divide model.hidden_size=16"),
        ({"variant": "X/16"}, "model.variant='X' is unknown"),
        ({"variant": "B/x"}, "model.variant='B/x': expected SIZE/PATCH"),
        ({"mlp_dim": 0}, "model.mlp_dim=0: expected at least 1"),
        ({"mlp_dim": None}, "model.mlp_dim is missing"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_vit(num_classes=2, **(TINY | changes))


def test_image_that_patches_do_not_divide_is_refused():
    model = make_vit(num_classes=2, **TINY)
    with pytest.raises(UserError, match="image of 8x10 can't be cut into patches of 4x4"):
        init(model, (1, 8, 10, 3))


def test_parameter_names_are_the_published_ones():
    params, _ = init(make_vit(num_classes=5, representation_size=7, **TINY))
    block = "Transformer/encoderblock_1"
    names = flatten(params)
    assert names["embedding/kernel"].shape == (4, 4, 3, 16)
    assert names["Transformer/posembed_input/pos_embedding"].shape == (1, 5, 16)
    assert names[f"{block}/MultiHeadDotProductAttention_0/out/kernel"].shape == (4, 4, 16)
    assert names[f"{block}/MlpBlock_0/Dense_1/kernel"].shape == (32, 16)
    assert names[f"{block}/LayerNorm_1/scale"].shape == (16,)
    assert {"cls", "Transformer/encoder_norm/bias", "pre_logits/bias", "head/bias"} <= set(names)
