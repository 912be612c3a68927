# SPDX-License-Identifier: Apache-2.0
"""Tensors in eight bits, each with a scale of its own that is taken from its values now.

No state is carried from step to step. Source of the two formats: arXiv:2209.05433.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

# Of activations and kernels, and of gradients, which span more orders of magnitude.
FORWARD = jnp.float8_e4m3fn
BACKWARD = jnp.float8_e5m2

# Scales and what they undo are both normal numbers of float32 and bfloat16.
_MAX_EXPONENT = 126


@flax.struct.dataclass
class Scaled:
    """`values` in float8, times the scalar `scale`, whose dtype is that of the tensor."""

    values: jax.Array
    scale: jax.Array

    def restore(self) -> jax.Array:
        """The tensor, rounded to what float8 holds.

        A product of two of these is what XLA turns into one of float8 where the hardware has it.
        """
        return self.values.astype(self.scale.dtype) * self.scale


def quantize(x: jax.Array, dtype: type[jnp.generic]) -> Scaled:
    """Rounds a tensor to float8, its largest magnitude in the uppermost binades of the format.

    The scale is a power of two: with it nothing is rounded but by the format itself. What is not
    finite stays so.

    Args:
      x: of any shape, float32 or bfloat16.
      dtype: `FORWARD` or `BACKWARD`.
    """
    _, largest = math.frexp(float(jnp.finfo(dtype).max))
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x)).astype(jnp.float32))
    # Below the power of two that is the largest in the format: rounding up stays within it.
    shift = jnp.clip(largest - 1 - exponent, -_MAX_EXPONENT, _MAX_EXPONENT)
    one = jnp.ones((), jnp.float32)
    up, down = jnp.ldexp(one, shift).astype(x.dtype), jnp.ldexp(one, -shift).astype(x.dtype)
    return Scaled((x * up).astype(dtype), down)
