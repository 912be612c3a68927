# SPDX-License-Identifier: Apache-2.0
"""From uint8 pixels to the floats that a model expects."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.utils.errors import UserError

# One number for all channels, or one for each.
Pixels = float | tuple[float, ...]


def normalize(images: jax.Array, mean: Pixels, std: Pixels) -> jax.Array:
    """0 to 255, of any type, to float32; `mean` and `std` are of pixels in [0, 1]."""
    means, stds = (np.asarray(x, np.float32) for x in (mean, std))
    return images.astype(jnp.float32) / (255 * stds) - means / stds


def denormalize(images: jax.Array, mean: Pixels, std: Pixels) -> jax.Array:
    """The inverse of `normalize`, as floats from 0 to 255."""
    means, stds = (np.asarray(x, np.float32) for x in (mean, std))
    return 255 * (images * stds + means)


def check_pixels(mean: Pixels, std: Pixels) -> tuple[Pixels, Pixels]:
    """Both as numbers or tuples, which can be hashed.

    Raises:
      UserError: a deviation of 0 or less.
    """
    if min(np.ravel(std)) <= 0:
        raise UserError(f"objective.pixel_std={std}: expected more than 0")
    return _hashable(mean), _hashable(std)


def _hashable(pixels: Pixels) -> Pixels:
    return pixels if isinstance(pixels, float | int) else tuple(pixels)
