# SPDX-License-Identifier: Apache-2.0
"""MLP-Mixer, with the names and numerics of the published checkpoints.

Source: Tolstikhin et al., arXiv:2105.01601.
"""

import dataclasses

import flax.linen as nn
import jax

from vit_jax.models.block_config import Activation, BlockConfig, Constrain, unconstrained
from vit_jax.models.blocks import MlpBlock, StochasticDepth
from vit_jax.models.heads import apply_head
from vit_jax.models.lora import Lora
from vit_jax.models.positions import patch_grid
from vit_jax.models.vit import Dtype


class MixerBlock(nn.Module):
    """An MLP over tokens, then one over channels, each pre-norm with a residual connection.

    `config` has the options of the block and of its MLP over channels.

    Call: `[batch, tokens, channels]` and the rate of stochastic depth, to the same shape.
    """

    config: BlockConfig
    tokens_mlp_dim: int

    @nn.compact
    def __call__(self, x: jax.Array, rate: float, *, train: bool) -> jax.Array:
        config = self.config
        lecun, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
        tokens_config = dataclasses.replace(config, mlp_dim=self.tokens_mlp_dim)
        mix_tokens = MlpBlock(tokens_config, lecun, zeros, name="token_mixing")
        y = nn.LayerNorm(config.norm_epsilon, dtype=config.dtype)(x).swapaxes(1, 2)
        y = mix_tokens(y, train=train).swapaxes(1, 2)
        x = x + StochasticDepth()(y, rate, train=train)
        y = nn.LayerNorm(config.norm_epsilon, dtype=config.dtype)(x)
        y = MlpBlock(config, lecun, zeros, name="channel_mixing")(y, train=train)
        x = x + StochasticDepth()(y, rate, train=train)
        return config.constrain(x, ("batch", "tokens", None))


class MlpMixer(nn.Module, kw_only=True):
    """Images of one size to logits.

    Attributes that `VisionTransformer` has too are documented there.

    Attributes:
      tokens_mlp_dim: hidden width of the MLPs over tokens.
      channels_mlp_dim: hidden width of the MLPs over channels.
      dropout_rate: dropout after both layers of each MLP.
      stochastic_depth_rate: rate at which the last block drops its branches for a sample; it rises
        linearly from 0 in the first block.

    Call: images `[batch, height, width, channels]` to `(logits, out)`, as `VisionTransformer`. The
    parameters fit one number of patches only.
    """

    num_classes: int
    patch_size: tuple[int, int]
    hidden_size: int
    num_layers: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    activation: Activation = "gelu_tanh"
    head_bias_init: float = 0.0
    dtype: Dtype = "float32"
    float8: bool = False
    lora: Lora | None = None
    constrain: Constrain = unconstrained

    # How images are pooled, by the names of `VisionTransformer`.
    classifier = "gap"
    num_class_tokens = 0
    num_prefix_tokens = 0

    def grid(self, image_size: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of patches in an image of (height, width) pixels."""
        return patch_grid(image_size, self.patch_size)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        self.grid(images.shape[1:3])
        config = BlockConfig(
            mlp_dim=self.channels_mlp_dim,
            dropout_rate=self.dropout_rate,
            activation=self.activation,
            dtype=self.dtype,
            float8=self.float8,
            lora=self.lora,
            constrain=self.constrain,
        )
        x = nn.Conv(
            self.hidden_size,
            self.patch_size,
            strides=self.patch_size,
            padding="VALID",
            dtype=self.dtype,
            name="stem",
        )(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        last = max(self.num_layers - 1, 1)
        for i in range(self.num_layers):
            block = MixerBlock(config, self.tokens_mlp_dim, name=f"MixerBlock_{i}")
            x = block(x, self.stochastic_depth_rate * i / last, train=train)
        norm = nn.LayerNorm(config.norm_epsilon, dtype=self.dtype, name="pre_head_layer_norm")
        encoded = norm(x)
        x = encoded.mean(axis=1)
        out = {"encoded": encoded, "pre_logits": x}
        if self.num_classes:
            x = apply_head(
                x, self.num_classes, bias_init=self.head_bias_init, constrain=self.constrain
            )
            out["logits"] = x
        return x, out
