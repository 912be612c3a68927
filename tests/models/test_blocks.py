# SPDX-License-Identifier: Apache-2.0
"""The parts of the encoder, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from tests.models.compiled import compiled
from tests.models.numpy_layers import dense
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.blocks import (
    AddPositionEmbs,
    Encoder1DBlock,
    MlpBlock,
    PatchDropout,
    StochasticDepth,
)


def test_position_embeddings_start_as_normal_with_deviation_002():
    params = AddPositionEmbs().init(jax.random.key(0), jnp.zeros((1, 64, 64)))["params"]
    assert float(params["pos_embedding"].std()) == pytest.approx(0.02, rel=0.05)


def test_mlp_uses_the_tanh_approximation_of_gelu():
    mlp = MlpBlock(BlockConfig(mlp_dim=8))
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    variables = mlp.init(jax.random.key(1), x, train=False)
    p = variables["params"]
    h = x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    want = h @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]
    np.testing.assert_allclose(compiled(mlp)(variables, x, train=False), want, atol=1e-6)


def test_exact_gelu():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    mlp = MlpBlock(BlockConfig(mlp_dim=8, activation="gelu_erf"))
    variables = mlp.init(jax.random.key(1), x, train=False)
    p = variables["params"]
    h = dense(x, p["Dense_0"])
    want = dense(0.5 * h * (1 + erf(h / np.sqrt(2))), p["Dense_1"])
    np.testing.assert_allclose(compiled(mlp)(variables, x, train=False), want, atol=1e-6)


def test_swiglu():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    mlp = MlpBlock(BlockConfig(mlp_dim=8, activation="swiglu"))
    variables = mlp.init(jax.random.key(1), x, train=False)
    p = variables["params"]
    gate = dense(x, p["gate"])
    want = dense(dense(x, p["Dense_0"]) * gate / (1 + np.exp(-gate)), p["Dense_1"])
    np.testing.assert_allclose(compiled(mlp)(variables, x, train=False), want, atol=1e-6)


def test_layer_scale_scales_both_branches():
    x = jax.random.normal(jax.random.key(0), (1, 3, 8))
    plain = Encoder1DBlock(BlockConfig(num_heads=2, mlp_dim=12))
    scaled = Encoder1DBlock(BlockConfig(num_heads=2, mlp_dim=12, layer_scale_init=1e-5))
    variables = scaled.init(jax.random.key(1), x, 0.0, None, train=False)
    p = variables["params"]
    np.testing.assert_array_equal(p["LayerScale_0"]["scale"], np.full(8, 1e-5, np.float32))
    p["LayerScale_0"]["scale"] = 2.0 * jnp.ones(8)
    p["LayerScale_1"]["scale"] = jnp.arange(8.0)
    got = compiled(scaled)({"params": p}, x, 0.0, None, train=False)

    # The same block with the factors put into the last layers of its branches.
    folded = {k: v for k, v in p.items() if not k.startswith("LayerScale")}
    for path, scale in (
        (("MultiHeadDotProductAttention_0", "out"), 2.0 * np.ones(8)),
        (("MlpBlock_0", "Dense_1"), np.arange(8.0)),
    ):
        module = {k: v * scale for k, v in p[path[0]][path[1]].items()}
        folded[path[0]] = folded[path[0]] | {path[1]: module}
    want = compiled(plain)({"params": folded}, x, 0.0, None, train=False)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    y = StochasticDepth().apply({}, x, 0.25, train=True, rngs={"dropout": jax.random.key(0)})
    samples = np.asarray(y).reshape(4000, -1)
    assert (samples == samples[:, :1]).all()
    assert set(np.unique(samples)) == {0.0, np.float32(1 / 0.75)}
    assert samples.mean() == pytest.approx(1.0, abs=0.05)


def test_patch_dropout_keeps_the_prefix_and_a_share_of_patches():
    x = jnp.arange(2 * 11.0).reshape(2, 11, 1)
    rngs = {"dropout": jax.random.key(0)}
    y, kept = PatchDropout(0.5).apply({}, x, 3, train=True, rngs=rngs)
    assert y.shape == (2, 3 + 4, 1)
    np.testing.assert_array_equal(kept[:, :3], [[0, 1, 2]] * 2)
    assert (np.diff(kept, axis=1) > 0).all()
    assert (kept[0] != kept[1]).any()
    np.testing.assert_array_equal(y[1, :, 0], kept[1] + 11)
