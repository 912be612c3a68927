# SPDX-License-Identifier: Apache-2.0
"""Layers of the Vision Transformer encoder.

Class names are those of the published ViT checkpoints, because Flax derives parameter paths from
them. Numerics follow the published weights: pre-norm, LayerNorm epsilon 1e-6, tanh GELU.
Parameters, norm statistics and the softmax are float32; everything else runs in `dtype`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Places an activation on the mesh, given one logical name for each of its dimensions.
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

LAYER_NORM_EPSILON = 1e-6


def unconstrained(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """The `Constrain` of a model that runs on one device: does nothing."""
    del names
    return x


class AddPositionEmbs(nn.Module):
    """Adds learned 1D position embeddings, N(0, 0.02) at the start.

    Call: `[batch, length, hidden]` to the same shape. Source: arXiv:2010.11929, section 3.1.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1, *x.shape[1:])
        embedding = self.param("pos_embedding", nn.initializers.normal(stddev=0.02), shape)
        return x + embedding.astype(self.dtype)


class MlpBlock(nn.Module):
    """Dense, GELU, dropout, Dense, dropout; hidden width `mlp_dim`."""

    mlp_dim: int
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def dense(features: int) -> nn.Dense:
            return nn.Dense(
                features,
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                bias_init=nn.initializers.normal(stddev=1e-6),
            )

        width = x.shape[-1]
        x = nn.gelu(dense(self.mlp_dim)(x), approximate=True)
        x = self.constrain(x, ("batch", None, "mlp"))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = dense(width)(x)
        return nn.Dropout(self.dropout_rate, deterministic=not train)(x)


class MultiHeadDotProductAttention(nn.Module):
    """Self-attention with `num_heads` heads, biases on all four projections.

    Call: `[batch, length, hidden]` to the same shape. The softmax is taken in float32 whatever
    `dtype` is. Source: arXiv:1706.03762, section 3.2.
    """

    num_heads: int
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        width = x.shape[-1]
        head_dim = width // self.num_heads

        def project(name: str) -> jax.Array:
            dense = nn.DenseGeneral(
                (self.num_heads, head_dim),
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                name=name,
            )
            return self.constrain(dense(x), ("batch", None, "heads", None))

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query / jnp.sqrt(head_dim).astype(self.dtype), key)
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(self.dtype)
        weights = nn.Dropout(self.dropout_rate, deterministic=not train)(weights)
        x = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            name="out",
        )(x)


class Encoder1DBlock(nn.Module):
    """One pre-norm transformer block: attention and MLP, each with a residual connection."""

    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
        x = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=self.dtype)(inputs)
        x = MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dropout_rate=self.attention_dropout_rate,
            dtype=self.dtype,
            constrain=self.constrain,
        )(x, train=train)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = self.constrain(x + inputs, ("batch", None, None))

        y = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=self.dtype)(x)
        y = MlpBlock(
            mlp_dim=self.mlp_dim,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            constrain=self.constrain,
        )(y, train=train)
        return self.constrain(x + y, ("batch", None, None))


class Encoder(nn.Module):
    """Position embeddings, `num_layers` blocks and a final norm."""

    num_layers: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = AddPositionEmbs(dtype=self.dtype, name="posembed_input")(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = self.constrain(x, ("batch", None, None))
        for i in range(self.num_layers):
            x = Encoder1DBlock(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_dim,
                dropout_rate=self.dropout_rate,
                attention_dropout_rate=self.attention_dropout_rate,
                dtype=self.dtype,
                constrain=self.constrain,
                name=f"encoderblock_{i}",
            )(x, train=train)
        return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=self.dtype, name="encoder_norm")(x)
