# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention. Source: arXiv:1706.03762, section 3.2."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models.block_config import BlockConfig
from vit_jax.models.positions import Rotation, rotate
from vit_jax.utils.errors import UserError

# Name of the intermediate (`flax.linen.Module.sow`) that holds the weights of an attention layer.
ATTENTION_WEIGHTS = "attention_weights"


# The kernels of cuDNN take no odd number of tokens in training; 8 tokens are 16 bytes of bfloat16.
_TOKEN_MULTIPLE = 8


def choose_attention(
    config: BlockConfig, device: Any, hidden_size: int, num_tokens: int, *, key: str = "model"
) -> Literal["xla", "fused"]:
    """Resolves `config.attention` for a kind of devices.

    `auto` is `fused` where `fused_attention` can compute what the model asks for and an image has
    at least as many tokens as a head has channels; with fewer, the attention weights have fewer
    bytes than the queries, so there is little to gain.

    Args:
      config: of the encoder.
      device: one of those that the model runs on.
      hidden_size: width of the encoder.
      num_tokens: of an image or a text.
      key: of the model in the config.

    Raises:
      UserError: `config.attention` is `fused` where that is not possible.
    """
    if config.attention == "xla":
        return "xla"
    head_dim = hidden_size // config.num_heads
    is_gpu = device.platform in ("gpu", "cuda")
    capability = getattr(device, "compute_capability", None)
    needs = {
        f"an NVIDIA GPU from Ampere on (this is {device.device_kind})": is_gpu
        and capability is not None
        and float(capability) >= 8,
        "precision='bfloat16'": jnp.dtype(config.dtype).itemsize == 2,
        f"{key}.attention_dropout_rate=0": config.attention_dropout_rate == 0,
        f"a multiple of 8 up to 128 channels in a head (there are {head_dim})": _fits(head_dim),
    }
    missing = [need for need, is_met in needs.items() if not is_met]
    if config.attention == "fused" and missing:
        raise UserError(
            f"{key}.attention='fused' needs {' and '.join(missing)}; set {key}.attention='auto'"
        )
    is_worth_it = config.attention == "fused" or num_tokens >= head_dim
    return "fused" if is_worth_it and not missing else "xla"


def _fits(head_dim: int) -> bool:
    """Whether `fused_attention` takes heads of this width."""
    return head_dim % 8 == 0 and head_dim <= 128


def fused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    length: int,
    causal: bool = False,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Attention whose weights stay within one kernel.

    Takes bfloat16 or float16 `[batch, padded length, heads, head_dim]`, where the padded length is
    even and `head_dim` a multiple of 8; returns the same shape and dtype. Only the first `length`
    keys are attended to, and if `causal` only those up to the position of a query. What padded
    queries attend to is finite, and meant to be cut off.
    `implementation`, as in `jax.nn.dot_product_attention`, is that formula in tests on a CPU.
    Source: FlashAttention, arXiv:2205.14135.
    """
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=causal,
        # Without a mask, cuDNN uses another kernel. A causal one hides padded keys from all
        # queries in front of them.
        key_value_seq_lengths=None
        if causal or length == key.shape[1]
        else jnp.full(key.shape[:1], length, jnp.int32),
        implementation=implementation,
    )


def _pad_tokens(x: jax.Array, axis: int) -> jax.Array:
    """Pads the tokens with zeros to a length that `fused_attention` takes."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % _TOKEN_MULTIPLE)
    return jnp.pad(x, widths)


class MultiHeadDotProductAttention(nn.Module):
    """Attention with biases on all four projections.

    Call: queries come from `x` `[batch, length, hidden]`, keys and values from `context`
    `[batch, context length, hidden]`, or from `x` too; returns `[batch, length, hidden]` in
    `config.dtype`. The softmax is float32 for any dtype; its weights, float32
    `[batch, heads, queries, keys]`, are the intermediate `ATTENTION_WEIGHTS`. With
    `config.attention="fused"`, `fused_attention` takes its place for self-attention, unless
    intermediates are asked for. With `config.causal` a token attends to itself and those before.
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
                **config.product,
                name=name,
            )
            x = checkpoint_name(dense(x), "qkv")
            return config.constrain(x, ("batch", None, "heads", None))

        length = x.shape[1]
        wants_weights = self.is_mutable_collection("intermediates")
        fused = (
            config.attention == "fused"
            and context is None
            and _fits(head_dim)
            and not wants_weights
        )
        if fused:
            # Zeros are added to what the norm writes, and removed from what the residual
            # connection reads: neither is a kernel of its own.
            x = _pad_tokens(x, 1)
            rope = jax.tree.map(lambda table: _pad_tokens(table, -2), rope)
        context = x if context is None else context
        query, key = project(x, "query"), project(context, "key")
        value = project(context, "value")
        if config.qk_norm:
            query = nn.LayerNorm(config.norm_epsilon, dtype=config.dtype, name="query_norm")(query)
            key = nn.LayerNorm(config.norm_epsilon, dtype=config.dtype, name="key_norm")(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        if fused:
            x = fused_attention(query, key, value, length=length, causal=config.causal)
        else:
            query = query / jnp.sqrt(head_dim).astype(config.dtype)
            scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
            if config.causal:
                scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
            weights = jax.nn.softmax(scores)
            # Costs nothing unless `apply` is asked for intermediates.
            self.sow("intermediates", ATTENTION_WEIGHTS, weights)
            dropout = nn.Dropout(config.attention_dropout_rate, deterministic=not train)
            x = jnp.einsum("bhqk,bkhd->bqhd", dropout(weights.astype(config.dtype)), value)
        x = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=config.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            **config.product,
            name="out",
        )(x)
        return checkpoint_name(x[:, :length], "attn_out")
