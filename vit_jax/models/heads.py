# SPDX-License-Identifier: Apache-2.0
"""From encoded tokens to logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models.layers import (
    Activation,
    Constrain,
    MlpBlock,
    MultiHeadDotProductAttention,
    unconstrained,
)


class MAPHead(nn.Module):
    """Multihead attention pooling: a learned probe attends to all tokens.

    Call: `[batch, length, hidden]` to `[batch, hidden]`. Source: arXiv:2106.04560, section 3.1.
    """

    num_heads: int
    mlp_dim: int
    activation: Activation = "gelu_tanh"
    norm_epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32
    float8: bool = False
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        batch, _, width = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
        x = MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            float8=self.float8,
            constrain=self.constrain,
        )(jnp.broadcast_to(probe.astype(self.dtype), (batch, 1, width)), x, train=train)
        y = nn.LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype)(x)
        y = MlpBlock(
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            dtype=self.dtype,
            float8=self.float8,
            constrain=self.constrain,
        )(y, train=train)
        return (x + y)[:, 0]


def apply_head(
    x: jax.Array, num_classes: int, *, bias_init: float, constrain: Constrain, name: str = "head"
) -> jax.Array:
    """A linear layer, zero at the start; called inside a compact module.

    Args:
      x: `[batch, ..., width]`.
      num_classes: width of the logits.
      bias_init: initial value of the bias.
      constrain: places activations on a mesh.
      name: of the layer.

    Returns:
      Logits in float32, split over classes where the mesh splits them.
    """

    def dot_by_classes(x: jax.Array, kernel: jax.Array, *args, **kwargs) -> jax.Array:
        # However the kernel is stored, no device shall compute the logits of all classes.
        return jax.lax.dot_general(x, constrain(kernel, (None, "classes")), *args, **kwargs)

    logits = nn.Dense(
        num_classes,
        dtype=jnp.float32,
        kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(bias_init),
        dot_general=dot_by_classes,
        name=name,
    )(x)
    return constrain(logits, ("batch", *(None,) * (x.ndim - 2), "classes"))
