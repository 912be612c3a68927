# SPDX-License-Identifier: Apache-2.0
"""Matrix products of dense layers on tokens, with gradients of their own."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.models.float8 import BACKWARD, FORWARD, Scaled, quantize

_Pair = tuple[jax.Array, jax.Array]


def dot_tokens(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **_: Any) -> jax.Array:
    """Multiplies tokens and a kernel; the gradient is faster on CPUs than that of `dot_general`.

    Takes `[..., *inputs]` of any floating dtype and `[*inputs, *outputs]` of the same, and returns
    `[..., *outputs]` of the same. Of `dimension_numbers`, as in `jax.lax.dot_general`, only the
    number of `inputs` is read; `precision` and the like are ignored.
    """
    return _multiply(x, kernel, len(dimension_numbers[0][0]))


def dot_tokens_float8(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **_: Any
) -> jax.Array:
    """`dot_tokens` of operands rounded to float8; so is the incoming gradient."""
    return _multiply_float8(x, kernel, len(dimension_numbers[0][0]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x: jax.Array, kernel: jax.Array, depth: int) -> jax.Array:
    """Contracts the last `depth` dimensions of `x` with the first ones of `kernel`."""
    return _multiply_fwd(x, kernel, depth)[0]


def _as_vectors(x: jax.Array, kernel: jax.Array, depth: int) -> tuple[Any, jax.Array, jax.Array]:
    """The dimensions of the tokens, the tokens `[..., inputs]` and the kernel as a matrix.

    With a dimension of heads, XLA chooses layouts for TPUs that are copied before attention.
    """
    lead, inputs = x.shape[: x.ndim - depth], math.prod(kernel.shape[:depth])
    return lead, x.reshape(*lead, inputs), kernel.reshape(inputs, -1)


def _multiply_fwd(x: jax.Array, kernel: jax.Array, depth: int) -> tuple[jax.Array, _Pair]:
    # Not by `_multiply`, within which policies of recomputation would not see the product.
    lead, rows, matrix = _as_vectors(x, kernel, depth)
    return jnp.tensordot(rows, matrix, 1).reshape(*lead, *kernel.shape[depth:]), (x, kernel)


def _multiply_bwd(depth: int, saved: _Pair, grad: jax.Array) -> _Pair:
    lead, x, kernel = _as_vectors(*saved, depth)
    grad = grad.reshape(*lead, -1)

    def kernel_grad(x: jax.Array, grad: jax.Array) -> jax.Array:
        rows = tuple(range(len(lead)))
        return jnp.tensordot(x, grad, (rows, rows))

    def kernel_grad_of_matrices(x: jax.Array, grad: jax.Array) -> jax.Array:
        # On a CPU, XLA transposes operands that are contracted over several dimensions, and
        # recomputes what produces them in that order, which takes longer than the product.
        num_rows = math.prod(lead)
        return x.reshape(num_rows, -1).T @ grad.reshape(num_rows, -1)

    by_kernel = jax.lax.platform_dependent(
        x, grad, cpu=kernel_grad_of_matrices, default=kernel_grad
    )
    inputs, weights = saved
    by_input = jnp.tensordot(grad, kernel, (grad.ndim - 1, 1))
    return by_input.reshape(inputs.shape), by_kernel.reshape(weights.shape)


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dot_stored(x: jax.Array, kernel: jax.Array, scale: jax.Array | None, depth: int) -> jax.Array:
    """Multiplies tokens and a constant kernel that is stored in a smaller dtype.

    The backward pass keeps the kernel as it is stored, and the kernel has no gradient.

    Args:
      x: float `[..., *inputs]`.
      kernel: bfloat16 or int8 `[*inputs, *outputs]`.
      scale: float32 `[1, ..., *outputs]` with as many dimensions, a factor of the values of the
        kernel; None for none.
      depth: number of `inputs`.

    Returns:
      `[..., *outputs]` of the dtype of `x`. Products are summed in float32 before they are scaled.
    """
    if scale is None:
        return jnp.tensordot(x, kernel.astype(x.dtype), depth)
    # All values of int8 are exact in the dtypes of `x`.
    y = jnp.tensordot(x, kernel.astype(x.dtype), depth, preferred_element_type=jnp.float32)
    return (y * scale.reshape(scale.shape[depth:])).astype(x.dtype)


def _dot_stored_fwd(
    x: jax.Array, kernel: jax.Array, scale: jax.Array | None, depth: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    return dot_stored(x, kernel, scale, depth), (kernel, scale)


def _dot_stored_bwd(
    depth: int, saved: tuple[jax.Array, jax.Array | None], grad: jax.Array
) -> tuple[jax.Array, None, None]:
    kernel, scale = saved
    axes = [*range(grad.ndim - (kernel.ndim - depth), grad.ndim)], [*range(depth, kernel.ndim)]
    dtype = grad.dtype
    if scale is not None:
        grad = (grad * scale.reshape(scale.shape[depth:])).astype(dtype)
    return jnp.tensordot(grad, kernel.astype(dtype), axes), None, None


dot_stored.defvjp(_dot_stored_fwd, _dot_stored_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply_float8(x: jax.Array, kernel: jax.Array, depth: int) -> jax.Array:
    return _multiply_float8_fwd(x, kernel, depth)[0]


def _multiply_float8_fwd(
    x: jax.Array, kernel: jax.Array, depth: int
) -> tuple[jax.Array, tuple[Scaled, Scaled]]:
    saved = quantize(x, FORWARD), quantize(kernel, FORWARD)
    return jnp.tensordot(saved[0].restore(), saved[1].restore(), depth), saved


def _multiply_float8_bwd(depth: int, saved: tuple[Scaled, Scaled], grad: jax.Array) -> _Pair:
    x, kernel = saved
    grad = quantize(grad, BACKWARD).restore()
    return _multiply_bwd(depth, (x.restore(), kernel.restore()), grad)


_multiply_float8.defvjp(_multiply_float8_fwd, _multiply_float8_bwd)


@jax.custom_vjp
def project_together(
    x: jax.Array, kernels: tuple[jax.Array, ...], biases: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Several dense layers of one input, for NVIDIA GPUs.

    Takes `[rows, inputs]` of any floating dtype, and for each layer a kernel `[inputs, outputs]`
    and a bias `[outputs]` of the same, all of one shape; returns `[rows, outputs]` for each. In the
    gradient of the input each product adds to the one before, and the gradients of all biases are
    one reduction.
    """
    return tuple(x @ kernel + bias for kernel, bias in zip(kernels, biases, strict=True))


def _project_fwd(x: jax.Array, kernels: Any, biases: Any) -> tuple[Any, Any]:
    return project_together(x, kernels, biases), (x, kernels)


def _project_bwd(saved: Any, grads: tuple[jax.Array, ...]) -> tuple[Any, Any, Any]:
    x, kernels = saved
    inputs = grads[0] @ kernels[0].T
    for grad, kernel in zip(grads[1:], kernels[1:], strict=True):
        inputs = grad @ kernel.T + inputs  # in this order, cuBLAS adds within the product
    biases = jnp.sum(jnp.stack(grads), axis=1)
    return inputs, tuple(x.T @ grad for grad in grads), tuple(biases)


project_together.defvjp(_project_fwd, _project_bwd)
