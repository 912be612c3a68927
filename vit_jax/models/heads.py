# SPDX-License-Identifier: Apache-2.0
"""Heads: from encoded tokens to a representation, and from there to logits."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.attention import MultiHeadDotProductAttention
from vit_jax.models.block_config import BlockConfig, Constrain
from vit_jax.models.blocks import MlpBlock
from vit_jax.models.norms import make_norm

# How the kernel of a head starts: at zero, or as that of any dense layer.
HeadInit = Literal["zeros", "lecun_normal"]
_HEAD_INITS = {"zeros": nn.initializers.zeros, "lecun_normal": nn.initializers.lecun_normal()}


class MAPHead(nn.Module):
    """Multihead attention pooling: a learned probe attends to all tokens, without dropout.

    Call: `[batch, length, hidden]` to `[batch, hidden]`, both in `config.dtype`. With `members`,
    bool `[batch, images, length]`, the tokens of each of several images, it is to `[batch, images,
    hidden]`. `num_heads` and `mlp_dim` are those of the blocks by default.
    Source: arXiv:2106.04560, section 3.1.
    """

    config: BlockConfig
    num_heads: int | None = None
    mlp_dim: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, members: jax.Array | None = None, *, train: bool) -> jax.Array:
        off = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0, "qk_norm": False}
        off |= {"causal": False, "qkv_bias": "all", "attention_norm": False, "mlp_norm": False}
        off |= {"num_heads": self.num_heads or self.config.num_heads}
        off |= {"mlp_dim": self.mlp_dim or self.config.mlp_dim}
        config = dataclasses.replace(self.config, **off)
        batch, _, width = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
        images = 1 if members is None else members.shape[1]
        probe = jnp.broadcast_to(probe.astype(config.dtype), (batch, images, width))
        x = MultiHeadDotProductAttention(config)(probe, x, mask=members, train=train)
        y = make_norm(config, "LayerNorm_0")(x)
        y = MlpBlock(config)(y, train=train)
        return (x + y)[:, 0] if members is None else x + y


def apply_head(
    x: jax.Array,
    num_classes: int,
    *,
    bias_init: float,
    bias: bool = True,
    init: HeadInit = "zeros",
    constrain: Constrain,
    name: str = "head",
) -> jax.Array:
    """Applies a linear layer, with a bias or without; call it in a compact module.

    Takes `[batch, ..., width]` of any floating dtype, and returns logits, float32 `[batch, ...,
    num_classes]`, sharded by classes where the mesh does so.
    """

    def dot_by_classes(x: jax.Array, kernel: jax.Array, *args, **kwargs) -> jax.Array:
        # However the kernel is sharded, no device computes the logits of all classes.
        return jax.lax.dot_general(x, constrain(kernel, (None, "classes")), *args, **kwargs)

    logits = nn.Dense(
        num_classes,
        dtype=jnp.float32,
        use_bias=bias,
        kernel_init=_HEAD_INITS[init],
        bias_init=nn.initializers.constant(bias_init),
        dot_general=dot_by_classes,
        name=name,
    )(x)
    return constrain(logits, ("batch", *(None,) * (x.ndim - 2), "classes"))
