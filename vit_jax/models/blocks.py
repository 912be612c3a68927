# SPDX-License-Identifier: Apache-2.0
"""The encoder of the Vision Transformer and its blocks.

Class names are those of the published ViT checkpoints, because Flax derives parameter paths from
them. Numerics follow the published weights: pre-norm, LayerNorm epsilon 1e-6, tanh GELU.
Parameters, norm statistics and the softmax are float32; everything else runs in `config.dtype`.
Shapes without a dtype are of arrays in `config.dtype`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from vit_jax.models.activations import gelu, quick_gelu
from vit_jax.models.attention import MultiHeadDotProductAttention, pad_tokens, takes_kernel
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.dense import Dense
from vit_jax.models.norms import make_norm
from vit_jax.models.patches import Layout, Segments, interpolate_axes, interpolate_positions
from vit_jax.models.positions import Coordinates, Relative, Rotation, resize_patches
from vit_jax.models.resampling import Method
from vit_jax.utils.errors import UserError
from vit_jax.utils.gpus import is_ampere
from vit_jax.utils.suggestions import suggest

DepthSchedule = Literal["linear", "uniform"]
# Collection of what each block returns, as `output`, for a caller that makes it mutable. It is not
# "intermediates", which are attention weights too, and these no kernel computes.
BLOCK_OUTPUTS = "block_outputs"
# See `parse_remat`.
Remat = Literal["none", "dots", "full"] | str

# Which results of a block's forward pass are saved for the backward pass; the rest is recomputed.
# "dots" saves the outputs of dense layers, and recomputes attention weights, norms and activations.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
# Activations that `save:` and `offload:` accept: queries, keys and values; the output of an
# attention layer; the hidden state of an MLP, before its activation.
REMAT_NAMES = ("qkv", "attn_out", "mlp_hidden")


def parse_remat(remat: str, *, key: str = "model.remat") -> Callable[..., Any] | None:
    """Returns the checkpoint policy that `model.remat` names; None for no recomputation.

    `remat` is `none`, `dots`, `full`, or the activations of `REMAT_NAMES` that are not recomputed:
    `save:attn_out,mlp_hidden` keeps them on the device, `offload:mlp_hidden` in the host's memory;
    `save:attn_out;offload:mlp_hidden` combines both. Raises `UserError` for anything else.
    """
    if remat == "none":
        return None
    if remat in REMAT_POLICIES:
        return REMAT_POLICIES[remat]
    chosen: dict[str, list[str]] = {"save": [], "offload": []}
    for part in remat.split(";"):
        kind, _, names = part.partition(":")
        if kind not in chosen or not names:
            raise UserError(
                f"{key}={remat!r}: expected none, dots, full, or such as "
                "save:attn_out,mlp_hidden or offload:mlp_hidden"
            )
        for name in names.split(","):
            if name not in REMAT_NAMES:
                raise UserError(f"{key}={remat!r}: {name!r}{suggest(name, REMAT_NAMES)}")
            chosen[kind].append(name)
    if not chosen["offload"]:
        return jax.checkpoint_policies.save_only_these_names(*chosen["save"])
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=chosen["save"],
        names_which_can_be_offloaded=chosen["offload"],
        offload_src="device",
        offload_dst="pinned_host",
    )


def choose_blocks(
    config: BlockConfig, device: Any, *, sequence_parallel: bool
) -> Literal["xla", "fused"]:
    """Resolves `config.blocks` for a kind of devices: `auto` is `fused` where that is possible.

    Args:
      config: of the encoder.
      device: one of those that the model runs on.
      sequence_parallel: whether tokens of an image are split over devices.

    Raises:
      UserError: `config.blocks` is `fused` where that is not possible.
    """
    if config.blocks == "xla":
        return "xla"
    needs = {
        f"an NVIDIA GPU from Ampere on (this is {device.device_kind})": is_ampere(device),
        "mesh.sequence_parallel=False": not sequence_parallel,
    }
    missing = [need for need, is_met in needs.items() if not is_met]
    if config.blocks == "fused" and missing:
        raise UserError(
            f"model.blocks='fused' needs {' and '.join(missing)}; set model.blocks='auto'"
        )
    return "xla" if missing else "fused"


class AddPositionEmbs(nn.Module):
    """Adds learned 1D position embeddings, initialised from N(0, `init_std`).

    Attributes:
      grids: (rows, columns) of the embeddings and of the patches, if they differ; the embeddings
        are then resized in each call, and the gradient goes through that.
      num_prefix_tokens: tokens before the patches, whose embeddings stay.
      method: how they are resized.
      keep_aspect: see `patches.interpolate_positions`.
      factorized: whether there is one for each row and one for each column, and none for tokens
        before the patches.

    Call: `[batch, length, hidden]`, and where the patches are unless the grid of all images is the
    second of `grids`, to the same shape. Source: arXiv:2010.11929, section 3.1.
    """

    dtype: DTypeLike = jnp.float32
    init_std: float = 0.02
    grids: tuple[tuple[int, int], tuple[int, int]] | None = None
    num_prefix_tokens: int = 0
    method: Method | None = None
    keep_aspect: bool = False
    factorized: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, layout: Layout | None = None) -> jax.Array:
        length, init = x.shape[1], nn.initializers.normal(self.init_std)
        if self.factorized:
            assert self.grids is not None
            assert layout is not None
            tables = [
                self.param(f"pos_embedding_{axis}", init, (length, x.shape[2]))
                for axis, length in zip("yx", self.grids[0], strict=True)
            ]
            added = interpolate_axes((tables[0], tables[1]), layout, keep_aspect=self.keep_aspect)
            added = jnp.pad(added, ((0, 0), (self.num_prefix_tokens, 0), (0, 0)))
            return x + added.astype(self.dtype)
        if self.grids is not None:
            length = self.num_prefix_tokens + math.prod(self.grids[0])
        shape = (1, length, x.shape[2])
        embedding = self.param("pos_embedding", init, shape)
        method = self.method or "bicubic_no_antialias"
        if self.grids is not None:
            prefix, patches = jnp.split(embedding, [self.num_prefix_tokens], axis=1)
            if layout is None:
                patches = resize_patches(patches, *self.grids, method)
            else:
                table = patches.reshape(*self.grids[0], -1)
                patches = interpolate_positions(
                    table, layout, method=method, keep_aspect=self.keep_aspect
                )
                prefix = jnp.broadcast_to(prefix, (patches.shape[0], *prefix.shape[1:]))
            embedding = jnp.concatenate([prefix, patches], axis=1)
        return x + embedding.astype(self.dtype)


class PatchDropout(nn.Module):
    """Drops a random share `rate` of the patches of each image, in training only.

    Call: `[batch, prefix + patches, hidden]` and the number of prefix tokens, which are all kept,
    to `[batch, prefix + kept, hidden]` and the indices of these tokens, int32
    `[batch, prefix + kept]`; None for the indices if nothing is dropped. Source: arXiv:2212.00794.
    """

    rate: float

    @nn.compact
    def __call__(
        self, x: jax.Array, prefix: int, *, train: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        if not train or not self.rate:
            return x, None
        batch, length, _ = x.shape
        kept = max(1, round((length - prefix) * (1 - self.rate)))
        noise = jax.random.uniform(self.make_rng("dropout"), (batch, length - prefix))
        return take_patches(x, jnp.sort(jax.lax.top_k(noise, kept)[1]), prefix)


def take_patches(x: jax.Array, patches: jax.Array, prefix: int) -> tuple[jax.Array, jax.Array]:
    """Selects the first `prefix` tokens and those of `patches`, which come behind them.

    Takes `[batch, prefix + patches, hidden]` of any dtype, and the indices of the patches to keep,
    int32 `[batch, kept]`. Returns `[batch, prefix + kept, hidden]`, and the indices of the tokens,
    int32 `[batch, prefix + kept]`.
    """
    first = jnp.broadcast_to(jnp.arange(prefix), (x.shape[0], prefix))
    indices = jnp.concatenate([first, patches + prefix], axis=1)
    return jnp.take_along_axis(x, indices[..., None], axis=1), indices


class StochasticDepth(nn.Module):
    """Zeroes a residual branch for random samples and divides it by 1 - rate for the others.

    Call: the branch `[batch, length, hidden]` and the rate, a float or a float32 scalar, to the
    same shape; the identity outside training. Source: arXiv:1603.09382.
    """

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | float, *, train: bool) -> jax.Array:
        if not train or (isinstance(rate, float) and not rate):
            return x
        keep = jnp.asarray(1.0 - rate, jnp.float32)
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0], 1, 1))
        return jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


class LayerScale(nn.Module):
    """Scales each channel of a residual branch by a factor that starts at `initial`.

    Call: `[batch, length, hidden]` to the same shape. Source: arXiv:2103.17239, section 2.1.
    """

    initial: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(self.initial)
        return x * self.param("scale", init, (x.shape[-1],)).astype(self.dtype)


class MlpBlock(nn.Module):
    """Dense, activation, dropout, Dense, dropout; hidden width `config.mlp_dim`.

    Call: `[batch, length, width]` to the same shape. With the activation "swiglu" the hidden state
    is Dense(x) * silu(gate(x)) (arXiv:2002.05202). With `config.mlp_norm` it is normalised
    (arXiv:2210.06423).
    """

    config: BlockConfig
    kernel_init: Callable[..., Any] = nn.initializers.xavier_uniform()
    bias_init: Callable[..., Any] = nn.initializers.normal(stddev=1e-6)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        config = self.config

        def dense(features: int, name: str | None = None) -> Dense:
            return Dense(
                (features,),
                dtype=config.dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                **config.product,
                name=name,
            )

        width = x.shape[-1]
        # Saved before the activation, whose gradient needs it: one layer less is recomputed.
        hidden = checkpoint_name(dense(config.mlp_dim)(x), "mlp_hidden")
        if config.activation == "swiglu":
            hidden = hidden * nn.silu(dense(config.mlp_dim, "gate")(x))
        elif config.activation == "quick_gelu":
            hidden = quick_gelu(hidden)
        else:
            hidden = gelu(hidden, approximate=config.activation == "gelu_tanh")
        hidden = config.constrain(hidden, ("batch", None, "mlp"))
        if config.mlp_norm:
            hidden = make_norm(config, "norm")(hidden)
        hidden = nn.Dropout(config.dropout_rate, deterministic=not train)(hidden)
        x = dense(width)(hidden)
        return nn.Dropout(config.dropout_rate, deterministic=not train)(x)


class Encoder1DBlock(nn.Module):
    """One pre-norm transformer block: attention and MLP, each with a residual connection.

    Call: `[batch, tokens, hidden]`, the rate of stochastic depth in this block (a float or a
    float32 scalar), the rotation of queries and keys, where tokens are if the block has frequencies
    of its own, or None, the number of tokens before any padding or None, the images of the tokens
    or None, and which biases attention has or None, to `[batch, tokens, hidden]`. The result is in
    the collection `BLOCK_OUTPUTS` too.
    """

    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        stochastic_depth_rate: jax.Array | float,
        rope: Rotation | Coordinates | None,
        length: int | None = None,
        segments: Segments | None = None,
        relative: Relative | None = None,
        *,
        train: bool,
    ) -> jax.Array:
        config = self.config

        def residual(x: jax.Array) -> jax.Array:
            if config.layer_scale_init is not None:
                x = LayerScale(config.layer_scale_init, dtype=config.dtype)(x)
            return StochasticDepth()(x, stochastic_depth_rate, train=train)

        def norm(x: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
            """The input of a residual branch, to which its result is added, and its norm."""
            if config.blocks != "fused" or config.norm != "layer_norm":
                return x, make_norm(config, name)(x)
            from vit_jax.models.layer_norm import LayerNorm

            # As matrices, so that XLA adds to the input within the last product of the branch.
            layer = LayerNorm(config.norm_epsilon, config.dtype, name=name)
            flat, normed = layer(x.reshape(-1, x.shape[-1]))
            return flat, normed.reshape(x.shape)

        def add(x: jax.Array, branch: jax.Array) -> jax.Array:
            total = (x + residual(branch).reshape(x.shape)).reshape(branch.shape)
            return config.constrain(total, ("batch", "tokens", None))

        x, y = norm(x, "LayerNorm_0")
        attend = MultiHeadDotProductAttention(config)
        y = attend(y, rope=rope, relative=relative, length=length, segments=segments, train=train)
        x = add(x, nn.Dropout(config.dropout_rate, deterministic=not train)(y))
        x, y = norm(x, "LayerNorm_1")
        x = add(x, MlpBlock(config)(y, train=train))
        if not self.is_initializing():  # All collections are mutable then.
            self.sow(BLOCK_OUTPUTS, "output", x)
        return x


class Encoder(nn.Module, kw_only=True):
    """Learned position embeddings, register tokens, `num_layers` blocks and a final norm.

    Attributes that `VisionTransformer` has too are documented there.

    Attributes:
      config: options of the blocks; the dropout after the position embeddings and the final norm
        follow it too.
      num_class_tokens: number of class and distillation tokens, which come first.
      num_registers: number of learned tokens inserted behind these, without a position.
      learned_positions: whether position embeddings are added.
      positions_init_std: standard deviation of their initial values.
      grids: of `AddPositionEmbs`.
      posemb_resize: how position embeddings are resized.
      posemb_keep_aspect: `keep_aspect` of `AddPositionEmbs`.
      factorized: of `AddPositionEmbs`.
      pre_norm: whether a norm (`pre_norm`) comes before the first block.
      final_norm: whether the output is normalised.
      untied_norm: whether class tokens and registers have their own final norm (`prefix_norm`).
      scan: whether one block, compiled once, runs over parameters stacked along a leading axis
        (`encoderblock`), in place of blocks with parameters of their own (`encoderblock_3`).

    Call: `[batch, class tokens + patches, hidden]`, the rotation of each of the tokens after
    insertion of the registers or None, and the indices of the patches to encode, int32
    `[batch, kept]`, or None for all; to `[batch, class tokens + registers + kept, hidden]`. Images
    of any size have a `layout` of their patches; in rows with padding, `segments` are the images of
    all tokens, registers included, and all patches are encoded. `relative` is as in the blocks.
    """

    config: BlockConfig
    num_layers: int
    num_class_tokens: int
    num_registers: int = 0
    learned_positions: bool = True
    positions_init_std: float = 0.02
    grids: tuple[tuple[int, int], tuple[int, int]] | None = None
    posemb_resize: Method | None = None
    posemb_keep_aspect: bool = False
    factorized: bool = False
    pre_norm: bool = False
    patch_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    stochastic_depth_schedule: DepthSchedule = "linear"
    final_norm: bool = True
    untied_norm: bool = False
    scan: bool = False
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rope: Rotation | Coordinates | None,
        patches: jax.Array | None = None,
        layout: Layout | None = None,
        segments: Segments | None = None,
        relative: Relative | None = None,
        *,
        train: bool,
    ) -> jax.Array:
        config = self.config
        if self.learned_positions:
            x = AddPositionEmbs(
                dtype=config.dtype,
                init_std=self.positions_init_std,
                grids=self.grids,
                num_prefix_tokens=self.num_class_tokens,
                method=self.posemb_resize,
                keep_aspect=self.posemb_keep_aspect,
                factorized=self.factorized,
                name="posembed_input",
            )(x, layout)
        x = nn.Dropout(config.dropout_rate, deterministic=not train)(x)
        x = self._insert_registers(x)
        prefix = self.num_class_tokens + self.num_registers
        kept = None
        if patches is not None:
            x, kept = take_patches(x, patches, prefix)
        elif segments is None:
            x, kept = PatchDropout(self.patch_dropout_rate)(x, prefix, train=train)
        if rope is not None and kept is not None:
            rope = jax.tree.map(lambda table: table[kept], rope)
        if relative is not None and kept is not None:
            relative = relative.take(kept)
        if self.pre_norm:
            x = make_norm(config, "pre_norm")(x)
        x = config.constrain(x, ("batch", "tokens", None))
        length = x.shape[1]
        pads = config.attention == "fused" and takes_kernel(self, config, x.shape[-1])
        if pads and not (train and config.dropout_rate):
            # Once for all blocks, since a kernel that pads takes as long as a norm. Each attention
            # layer does if there is dropout, which would drop other values of padded tokens.
            x = pad_tokens(x, 1)
            rope = jax.tree.map(lambda table: pad_tokens(table, -2), rope)
        x = self._run_blocks(x, rope, length, segments, relative, train=train)[:, :length]
        if not self.final_norm:
            return x
        if self.untied_norm:
            first, x = jnp.split(x, [prefix], axis=1)
            first = make_norm(config, "prefix_norm")(first)
            return jnp.concatenate([first, make_norm(config, "encoder_norm")(x)], axis=1)
        return make_norm(config, "encoder_norm")(x)

    def _insert_registers(self, x: jax.Array) -> jax.Array:
        if not self.num_registers:
            return x
        shape = (1, self.num_registers, x.shape[-1])
        registers = self.param("registers", nn.initializers.normal(stddev=0.02), shape)
        registers = jnp.broadcast_to(registers.astype(x.dtype), (x.shape[0], *shape[1:]))
        first, patches = jnp.split(x, [self.num_class_tokens], axis=1)
        return jnp.concatenate([first, registers, patches], axis=1)

    def _run_blocks(
        self,
        x: jax.Array,
        rope: Rotation | Coordinates | None,
        length: int,
        segments: Segments | None,
        relative: Relative | None,
        *,
        train: bool,
    ) -> jax.Array:
        policy = parse_remat(self.remat)

        def run(block: nn.Module, x: jax.Array, rate: jax.Array | float) -> jax.Array:
            # As an argument of `call` a rate of 0.0 would be traced, and its dropout not skipped.
            def call(block: nn.Module, x: jax.Array) -> jax.Array:
                return block(x, rate, rope, length, segments, relative, train=train)

            if policy is not None:
                # Without scan XLA would merge the recomputation with the forward pass.
                call = nn.remat(call, policy=policy, prevent_cse=not self.scan)
            return call(block, x)

        last = max(self.num_layers - 1, 1)
        rates = [self.stochastic_depth_rate * i / last for i in range(self.num_layers)]
        if self.stochastic_depth_schedule == "uniform":
            rates = [self.stochastic_depth_rate] * self.num_layers
        if not self.scan:
            for i, rate in enumerate(rates):
                x = run(Encoder1DBlock(self.config, name=f"encoderblock_{i}"), x, rate)
            return x

        def step(block: nn.Module, x: jax.Array, rate: jax.Array) -> tuple[jax.Array, None]:
            return run(block, x, rate if self.stochastic_depth_rate else 0.0), None

        scan = nn.scan(
            step,
            variable_axes={"params": 0, "intermediates": 0, BLOCK_OUTPUTS: 0},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers,
        )
        block = Encoder1DBlock(self.config, name="encoderblock")
        return scan(block, x, jnp.asarray(rates, jnp.float32))[0]
