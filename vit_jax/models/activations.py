# SPDX-License-Identifier: Apache-2.0
"""Activations of MLPs, with gradients of their own."""

import functools

import flax.linen as nn
import jax


def quick_gelu(x: jax.Array) -> jax.Array:
    """Returns x * sigmoid(1.702 x), of any shape and floating dtype, as in OpenAI's CLIP models.

    Source: arXiv:1606.08415, section 2; `QuickGELU` in openai/CLIP.
    """
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array, *, approximate: bool) -> jax.Array:
    """Returns GELU, exact or by its tanh approximation, of any shape and floating dtype.

    The gradient starts from `x` alone. Differentiation would also save the slope, which is as large
    as the hidden state of an MLP, and takes longer to write and read than to compute.
    Source: arXiv:1606.08415.
    """
    return _gelu(x, approximate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gelu(x: jax.Array, approximate: bool) -> jax.Array:
    return nn.gelu(x, approximate=approximate)


def _forward(x: jax.Array, approximate: bool) -> tuple[jax.Array, jax.Array]:
    return _gelu(x, approximate), x


def _backward(approximate: bool, x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    # Without the barrier XLA finds the forward pass in it, and saves the slope all the same. `grad`
    # is not behind it, so that on TPUs the product that makes it can be multiplied by the slope.
    x = jax.lax.optimization_barrier(x)
    _, pullback = jax.vjp(functools.partial(nn.gelu, approximate=approximate), x)
    return pullback(grad)


_gelu.defvjp(_forward, _backward)
