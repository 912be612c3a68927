# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention. Source: arXiv:1706.03762, section 3.2."""

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models.block_config import BlockConfig, Constrain
from vit_jax.models.dense import Dense, make_parameters
from vit_jax.models.norms import make_norm
from vit_jax.models.patches import Segments
from vit_jax.models.positions import (
    Coordinates,
    Relative,
    Rotation,
    initial_frequencies,
    rotate,
    rotate_by,
)
from vit_jax.models.products import project_together
from vit_jax.utils.errors import UserError
from vit_jax.utils.gpus import is_ampere

# Name of the intermediate (`flax.linen.Module.sow`) that holds the weights of an attention layer.
ATTENTION_WEIGHTS = "attention_weights"


# The kernels of cuDNN take no odd number of tokens in training.
_TOKEN_MULTIPLE = 2


def choose_attention(
    config: BlockConfig,
    device: Any,
    hidden_size: int,
    num_tokens: int,
    *,
    head_shards: int = 1,
    rows: bool = False,
    key: str = "model",
) -> Literal["xla", "fused", "pallas"]:
    """Resolves `config.attention` for a kind of devices.

    `auto` is `fused` where a kernel can compute what the model asks for and an image has at least
    as many tokens as a head has channels; with fewer, the attention weights have fewer bytes than
    the queries, so there is little to gain. On TPUs `fused` is `pallas`.

    Args:
      config: of the encoder.
      device: one of those that the model runs on.
      hidden_size: width of the encoder.
      num_tokens: of an image, a text or a row.
      head_shards: number of devices that share the heads, which it divides.
      rows: whether tokens are rows with padding, or with several images.
      key: of the model in the config.

    Raises:
      UserError: `config.attention` is `fused` where that is not possible.
    """
    if config.attention == "xla":
        return "xla"
    head_dim = hidden_size // config.num_heads
    is_tpu = device.platform == "tpu"
    dtype = jnp.dtype(config.dtype)
    needs = {
        "precision='bfloat16'": dtype == jnp.bfloat16 or (dtype == jnp.float16 and not is_tpu),
        f"{key}.attention_dropout_rate=0": config.attention_dropout_rate == 0,
        f"no {key}.position_embedding='relative'": not config.relative_positions,
        f"a multiple of 8 up to 128 channels in a head (there are {head_dim})": _fits(head_dim),
    }
    if is_tpu:
        from vit_jax.models.attention_tpu import fits_vmem

        heads = config.num_heads // head_shards
        room = fits_vmem(num_tokens, heads, head_dim, dtype.itemsize, rows=rows)
        what = f"{'a row' if rows else 'an image'} has {num_tokens} tokens"
        if head_shards > 1:
            what += f", and a device {heads} heads"
        needs[f"scores that fit into VMEM ({what})"] = room
        needs[f"{key}.causal=False"] = not config.causal  # The kernel has no causal mask.
    else:
        kind = "a TPU" if config.attention == "pallas" else "a TPU, or an NVIDIA GPU from Ampere on"
        suits = config.attention != "pallas" and is_ampere(device)
        needs = {f"{kind} (this is {device.device_kind})": suits} | needs
    missing = [need for need, is_met in needs.items() if not is_met]
    if config.attention != "auto" and missing:
        raise UserError(
            f"{key}.attention={config.attention!r} needs {' and '.join(missing)}; set "
            f"{key}.attention='auto'"
        )
    is_worth_it = config.attention != "auto" or num_tokens >= head_dim
    if missing or not is_worth_it:
        return "xla"
    return "pallas" if is_tpu else "fused"


def _fits(head_dim: int) -> bool:
    """Whether `fused_attention` takes heads of this width."""
    return head_dim % 8 == 0 and head_dim <= 128


def pallas_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    constrain: Constrain,
    segments: Segments | None = None,
) -> jax.Array:
    """`attention_tpu.tpu_attention` of arrays that `constrain` shards: nothing is gathered.

    Takes and returns `[batch, tokens, heads, head_dim]`. Scores that a device has no room for, such
    as those of larger images in an evaluation, are computed in memory.
    """
    # Pallas takes a while to import.
    from vit_jax.models import attention_tpu

    def attend(
        query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array | None = None
    ) -> jax.Array:
        """Attention of the images and heads of a device."""
        _, tokens, heads, head_dim = query.shape
        itemsize = query.dtype.itemsize
        if attention_tpu.fits_vmem(tokens, heads, head_dim, itemsize, rows=ids is not None):
            return attention_tpu.tpu_attention(query, key, value, ids)
        mask = None if ids is None else ids[:, None, :, None] == ids[:, None, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask)

    arrays, names = [query, key, value], [("batch", None, "heads", None)] * 3
    if segments is not None:
        arrays, names = [*arrays, segments.ids], [*names, ("batch", None)]
    map_shards = getattr(constrain, "map_shards", None)
    if map_shards is None:
        return attend(*arrays)
    return map_shards(attend, arrays, names)


def fused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    length: int | jax.Array,
    mask: jax.Array | None = None,
    causal: bool = False,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Attention whose weights stay within one kernel.

    Takes bfloat16 or float16 `[batch, padded length, heads, head_dim]`, where the padded length is
    even and `head_dim` a multiple of 8; returns the same shape and dtype. Only the first `length`
    keys are attended to, a number or one for each row, int32 `[batch]`, of these only those that
    `mask` has, bool `[batch, 1, queries, keys]`, and if `causal` only those up to the position of a
    query. What padded queries attend to is finite, and meant to be cut off.
    `implementation`, as in `jax.nn.dot_product_attention`, is that formula in tests on a CPU.
    Source: FlashAttention, arXiv:2205.14135.
    """
    if isinstance(length, int):
        # Without a mask, cuDNN uses another kernel. A causal one hides padded keys from all
        # queries in front of them.
        whole = causal or length == key.shape[1]
        lengths = None if whole else jnp.full(key.shape[:1], length, jnp.int32)
    else:
        lengths = length
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )


def takes_kernel(module: nn.Module, config: BlockConfig, width: int) -> bool:
    """Whether a kernel may compute self-attention over tokens of a width within a module.

    It may not if the module is applied with intermediates, which are attention weights.
    """
    wants_weights = module.is_mutable_collection("intermediates")
    return _fits(width // config.num_heads) and not wants_weights


def pad_tokens(x: jax.Array, axis: int) -> jax.Array:
    """Pads the tokens with zeros to a length that `fused_attention` takes."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % _TOKEN_MULTIPLE)
    return jnp.pad(x, widths)


def _has_bias(config: BlockConfig, name: str) -> bool:
    """Whether the projection of this name, such as "query", has a bias."""
    return config.qkv_bias == "all" or (config.qkv_bias == "query_value" and name != "key")


class _Projection(nn.Module):
    """The parameters of a `Dense` layer with several dimensions of features.

    Call: the width of the input, to the kernel `[width, features]` and the bias `[features]`, which
    are matrices and vectors over all features, float32. Without `use_bias` the bias is zero.
    """

    features: tuple[int, ...]
    use_bias: bool = True

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array]:
        bias_init = nn.initializers.zeros if self.use_bias else None
        kernel_init = nn.initializers.xavier_uniform()
        kernel, bias = make_parameters(self, (width,), self.features, kernel_init, bias_init)
        size = math.prod(self.features)
        bias = jnp.zeros(size) if bias is None else bias.reshape(size)
        return kernel.reshape(width, size), bias


class MultiHeadDotProductAttention(nn.Module):
    """Attention with biases on all four projections, or on those that `config.qkv_bias` names.

    Call: queries come from `x` `[batch, length, hidden]`, keys and values from `context`
    `[batch, context length, hidden]`, or from `x` too; returns `[batch, length, hidden]` in
    `config.dtype`. The softmax is float32 for any dtype; its weights, float32
    `[batch, heads, queries, keys]`, are the intermediate `ATTENTION_WEIGHTS`. With
    `config.attention="fused"`, `fused_attention` takes its place for self-attention, and with
    "pallas" `pallas_attention`, unless intermediates are asked for. Only the first
    `length` tokens are then attended to by `fused_attention`; None for all. With `config.causal`
    a token attends to itself and those before it. `segments` are the images that tokens of self-
    attention belong to, each of which attends to its own. `mask`, bool `[batch, queries, keys]`, is
    what queries from `x` attend to.
    With `Coordinates`, the layer has frequencies of its own, `rope_frequencies`; with `relative` it
    has a bias for each distance and head, `relative_position_bias`, zeros at first.
    Sources: `qk_norm`: arXiv:2302.05442; `rope`: see `positions.rotation_2d` and `rotate_by`;
    `relative`: see `positions.relate_tokens`; `attention_norm`, of the heads' outputs together:
    arXiv:2210.06423, section 3.
    """

    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        rope: Rotation | Coordinates | None = None,
        relative: Relative | None = None,
        length: int | None = None,
        segments: Segments | None = None,
        mask: jax.Array | None = None,
        train: bool,
    ) -> jax.Array:
        config = self.config
        width = x.shape[-1]
        head_dim = width // config.num_heads

        def project(x: jax.Array, name: str) -> jax.Array:
            dense = Dense(
                (config.num_heads, head_dim),
                dtype=config.dtype,
                use_bias=_has_bias(config, name),
                **config.product,
                name=name,
            )
            x = checkpoint_name(dense(x), "qkv")
            return config.constrain(x, ("batch", None, "heads", None))

        num_tokens = x.shape[1]
        in_kernel = context is None and takes_kernel(self, config, width)
        fused, pallas = (in_kernel and config.attention == kind for kind in ("fused", "pallas"))
        pallas = pallas and not config.causal
        if fused:
            x = pad_tokens(x, 1)
            rope = jax.tree.map(lambda table: pad_tokens(table, -2), rope)
        plain = not config.float8 and config.lora is None
        if config.blocks == "fused" and context is None and plain:
            query, key, value = self._project_together(x)
        else:
            context = x if context is None else context
            query, key = project(x, "query"), project(context, "key")
            value = project(context, "value")
        if config.qk_norm:
            query = make_norm(config, "query_norm")(query)
            key = make_norm(config, "key_norm")(key)
        if isinstance(rope, Coordinates):
            init = functools.partial(initial_frequencies, theta=config.rope_theta or 10.0)
            shape = (2, config.num_heads, head_dim // 2)
            frequencies = self.param("rope_frequencies", init, shape)
            query, key = (rotate_by(x, rope, frequencies) for x in (query, key))
        elif rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        if fused:
            x = self._attend_in_kernel(query, key, value, length or num_tokens, segments)
        elif pallas:
            x = pallas_attention(query, key, value, config.constrain, segments)
        else:
            query = query / jnp.sqrt(head_dim).astype(config.dtype)
            scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
            if relative is not None:
                shape = (relative.count, config.num_heads)
                biases = self.param("relative_position_bias", nn.initializers.zeros, shape)
                scores += jnp.moveaxis(biases[relative.index], -1, -3)
            if config.causal:
                scores = jnp.where(jnp.tri(num_tokens, dtype=bool), scores, -jnp.inf)
            if segments is not None:
                mask = segments.pad(num_tokens).mask()
            if mask is not None:
                # Finite, since an absent image has no key.
                scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
            weights = jax.nn.softmax(scores)
            # Costs nothing unless `apply` is asked for intermediates.
            self.sow("intermediates", ATTENTION_WEIGHTS, weights)
            dropout = nn.Dropout(config.attention_dropout_rate, deterministic=not train)
            x = jnp.einsum("bhqk,bkhd->bqhd", dropout(weights.astype(config.dtype)), value)
        if config.attention_norm:
            x = make_norm(config, "norm")(x.reshape(*x.shape[:2], width)).reshape(x.shape)
        out = Dense((width,), num_inputs=2, dtype=config.dtype, **config.product, name="out")
        x = out(x)
        return checkpoint_name(x[:, :num_tokens], "attn_out")

    def _attend_in_kernel(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        length: int,
        segments: Segments | None,
    ) -> jax.Array:
        """`fused_attention` of padded tokens, of which `length` are attended to, or `segments`."""
        config = self.config
        attend = functools.partial(fused_attention, query, key, value, causal=config.causal)
        if segments is None:
            return attend(length=length)
        if segments.images == 1:
            return attend(length=segments.lengths())
        # Only a mask can say what several images of a row attend to. It is the same for all heads,
        # and all layers of a program share it. Padding has one number, and attends to itself.
        mask = segments.pad(query.shape[1]).mask()[:, None]
        mask = config.constrain(mask, ("batch", None, None, None))
        return attend(length=query.shape[1], mask=mask)

    def _project_together(self, x: jax.Array) -> list[jax.Array]:
        """The queries, keys and values of tokens, as their dense layers have them."""
        config = self.config
        heads = config.num_heads, x.shape[-1] // config.num_heads
        layers = [
            _Projection(heads, use_bias=_has_bias(config, name), name=name)(x.shape[-1])
            for name in ("query", "key", "value")
        ]
        kernels = tuple(kernel.astype(config.dtype) for kernel, _ in layers)
        biases = tuple(bias.astype(config.dtype) for _, bias in layers)
        projected = project_together(x.reshape(-1, x.shape[-1]), kernels, biases)
        projected = (checkpoint_name(y.reshape(*x.shape[:-1], *heads), "qkv") for y in projected)
        return [config.constrain(y, ("batch", None, "heads", None)) for y in projected]
