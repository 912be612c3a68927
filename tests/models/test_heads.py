# SPDX-License-Identifier: Apache-2.0
"""Heads against NumPy."""

import jax
import numpy as np

from tests.models.numpy_layers import attend, dense, normalise, project
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.heads import MAPHead


def test_map_head_is_a_probe_that_attends_and_an_mlp():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    head = MAPHead(BlockConfig(num_heads=2, mlp_dim=12))
    p = head.init(jax.random.key(1), x, train=False)["params"]
    attention = p["MultiHeadDotProductAttention_0"]
    probe = np.broadcast_to(p["probe"], (2, 1, 8))
    heads = attend(
        project(probe, attention, "query"),
        project(x, attention, "key"),
        project(x, attention, "value"),
    )
    pooled = np.einsum("bqhd,hdk->bqk", heads, attention["out"]["kernel"])
    pooled += attention["out"]["bias"]
    h = dense(normalise(pooled, p["LayerNorm_0"]), p["MlpBlock_0"]["Dense_0"])
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    want = (pooled + dense(h, p["MlpBlock_0"]["Dense_1"]))[:, 0]
    np.testing.assert_allclose(head.apply({"params": p}, x, train=False), want, atol=1e-5)
