# SPDX-License-Identifier: Apache-2.0
"""The options that the layers of a model share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models.lora import NAME as LORA
from vit_jax.models.lora import Lora, LoraProduct
from vit_jax.models.products import dot_tokens, dot_tokens_float8

# Shards an activation over the mesh, given one logical name for each of its dimensions. The method
# `map_shards` of that of a mesh runs a function on the part of each device (see
# `parallel.sharding.Placement`).
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

# Where attention weights are computed: in memory by XLA, or within one kernel, which is cuDNN's on
# GPUs and one of Pallas on TPUs. `auto` is the faster one on the devices of a run (see
# `attention.choose_attention`), and XLA outside of runs.
Attention = Literal["auto", "xla", "fused", "pallas"]

# How the rest of a block is computed: by the layers of Flax, or in the form that has the fewest
# kernels on NVIDIA GPUs. `auto` goes by the devices of a run (see `blocks.choose_blocks`).
Blocks = Literal["auto", "xla", "fused"]

# How tokens are normalised (see `norms.make_norm`).
Norm = Literal["layer_norm", "rms_norm"]

# Which of the projections of queries, keys and values have a bias.
QkvBias = Literal["all", "query_value", "none"]

Activation = Literal["gelu_tanh", "gelu_erf", "quick_gelu", "swiglu"]


def unconstrained(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Returns `x`, of any shape: the `Constrain` of a model that runs on one device."""
    del names
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The options of attention layers and MLPs, and of the blocks and heads that contain them.

    Each field is documented under its name in `models.vit.VisionTransformer`, and `causal` in
    `models.text.TextTransformer`; `num_heads` is 0 in a model without attention.
    """

    mlp_dim: int
    num_heads: int = 0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    attention: Attention = "auto"
    blocks: Blocks = "auto"
    causal: bool = False
    activation: Activation = "gelu_tanh"
    qk_norm: bool = False
    qkv_bias: QkvBias = "all"
    attention_norm: bool = False
    mlp_norm: bool = False
    norm: Norm = "layer_norm"
    layer_scale_init: float | None = None
    norm_epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32
    float8: bool = False
    lora: Lora | None = None
    rope_theta: float | None = None
    relative_positions: bool = False
    constrain: Constrain = unconstrained

    @property
    def product(self) -> dict[str, Any]:
        """The matrix product of dense layers on tokens, as arguments of `models.dense.Dense`."""
        product = dot_tokens_float8 if self.float8 else dot_tokens
        if self.lora is None:
            return {"dot_general": product}
        return {"dot_general_cls": functools.partial(LoraProduct, self.lora, product, name=LORA)}
