# SPDX-License-Identifier: Apache-2.0
"""Tensors in float8, each with a scale that is computed from its current values.

No state is carried from step to step. Source of the two formats: arXiv:2209.05433.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

# The formats of activations and kernels, and of gradients, which span more orders of magnitude.
FORWARD = jnp.float8_e4m3fn
BACKWARD = jnp.float8_e5m2

# A scale and its inverse are then both normal numbers of float32 and bfloat16.
_MAX_EXPONENT = 126


@flax.struct.dataclass
class Scaled:
    """A tensor as float8 `values` of its shape, times a scalar `scale` of its dtype."""

    values: jax.Array
    scale: jax.Array

    def restore(self) -> jax.Array:
        """Returns the tensor, rounded to float8, in its own shape and dtype.

        XLA turns the product of two of these into one of float8 where the hardware has it.
        """
        return self.values.astype(self.scale.dtype) * self.scale


def quantize(x: jax.Array, dtype: type[jnp.generic]) -> Scaled:
    """Rounds a tensor to float8, scaled so that its largest magnitude nearly fills the format.

    The tensor is float32 or bfloat16, of any shape; `dtype` is `FORWARD` or `BACKWARD`. The scale
    is a power of two, so only the format itself rounds. Values that are not finite stay so.
    """
    _, largest = math.frexp(float(jnp.finfo(dtype).max))
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x)).astype(jnp.float32))
    # The result stays below the largest power of two in the format, so rounding up fits too.
    shift = jnp.clip(largest - 1 - exponent, -_MAX_EXPONENT, _MAX_EXPONENT)
    one = jnp.ones((), jnp.float32)
    up, down = jnp.ldexp(one, shift).astype(x.dtype), jnp.ldexp(one, -shift).astype(x.dtype)
    return Scaled((x * up).astype(dtype), down)
