# SPDX-License-Identifier: Apache-2.0
"""Mixing of examples within a batch, on the device."""

import jax
import jax.numpy as jnp


def mixup(
    rng: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Blends each example with its neighbour in the batch, one weight a batch.

    Args:
      rng: key of this step.
      images: float `[batch, height, width, channels]`.
      targets: `[batch, classes]`.
      alpha: the weight is Beta(alpha, alpha), folded so that the own example weighs more.

    Source: arXiv:1710.09412.
    """
    weight = jax.random.beta(rng, alpha, alpha)
    weight = jnp.maximum(weight, 1 - weight)

    def blend(x: jax.Array) -> jax.Array:
        return weight * x + (1 - weight) * jnp.roll(x, 1, axis=0)

    return blend(images), blend(targets)
