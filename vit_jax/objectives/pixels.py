# SPDX-License-Identifier: Apache-2.0
"""Converts uint8 pixels to the floats that a model expects, and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.objectives.base import Objective
from vit_jax.utils.errors import UserError

# One number for all channels, or one for each.
Pixels = float | tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageObjective(Objective):
    """An objective whose model takes normalised pixels.

    Attributes:
      pixel_mean: mean of pixels in [0, 1], which is subtracted; one number, or one per channel.
      pixel_std: divisor, applied after the mean; one number, or one per channel.
    """

    pixel_mean: Pixels = 0.5
    pixel_std: Pixels = 0.5

    def normalize(self, images: jax.Array) -> jax.Array:
        """Scales pixels to [-1, 1] by default, as the published weights expect; see `normalize`."""
        return normalize(images, self.pixel_mean, self.pixel_std)


def normalize(images: jax.Array, mean: Pixels, std: Pixels) -> jax.Array:
    """Subtracts `mean` from pixels in [0, 1] and divides by `std`.

    Images are `[..., channels]` of any dtype, from 0 to 255; the result is float32.
    """
    means, stds = (np.asarray(x, np.float32) for x in (mean, std))
    return images.astype(jnp.float32) / (255 * stds) - means / stds


def denormalize(images: jax.Array, mean: Pixels, std: Pixels) -> jax.Array:
    """The inverse of `normalize`: float `[..., channels]` to the same shape and dtype, 0 to 255."""
    means, stds = (np.asarray(x, np.float32) for x in (mean, std))
    return 255 * (images * stds + means)


def check_pixels(mean: Pixels, std: Pixels) -> tuple[Pixels, Pixels]:
    """Returns both so that they can be hashed.

    Raises `UserError` unless each is one finite number or three, and `std` is above 0.
    """
    for name, value in (("pixel_mean", mean), ("pixel_std", std)):
        numbers = [
            isinstance(x, float | int | np.number) for x in np.ravel(np.asarray(value, object))
        ]
        if len(numbers) not in (1, 3) or not all(numbers) or not np.all(np.isfinite(value)):
            raise UserError(f"objective.{name}={value}: expected a number, or one for each of RGB")
    if min(np.ravel(std)) <= 0:
        raise UserError(f"objective.pixel_std={std}: expected more than 0")
    mean, std = (x if isinstance(x, float | int) else tuple(x) for x in (mean, std))
    return mean, std
