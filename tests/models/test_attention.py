# SPDX-License-Identifier: Apache-2.0
"""Attention against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.numpy_layers import attend, normalise, project
from vit_jax.models.attention import MultiHeadDotProductAttention
from vit_jax.models.block_config import BlockConfig


def test_attention_is_softmax_of_scaled_products():
    attention = MultiHeadDotProductAttention(BlockConfig(mlp_dim=0, num_heads=2))
    x = jax.random.normal(jax.random.key(0), (1, 3, 4))
    variables = attention.init(jax.random.key(1), x, train=False)
    got = attention.apply(variables, x, train=False)
    p = jax.tree.map(np.asarray, variables["params"])

    def project(name):
        return np.einsum("bld,dhk->blhk", x, p[name]["kernel"]) + p[name]["bias"]

    q, k, v = project("query"), project("key"), project("value")
    weights = np.exp(np.einsum("bqhk,bshk->bhqs", q, k) / np.sqrt(2))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bhqs,bshk->bqhk", weights, v)
    want = np.einsum("bqhk,hkd->bqd", heads, p["out"]["kernel"]) + p["out"]["bias"]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_softmax_is_taken_in_float32_under_bfloat16():
    attention = MultiHeadDotProductAttention(
        BlockConfig(mlp_dim=0, num_heads=2, dtype=jnp.bfloat16)
    )
    x = jnp.ones((1, 3, 4), jnp.bfloat16)
    variables = attention.init(jax.random.key(0), x, train=False)
    text = str(jax.make_jaxpr(lambda v: attention.apply(v, x, train=False))(variables))
    exponentials = [line for line in text.splitlines() if " exp " in line]
    assert exponentials
    assert all("f32[" in line for line in exponentials)


def test_qk_norm_normalises_queries_and_keys_over_the_head():
    x = jax.random.normal(jax.random.key(0), (1, 3, 8))
    attention = MultiHeadDotProductAttention(BlockConfig(mlp_dim=0, num_heads=2, qk_norm=True))
    p = attention.init(jax.random.key(1), x, train=False)["params"]
    p["query_norm"]["scale"] = jnp.arange(4.0)
    query = normalise(project(x, p, "query"), p["query_norm"])
    key = normalise(project(x, p, "key"), p["key_norm"])
    heads = attend(query, key, project(x, p, "value"))
    want = np.einsum("bqhd,hdk->bqk", heads, p["out"]["kernel"]) + p["out"]["bias"]
    np.testing.assert_allclose(attention.apply({"params": p}, x, train=False), want, atol=1e-5)
