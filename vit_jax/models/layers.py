# SPDX-License-Identifier: Apache-2.0
"""Layers of the Vision Transformer encoder.

Class names are those of the published ViT checkpoints, because Flax derives parameter paths from
them. Numerics follow the published weights: pre-norm, LayerNorm epsilon 1e-6, tanh GELU.
Parameters, norm statistics and the softmax are float32; everything else runs in `dtype`. With
`float8` the products of dense layers take what float8 holds of their operands.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from vit_jax.models.float8 import BACKWARD, FORWARD, Scaled, quantize
from vit_jax.models.positions import Rotation, rotate
from vit_jax.utils.errors import UserError, suggest

# Places an activation on the mesh, given one logical name for each of its dimensions.
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

Activation = Literal["gelu_tanh", "gelu_erf", "swiglu"]
DepthSchedule = Literal["linear", "uniform"]
# See `parse_remat`.
Remat = Literal["none", "dots", "full"] | str

# What of a block's forward pass is kept for the backward pass, rather than computed again. "dots"
# keeps the results of the dense layers and recomputes attention weights, norms and activations.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
# Activations that `save:` and `offload:` can name: queries, keys and values; the output of an
# attention layer; the hidden state of an MLP, before its activation.
REMAT_NAMES = ("qkv", "attn_out", "mlp_hidden")


# Name of the intermediate (`flax.linen.Module.sow`) that holds the weights of an attention layer.
ATTENTION_WEIGHTS = "attention_weights"


def parse_remat(remat: str) -> Callable[..., Any] | None:
    """The checkpoint policy of a `remat`; None for no recomputation.

    Args:
      remat: `none`, `dots`, `full`, or which activations are not computed again, such as
        `save:attn_out,mlp_hidden`, `offload:mlp_hidden` (to the host's memory, and back) or both:
        `save:attn_out;offload:mlp_hidden`.

    Raises:
      UserError: it is none of these.
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
                f"model.remat={remat!r}: expected none, dots, full, or such as "
                "save:attn_out,mlp_hidden or offload:mlp_hidden"
            )
        for name in names.split(","):
            if name not in REMAT_NAMES:
                raise UserError(f"model.remat={remat!r}: {name!r}{suggest(name, REMAT_NAMES)}")
            chosen[kind].append(name)
    if not chosen["offload"]:
        return jax.checkpoint_policies.save_only_these_names(*chosen["save"])
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=chosen["save"],
        names_which_can_be_offloaded=chosen["offload"],
        offload_src="device",
        offload_dst="pinned_host",
    )


def unconstrained(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """The `Constrain` of a model that runs on one device: does nothing."""
    del names
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x: jax.Array, kernel: jax.Array, depth: int) -> jax.Array:
    """The product over the last `depth` dimensions of `x` and the first ones of `kernel`."""
    return jnp.tensordot(x, kernel, depth)


def _multiply_fwd(
    x: jax.Array, kernel: jax.Array, depth: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.tensordot(x, kernel, depth), (x, kernel)


def _multiply_bwd(
    depth: int, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows = x.ndim - depth

    def kernel_grad(x: jax.Array, grad: jax.Array) -> jax.Array:
        return jnp.tensordot(x, grad, ([*range(rows)], [*range(rows)]))

    def kernel_grad_of_matrices(x: jax.Array, grad: jax.Array) -> jax.Array:
        # XLA transposes operands that are contracted over several dimensions on a CPU, and computes
        # what they are made of once more in that order, which takes longer than the product.
        num_rows = math.prod(x.shape[:rows])
        product = x.reshape(num_rows, -1).T @ grad.reshape(num_rows, -1)
        return product.reshape(kernel.shape)

    inputs = jnp.tensordot(grad, kernel, ([*range(rows, grad.ndim)], [*range(depth, kernel.ndim)]))
    return inputs, jax.lax.platform_dependent(
        x, grad, cpu=kernel_grad_of_matrices, default=kernel_grad
    )


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply_float8(x: jax.Array, kernel: jax.Array, depth: int) -> jax.Array:
    """`_multiply` of what float8 holds of both; its gradient takes the incoming one in float8."""
    return _multiply_float8_fwd(x, kernel, depth)[0]


def _multiply_float8_fwd(
    x: jax.Array, kernel: jax.Array, depth: int
) -> tuple[jax.Array, tuple[Scaled, Scaled]]:
    saved = quantize(x, FORWARD), quantize(kernel, FORWARD)
    return jnp.tensordot(saved[0].restore(), saved[1].restore(), depth), saved


def _multiply_float8_bwd(
    depth: int, saved: tuple[Scaled, Scaled], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    grad = quantize(grad, BACKWARD).restore()
    return _multiply_bwd(depth, (x.restore(), kernel.restore()), grad)


_multiply_float8.defvjp(_multiply_float8_fwd, _multiply_float8_bwd)


def dot_tokens(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None, **kwargs: Any
) -> jax.Array:
    """The `dot_general` of the dense layers that work on tokens, with a faster gradient on CPUs."""
    del precision, kwargs
    (contracted, _), _ = dimension_numbers
    return _multiply(x, kernel, len(contracted))


def dot_tokens_float8(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None, **kwargs: Any
) -> jax.Array:
    """`dot_tokens` of operands in float8, for dense layers of a model with `float8`."""
    del precision, kwargs
    (contracted, _), _ = dimension_numbers
    return _multiply_float8(x, kernel, len(contracted))


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


class PatchDropout(nn.Module):
    """Keeps a random share of the patches of each image, while training.

    Call: `[batch, prefix + patches, hidden]` and the number of prefix tokens, which all stay, to
    the tokens kept and their indices `[batch, prefix + kept]`, None where all are kept.
    Source: arXiv:2212.00794.
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
    """Leaves out tokens: all but the first `prefix` and those of `patches`.

    Args:
      x: `[batch, prefix + patches, hidden]`.
      patches: which to keep, `[batch, kept]`, counted from the first patch.
      prefix: number of tokens in front of the patches.

    Returns:
      `[batch, prefix + kept, hidden]`, and the indices of the tokens `[batch, prefix + kept]`.
    """
    first = jnp.broadcast_to(jnp.arange(prefix), (x.shape[0], prefix))
    indices = jnp.concatenate([first, patches + prefix], axis=1)
    return jnp.take_along_axis(x, indices[..., None], axis=1), indices


class StochasticDepth(nn.Module):
    """Drops a residual branch for whole samples, and scales it up for the others.

    Call: the branch `[batch, length, hidden]` and the rate. Source: arXiv:1603.09382.
    """

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | float, *, train: bool) -> jax.Array:
        if not train or (isinstance(rate, float) and not rate):
            return x
        keep = jnp.asarray(1.0 - rate, jnp.float32)
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0], 1, 1))
        return jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


class LayerScale(nn.Module):
    """Scales each channel of a residual branch. Source: arXiv:2103.17239, section 2.1."""

    initial: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(self.initial)
        return x * self.param("scale", init, (x.shape[-1],)).astype(self.dtype)


class MlpBlock(nn.Module):
    """Dense, activation, dropout, Dense, dropout; hidden width `mlp_dim`.

    With the activation "swiglu" the hidden state is Dense(x) * silu(gate(x)) (arXiv:2002.05202).
    """

    mlp_dim: int
    dropout_rate: float = 0.0
    activation: Activation = "gelu_tanh"
    kernel_init: Callable[..., Any] = nn.initializers.xavier_uniform()
    bias_init: Callable[..., Any] = nn.initializers.normal(stddev=1e-6)
    dtype: DTypeLike = jnp.float32
    float8: bool = False
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def dense(features: int, name: str | None = None) -> nn.Dense:
            return nn.Dense(
                features,
                dtype=self.dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                dot_general=dot_tokens_float8 if self.float8 else dot_tokens,
                name=name,
            )

        width = x.shape[-1]
        # Before the activation, whose gradient needs it: one layer less is computed again.
        hidden = checkpoint_name(dense(self.mlp_dim)(x), "mlp_hidden")
        if self.activation == "swiglu":
            hidden = hidden * nn.silu(dense(self.mlp_dim, "gate")(x))
        else:
            hidden = nn.gelu(hidden, approximate=self.activation == "gelu_tanh")
        hidden = self.constrain(hidden, ("batch", None, "mlp"))
        hidden = nn.Dropout(self.dropout_rate, deterministic=not train)(hidden)
        x = dense(width)(hidden)
        return nn.Dropout(self.dropout_rate, deterministic=not train)(x)


class MultiHeadDotProductAttention(nn.Module):
    """Attention with `num_heads` heads, biases on all four projections.

    Call: queries come from `x` `[batch, length, hidden]`, keys and values from `context`, or from
    `x` too; gives the shape of `x`. The softmax is taken in float32 whatever `dtype` is; its
    weights `[batch, heads, queries, keys]` are an intermediate, `ATTENTION_WEIGHTS`.
    Sources: arXiv:1706.03762, section 3.2; `qk_norm`: arXiv:2302.05442; `rope`: see `positions`.
    """

    num_heads: int
    dropout_rate: float = 0.0
    qk_norm: bool = False
    norm_epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32
    float8: bool = False
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        rope: Rotation | None = None,
        train: bool,
    ) -> jax.Array:
        width = x.shape[-1]
        head_dim = width // self.num_heads

        def project(x: jax.Array, name: str) -> jax.Array:
            dense = nn.DenseGeneral(
                (self.num_heads, head_dim),
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                dot_general=dot_tokens_float8 if self.float8 else dot_tokens,
                name=name,
            )
            x = checkpoint_name(dense(x), "qkv")
            return self.constrain(x, ("batch", None, "heads", None))

        context = x if context is None else context
        query, key = project(x, "query"), project(context, "key")
        value = project(context, "value")
        if self.qk_norm:
            query = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name="query_norm")(query)
            key = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name="key_norm")(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query / jnp.sqrt(head_dim).astype(self.dtype), key)
        weights = jax.nn.softmax(scores.astype(jnp.float32))
        # Nothing is kept, or computed, unless `apply` is asked for intermediates.
        self.sow("intermediates", ATTENTION_WEIGHTS, weights)
        weights = nn.Dropout(self.dropout_rate, deterministic=not train)(weights.astype(self.dtype))
        x = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        x = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            dot_general=dot_tokens_float8 if self.float8 else dot_tokens,
            name="out",
        )(x)
        return checkpoint_name(x, "attn_out")


class Encoder1DBlock(nn.Module):
    """One pre-norm transformer block: attention and MLP, each with a residual connection.

    Call: `[batch, length, hidden]`, the rate of stochastic depth in this block, and the rotation of
    queries and keys, to the same shape.
    """

    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    activation: Activation = "gelu_tanh"
    qk_norm: bool = False
    layer_scale_init: float | None = None
    norm_epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32
    float8: bool = False
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        stochastic_depth_rate: jax.Array | float,
        rope: Rotation | None,
        *,
        train: bool,
    ) -> jax.Array:
        def residual(x: jax.Array) -> jax.Array:
            if self.layer_scale_init is not None:
                x = LayerScale(self.layer_scale_init, dtype=self.dtype)(x)
            return StochasticDepth()(x, stochastic_depth_rate, train=train)

        x = nn.LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype)(inputs)
        x = MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dropout_rate=self.attention_dropout_rate,
            qk_norm=self.qk_norm,
            norm_epsilon=self.norm_epsilon,
            dtype=self.dtype,
            float8=self.float8,
            constrain=self.constrain,
        )(x, rope=rope, train=train)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = self.constrain(inputs + residual(x), ("batch", "tokens", None))

        y = nn.LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype)(x)
        y = MlpBlock(
            mlp_dim=self.mlp_dim,
            dropout_rate=self.dropout_rate,
            activation=self.activation,
            dtype=self.dtype,
            float8=self.float8,
            constrain=self.constrain,
        )(y, train=train)
        return self.constrain(x + residual(y), ("batch", "tokens", None))


class Encoder(nn.Module):
    """Learned position embeddings, register tokens, `num_layers` blocks and a final norm.

    Attributes:
      block: makes a block, given its name.
      num_layers: number of blocks.
      num_class_tokens: class and distillation tokens, the first ones.
      num_registers: learned tokens put behind these, without a position.
      learned_positions: whether position embeddings are added.
      dropout_rate: after the position embeddings.
      patch_dropout_rate: share of patches left out in training.
      stochastic_depth_rate: of the last block, or of all.
      stochastic_depth_schedule: whether the rates of the blocks rise to it from 0 (`linear`), or
        are all the same (`uniform`).
      final_norm: whether the output is normalised.
      norm_epsilon: of the final norm.
      scan: one block, compiled once, runs over parameters stacked along a leading axis
        (`encoderblock`), in place of blocks with parameters of their own (`encoderblock_3`).
      remat: what is recomputed in the backward pass, see `parse_remat`.
      dtype: of the computation.
      constrain: places activations on a mesh.

    Call: `[batch, class tokens + patches, hidden]`, the rotation of each of the tokens after
    insertion of the registers, and the patches to encode, `[batch, kept]`, None for all; to
    `[batch, class tokens + registers + patches, hidden]`.
    """

    block: Callable[..., nn.Module]
    num_layers: int
    num_class_tokens: int
    num_registers: int = 0
    learned_positions: bool = True
    dropout_rate: float = 0.0
    patch_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    stochastic_depth_schedule: DepthSchedule = "linear"
    final_norm: bool = True
    norm_epsilon: float = 1e-6
    scan: bool = False
    remat: Remat = "none"
    dtype: DTypeLike = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rope: Rotation | None,
        patches: jax.Array | None = None,
        *,
        train: bool,
    ) -> jax.Array:
        if self.learned_positions:
            x = AddPositionEmbs(dtype=self.dtype, name="posembed_input")(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = self._insert_registers(x)
        prefix = self.num_class_tokens + self.num_registers
        if patches is None:
            x, kept = PatchDropout(self.patch_dropout_rate)(x, prefix, train=train)
        else:
            x, kept = take_patches(x, patches, prefix)
        if rope is not None and kept is not None:
            rope = jax.tree.map(lambda table: table[kept], rope)
        x = self.constrain(x, ("batch", "tokens", None))
        x = self._run_blocks(x, rope, train=train)
        if not self.final_norm:
            return x
        return nn.LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name="encoder_norm")(x)

    def _insert_registers(self, x: jax.Array) -> jax.Array:
        if not self.num_registers:
            return x
        shape = (1, self.num_registers, x.shape[-1])
        registers = self.param("registers", nn.initializers.normal(stddev=0.02), shape)
        registers = jnp.broadcast_to(registers.astype(x.dtype), (x.shape[0], *shape[1:]))
        first, patches = jnp.split(x, [self.num_class_tokens], axis=1)
        return jnp.concatenate([first, registers, patches], axis=1)

    def _run_blocks(self, x: jax.Array, rope: Rotation | None, *, train: bool) -> jax.Array:
        policy = parse_remat(self.remat)

        def run(block: nn.Module, x: jax.Array, rate: jax.Array | float) -> jax.Array:
            # The rate is no argument of what is recomputed: a rate of 0.0 would be traced like any
            # other, and no longer known to drop nothing.
            def call(block: nn.Module, x: jax.Array) -> jax.Array:
                return block(x, rate, rope, train=train)

            if policy is not None:
                # Under scan XLA has nothing to merge; elsewhere it would undo the recomputation.
                call = nn.remat(call, policy=policy, prevent_cse=not self.scan)
            return call(block, x)

        last = max(self.num_layers - 1, 1)
        rates = [self.stochastic_depth_rate * i / last for i in range(self.num_layers)]
        if self.stochastic_depth_schedule == "uniform":
            rates = [self.stochastic_depth_rate] * self.num_layers
        if not self.scan:
            for i, rate in enumerate(rates):
                x = run(self.block(name=f"encoderblock_{i}"), x, rate)
            return x

        def step(block: nn.Module, x: jax.Array, rate: jax.Array) -> tuple[jax.Array, None]:
            return run(block, x, rate if self.stochastic_depth_rate else 0.0), None

        scan = nn.scan(
            step,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers,
        )
        return scan(self.block(name="encoderblock"), x, jnp.asarray(rates, jnp.float32))[0]
