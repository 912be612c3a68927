# SPDX-License-Identifier: Apache-2.0
"""The light decoder of masked autoencoders. Source: arXiv:2111.06377, section 3."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models.layers import Activation, Constrain, Encoder1DBlock, unconstrained
from vit_jax.models.positions import fixed_positions


class MaskedDecoder(nn.Module, kw_only=True):
    """From the encoded tokens of the visible patches to the pixels of all patches.

    Attributes:
      hidden_size: width; divisible by 4 and by `num_heads`.
      num_layers: number of blocks.
      num_heads: attention heads.
      mlp_dim: hidden width of the MLP blocks.
      patch_values: numbers that are predicted for a patch.
      activation: of the MLP blocks.
      norm_epsilon: of all LayerNorms.
      dtype: of the computation.
      float8: as in `VisionTransformer`.
      constrain: places activations on a mesh.

    Call: encoded `[batch, prefix + visible, width of the encoder]`, the numbers of the visible
    patches `[batch, visible]` and the grid (rows, columns), to float32 predictions
    `[batch, rows * columns, patch_values]`. Positions are fixed sines and cosines; prefix tokens
    have none.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    patch_values: int
    activation: Activation = "gelu_tanh"
    norm_epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32
    float8: bool = False
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(
        self, encoded: jax.Array, visible: jax.Array, grid: tuple[int, int], *, train: bool
    ) -> jax.Array:
        batch, length, width = encoded.shape[0], grid[0] * grid[1], self.hidden_size
        xavier = nn.initializers.xavier_uniform()
        x = nn.Dense(width, dtype=self.dtype, kernel_init=xavier, name="embedding")(encoded)
        prefix, patches = jnp.split(x, [x.shape[1] - visible.shape[1]], axis=1)
        mask = self.param("mask_token", nn.initializers.normal(stddev=0.02), (1, 1, width))
        # The place of each patch among the visible ones, and after them for those that are not.
        place = jnp.full((batch, length), visible.shape[1])
        rows = jnp.arange(batch)[:, None]
        place = place.at[rows, visible].set(jnp.arange(visible.shape[1]))
        mask = jnp.broadcast_to(mask.astype(self.dtype), (batch, 1, width))
        patches = jnp.concatenate([patches, mask], axis=1)
        patches = jnp.take_along_axis(patches, place[..., None], axis=1)
        patches = patches + jnp.asarray(fixed_positions("sincos2d_mae", grid, width), self.dtype)
        x = self.constrain(jnp.concatenate([prefix, patches], axis=1), ("batch", "tokens", None))
        for i in range(self.num_layers):
            x = Encoder1DBlock(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_dim,
                activation=self.activation,
                norm_epsilon=self.norm_epsilon,
                dtype=self.dtype,
                float8=self.float8,
                constrain=self.constrain,
                name=f"encoderblock_{i}",
            )(x, 0.0, None, train=train)
        x = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name="norm")(x)
        x = x[:, prefix.shape[1] :]
        x = nn.Dense(self.patch_values, dtype=self.dtype, kernel_init=xavier, name="pixels")(x)
        return x.astype(jnp.float32)
