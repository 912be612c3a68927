# SPDX-License-Identifier: Apache-2.0
"""Masked patches, and images of another size than the position embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.compiled import compiled
from vit_jax.models.positions import resize_posemb
from vit_jax.models.variants import make_vit

POSEMB = ("Transformer", "posembed_input", "pos_embedding")


@pytest.fixture(scope="module")
def model():
    sizes = {"patch_size": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    return make_vit(num_classes=0, num_registers=1, **sizes)


@pytest.fixture(scope="module")
def params(model):
    masked = jnp.zeros((1, 16), bool)
    images = jnp.zeros((1, 16, 16, 3))
    params = model.init(jax.random.key(0), images, train=False, masked=masked)["params"]
    assert params["mask_token"].shape == (1, 1, 16)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), params)


def encode(model, params, images, **options):
    return compiled(model)({"params": params}, images, train=False, **options)[1]["encoded"]


def draw(size, count=2):
    return np.random.default_rng(1).normal(size=(count, size, size, 3)).astype(np.float32)


def test_the_mask_token_replaces_embeddings_before_positions(model, params):
    images, masked = draw(16), np.random.default_rng(2).random((2, 16)) < 0.5
    got = encode(model, params, images, masked=jnp.asarray(masked))
    # All patches hidden: as if the embedding of any patch were the token.
    hidden = encode(model, params, images, masked=jnp.ones((2, 16), bool))
    constant = {"kernel": 0 * params["embedding"]["kernel"], "bias": params["mask_token"][0, 0]}
    want = encode(model, {**params, "embedding": constant}, images)
    np.testing.assert_allclose(hidden, want, atol=1e-5)
    # Pixels of hidden patches are not seen, and those of the others are.
    pixels = masked.reshape(2, 4, 4).repeat(4, 1).repeat(4, 2)[..., None]
    other = encode(model, params, np.where(pixels, 7, images), masked=jnp.asarray(masked))
    np.testing.assert_array_equal(got, other)
    changed = encode(model, params, np.where(pixels, images, 7), masked=jnp.asarray(masked))
    assert not np.allclose(got, changed)
    none = encode(model, params, images, masked=jnp.zeros((2, 16), bool))
    np.testing.assert_array_equal(none, encode(model, params, images))


def test_positions_are_resized_to_the_grid_of_the_images(model, params):
    images = draw(8)
    got = encode(model, params, images, position_grid=(4, 4))
    (first, second, third), table = POSEMB, params["Transformer"]["posembed_input"]
    small = resize_posemb(
        np.asarray(table["pos_embedding"]),
        source_grid=(4, 4),
        target_grid=(2, 2),
        num_prefix_tokens=1,
        method="bicubic_no_antialias",
    )
    resized = {**params, first: {**params[first], second: {third: small}}}
    np.testing.assert_allclose(got, encode(model, resized, images), atol=1e-5)


def test_both_cost_nothing_when_off(model, params):
    def lower(**options):
        images = jnp.zeros((2, 16, 16, 3))
        return jax.jit(lambda p: encode(model, p, images, **options)).lower(params).as_text()

    assert lower(position_grid=(4, 4)) == lower()
    assert "mask_token" not in jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)["params"]
    )
