# SPDX-License-Identifier: Apache-2.0
"""LayerNorm at the start of a residual branch, with one kernel for its gradient on NVIDIA GPUs.

Source: arXiv:1607.06450. XLA computes the forward pass in one kernel if it is written as here, but
the gradient in several, because sums over rows and over columns never share one.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

# Values that a program holds at a time, in whole rows; and programs, some for each multiprocessor.
_TILE = 8192
_PROGRAMS = 512


class LayerNorm(nn.Module):
    """LayerNorm with the parameters of `flax.linen.LayerNorm`, which passes its input through.

    Call: `[rows, width]` to the same array, for the residual connection, and its norm, in the same
    shape and dtype. The gradient of both comes from one kernel.
    """

    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return _branch(x.astype(self.dtype), scale, bias, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _branch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    # The mean is subtracted before squaring: XLA has one kernel for that, and none for the
    # difference of two means.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon)
    return x, (normed * scale + bias).astype(x.dtype)


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> Any:
    return _branch(x, scale, bias, epsilon), (x, scale)


def _backward(epsilon: float, saved: Any, grads: Any) -> Any:
    x, scale = saved
    passed, normed = grads
    dx, sums = branch_gradients(x, scale, passed, normed, epsilon=epsilon)
    return dx, sums[0], sums[1]


_branch.defvjp(_forward, _backward)


def branch_gradients(
    x: jax.Array,
    scale: jax.Array,
    passed: jax.Array,
    normed: jax.Array,
    *,
    epsilon: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `LayerNorm`, whose rows may be sharded.

    Args:
      x: the input, `[rows, width]`, of any floating dtype.
      scale: float32 `[width]`.
      passed: gradient of the input that is passed through, as `x`.
      normed: gradient of the norm, as `x`.
      epsilon: is added to variances.
      interpret: computes the kernel by JAX, on any device.

    Returns:
      The gradient of the input, as `x`, and those of scale and bias, float32 `[2, width]`.
    """
    return _sharded_gradients(x, scale, passed, normed, epsilon, interpret)


def _gradients(
    x: jax.Array,
    scale: jax.Array,
    passed: jax.Array,
    normed: jax.Array,
    epsilon: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    rows, width = x.shape
    padded = pl.next_power_of_2(width)  # the only widths that Triton has
    at_once = max(1, _TILE // padded)
    share = pl.cdiv(rows, _PROGRAMS * at_once) * at_once
    programs = pl.cdiv(rows, share)
    tokens = pl.BlockSpec((rows, padded), lambda i: (0, 0))
    dx, sums = pl.pallas_call(
        functools.partial(
            _kernel, rows=rows, width=width, epsilon=epsilon, share=share, at_once=at_once
        ),
        grid=(programs,),
        in_specs=[tokens, pl.BlockSpec((padded,), lambda i: (0,)), tokens, tokens],
        out_specs=[tokens, pl.BlockSpec((None, 2, padded), lambda i: (i, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((programs, 2, width), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=8),
        cost_estimate=pl.CostEstimate(  # no matrix products
            flops=0, transcendentals=rows, bytes_accessed=4 * x.size * x.dtype.itemsize
        ),
        interpret=interpret,
    )(x, scale, passed, normed)
    return dx, jnp.sum(sums, axis=0)


def _kernel(
    x_ref: Any,
    scale_ref: Any,
    passed_ref: Any,
    normed_ref: Any,
    dx_ref: Any,
    sums_ref: Any,
    *,
    rows: int,
    width: int,
    epsilon: float,
    share: int,
    at_once: int,
) -> None:
    """The gradients of `share` rows, `at_once` at a time, and their sums over these rows."""
    columns = jnp.arange(sums_ref.shape[-1])
    in_row = columns < width
    scale = triton.load(scale_ref.at[:], mask=in_row, other=0.0).astype(jnp.float32)

    first = pl.program_id(0) * share

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=1, keepdims=True) / width

    def step(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = first + i * at_once
        mask = (start + jnp.arange(at_once) < rows)[:, None] & in_row[None]
        at = (pl.ds(start, at_once), slice(None))
        x, passed, grad = (
            triton.load(ref.at[at], mask=mask, other=0.0).astype(jnp.float32)
            for ref in (x_ref, passed_ref, normed_ref)
        )
        centred = jnp.where(mask, x - mean(x), 0.0)
        inverse = jax.lax.rsqrt(mean(jnp.square(centred)) + epsilon)
        normed = centred * inverse
        scaled = grad * scale[None]
        dx = passed + inverse * (scaled - mean(scaled) - normed * mean(scaled * normed))
        triton.store(dx_ref.at[at], dx.astype(dx_ref.dtype), mask=mask)
        return sums[0] + jnp.sum(grad * normed, axis=0), sums[1] + jnp.sum(grad, axis=0)

    zeros = jnp.zeros(columns.shape, jnp.float32)
    sums = jax.lax.fori_loop(0, share // at_once, step, (zeros, zeros))
    for i, total in enumerate(sums):
        triton.store(sums_ref.at[pl.ds(i, 1), :], total[None], mask=in_row[None])


def _partition(
    epsilon: float, interpret: bool, mesh: Any, arg_shapes: Any, result_shapes: Any
) -> tuple[Any, ...]:
    """Each device computes its rows; widths are not split."""
    del result_shapes
    spec = arg_shapes[0].sharding.spec
    axes = spec[0] if len(spec) else None
    tokens, whole = (NamedSharding(mesh, PartitionSpec(a)) for a in (axes, None))

    def compute(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
        dx, sums = _gradients(*args, epsilon=epsilon, interpret=interpret)
        return dx, sums if axes is None else jax.lax.psum(sums, axes)

    return mesh, compute, (tokens, whole), (tokens, whole, tokens, tokens)


_sharded_gradients = custom_partitioning(_gradients, static_argnums=(4, 5))
_sharded_gradients.def_partition(
    partition=_partition,
    sharding_rule="rows width, width, rows width, rows width -> rows width, two width",
    need_replication_factors=("width", "two"),
)
