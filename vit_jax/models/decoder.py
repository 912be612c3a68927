# SPDX-License-Identifier: Apache-2.0
"""The small decoder of masked autoencoders. Source: arXiv:2111.06377, section 3."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.block_config import BlockConfig
from vit_jax.models.blocks import Encoder1DBlock
from vit_jax.models.positions import fixed_positions


class MaskedDecoder(nn.Module, kw_only=True):
    """Predicts the pixels of all patches from the encoded visible ones.

    `hidden_size` is divisible by 4 and by `config.num_heads`; `patch_values` is the number of
    values predicted for a patch.

    Call: encoded tokens `[batch, prefix + visible, encoder width]`, the indices of the visible
    patches, int32 `[batch, visible]`, and the grid (rows, columns), to predictions, float32
    `[batch, rows * columns, patch_values]`. Positions are fixed sines and cosines; prefix tokens
    have none.
    """

    config: BlockConfig
    hidden_size: int
    num_layers: int
    patch_values: int

    @nn.compact
    def __call__(
        self, encoded: jax.Array, visible: jax.Array, grid: tuple[int, int], *, train: bool
    ) -> jax.Array:
        config = self.config
        batch, length, width = encoded.shape[0], grid[0] * grid[1], self.hidden_size
        xavier = nn.initializers.xavier_uniform()
        x = nn.Dense(width, dtype=config.dtype, kernel_init=xavier, name="embedding")(encoded)
        prefix, patches = jnp.split(x, [x.shape[1] - visible.shape[1]], axis=1)
        mask = self.param("mask_token", nn.initializers.normal(stddev=0.02), (1, 1, width))
        # The index of each patch among the visible ones; behind them is the mask token.
        place = jnp.full((batch, length), visible.shape[1])
        rows = jnp.arange(batch)[:, None]
        place = place.at[rows, visible].set(jnp.arange(visible.shape[1]))
        mask = jnp.broadcast_to(mask.astype(config.dtype), (batch, 1, width))
        patches = jnp.concatenate([patches, mask], axis=1)
        patches = jnp.take_along_axis(patches, place[..., None], axis=1)
        patches = patches + jnp.asarray(fixed_positions("sincos2d_mae", grid, width), config.dtype)
        x = config.constrain(jnp.concatenate([prefix, patches], axis=1), ("batch", "tokens", None))
        for i in range(self.num_layers):
            x = Encoder1DBlock(config, name=f"encoderblock_{i}")(x, 0.0, None, train=train)
        x = nn.LayerNorm(config.norm_epsilon, dtype=config.dtype, name="norm")(x)
        x = x[:, prefix.shape[1] :]
        x = nn.Dense(self.patch_values, dtype=config.dtype, kernel_init=xavier, name="pixels")(x)
        return x.astype(jnp.float32)
