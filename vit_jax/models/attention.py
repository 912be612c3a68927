# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention. Source: arXiv:1706.03762, section 3.2."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models.block_config import BlockConfig
from vit_jax.models.positions import Rotation, rotate

# Name of the intermediate (`flax.linen.Module.sow`) that holds the weights of an attention layer.
ATTENTION_WEIGHTS = "attention_weights"


class MultiHeadDotProductAttention(nn.Module):
    """Attention with biases on all four projections.

    Call: queries come from `x` `[batch, length, hidden]`, keys and values from `context`
    `[batch, context length, hidden]`, or from `x` too; returns `[batch, length, hidden]` in
    `config.dtype`. The softmax is float32 for any dtype; its weights, float32
    `[batch, heads, queries, keys]`, are the intermediate `ATTENTION_WEIGHTS`.
    Sources: `qk_norm`: arXiv:2302.05442; `rope`: see `positions.rotation_2d`.
    """

    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        rope: Rotation | None = None,
        train: bool,
    ) -> jax.Array:
        config = self.config
        width = x.shape[-1]
        head_dim = width // config.num_heads

        def project(x: jax.Array, name: str) -> jax.Array:
            dense = nn.DenseGeneral(
                (config.num_heads, head_dim),
                dtype=config.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                dot_general=config.dot_general,
                name=name,
            )
            x = checkpoint_name(dense(x), "qkv")
            return config.constrain(x, ("batch", None, "heads", None))

        context = x if context is None else context
        query, key = project(x, "query"), project(context, "key")
        value = project(context, "value")
        if config.qk_norm:
            query = nn.LayerNorm(config.norm_epsilon, dtype=config.dtype, name="query_norm")(query)
            key = nn.LayerNorm(config.norm_epsilon, dtype=config.dtype, name="key_norm")(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        query = query / jnp.sqrt(head_dim).astype(config.dtype)
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32))
        # Costs nothing unless `apply` is asked for intermediates.
        self.sow("intermediates", ATTENTION_WEIGHTS, weights)
        dropout = nn.Dropout(config.attention_dropout_rate, deterministic=not train)
        x = jnp.einsum("bhqk,bkhd->bqhd", dropout(weights.astype(config.dtype)), value)
        x = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=config.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            dot_general=config.dot_general,
            name="out",
        )(x)
        return checkpoint_name(x, "attn_out")
