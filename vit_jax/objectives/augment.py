# SPDX-License-Identifier: Apache-2.0
"""Augmentation of images on the device, with random choices for each example.

These are pure functions of a key and a batch, so that a step's images are the same on any mesh.
Colours are changed before pixels are normalised, in float32 from 0 to 255; erasing comes after.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from vit_jax.objectives.base import check_share
from vit_jax.utils.errors import UserError

# ITU-R 601.
_LUMA = (0.299, 0.587, 0.114)
# Half the width in pixels of the kernel of a blur: four deviations of at most 2.
_REACH = 8
_ERASE_TRIES = 10
# Folded into a step's key, one for each augmentation; mixing takes the key itself.
_FLIP_KEY, _THREE_AUGMENT_KEY, _JITTER_KEY, ERASE_KEY = range(4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The augmentation of a batch on the device; all of it is off by default.

    Attributes:
      flip: share of images that are mirrored left and right.
      color_jitter: strength of the changes of brightness, contrast and saturation; one number, or
        one for each.
      three_augment: whether each image becomes gray, solarized or blurred (arXiv:2204.07118).
      random_erasing: share of images of which a rectangle is erased (arXiv:1708.04896).
      random_erasing_mode: "pixel" for noise of mean 0 and deviation 1, "const" for 0.
      mixup: alpha of the Beta distribution of weights (arXiv:1710.09412).
      cutmix: alpha of the Beta distribution of the areas that are kept (arXiv:1905.04899).
      mixup_switch_prob: share of steps that use cutmix, where both are on.

    Raises:
      UserError: a value out of its range.
    """

    flip: float = 0.0
    color_jitter: float | tuple[float, float, float] = 0.0
    three_augment: bool = False
    random_erasing: float = 0.0
    random_erasing_mode: Literal["pixel", "const"] = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_switch_prob: float = 0.5

    def __post_init__(self) -> None:
        shares = ("flip", "random_erasing", "mixup_switch_prob")
        check_share(**{name: getattr(self, name) for name in shares})
        for name, example in (("mixup", 0.2), ("cutmix", 1.0)):
            if getattr(self, name) < 0:
                raise UserError(
                    f"objective.{name}={getattr(self, name)}: expected 0 (none) or the Beta's "
                    f"alpha, such as {example}"
                )
        if min(self.jitter_strengths) < 0:
            raise UserError(
                f"objective.color_jitter={self.color_jitter}: expected 0 (none) or more, such as "
                "0.3"
            )
        # Config files have lists, and the objective must be hashable.
        if not isinstance(self.color_jitter, float | int):
            object.__setattr__(self, "color_jitter", self.jitter_strengths)

    @property
    def jitter_strengths(self) -> tuple[float, float, float]:
        """Strengths for brightness, contrast and saturation."""
        given = self.color_jitter
        one, two, three = (given,) * 3 if isinstance(given, float | int) else given
        return one, two, three


def distort(rng: jax.Array, images: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Applies the augmentations that come before pixels are normalised, with the key of a step.

    Takes images uint8 `[batch, height, width, 3]`, and returns images of the same shape, float32
    from 0 to 255 if colours are augmented, else uint8.
    """
    images = flip_lr(rng, images, probability=augmentation.flip)
    if augmentation.three_augment:
        three_rng = jax.random.fold_in(rng, _THREE_AUGMENT_KEY)
        images = three_augment(three_rng, images.astype(jnp.float32))
    if any(strengths := augmentation.jitter_strengths):
        jitter_rng = jax.random.fold_in(rng, _JITTER_KEY)
        images = jitter_colors(jitter_rng, images.astype(jnp.float32), strengths=strengths)
    return images


def flip_lr(rng: jax.Array, images: jax.Array, *, probability: float) -> jax.Array:
    """Mirrors a share of images `[batch, height, width, channels]` of any dtype left and right."""
    if not probability:
        return images
    rng = jax.random.fold_in(rng, _FLIP_KEY)
    flip = jax.random.bernoulli(rng, probability, images.shape[:1])
    return jnp.where(_per_image(flip), images[:, :, ::-1], images)


def jitter_colors(
    rng: jax.Array, images: jax.Array, *, strengths: tuple[float, float, float]
) -> jax.Array:
    """Changes brightness, contrast and saturation, in a random order for each image.

    Images are float32 `[batch, height, width, 3]` from 0 to 255, as is the result. The factor of
    each is drawn from 1 - strength (at least 0) to 1 + strength.
    """
    factor_rng, order_rng = jax.random.split(rng)
    shape = (images.shape[0], 3)
    high = 1 + jnp.array(strengths)
    low = jnp.maximum(0, 2 - high)
    factors = jax.random.uniform(factor_rng, shape, minval=low, maxval=high)
    order = jnp.argsort(jax.random.uniform(order_rng, shape))
    factors = jnp.take_along_axis(factors, order, axis=1)
    for i in range(3):
        which, gray = _per_image(order[:, i]), _to_gray(images)
        mean = jnp.mean(gray, axis=(1, 2, 3), keepdims=True)
        start = jnp.where(which == 0, 0, jnp.where(which == 1, mean, gray))
        images = jnp.clip(start + _per_image(factors[:, i]) * (images - start), 0, 255)
    return images


def three_augment(rng: jax.Array, images: jax.Array) -> jax.Array:
    """Makes each image gray, solarized or blurred with a deviation of 0.1 to 2 pixels.

    Images are float32 `[batch, height, width, 3]` from 0 to 255, as is the result.
    """
    which_rng, sigma_rng = jax.random.split(rng)
    which = _per_image(jax.random.randint(which_rng, images.shape[:1], 0, 3))
    sigma = jax.random.uniform(sigma_rng, images.shape[:1], minval=0.1, maxval=2.0)
    solarized = jnp.where(images < 128, images, 255 - images)
    blurred = blur(images, sigma)
    return jnp.where(which == 0, _to_gray(images), jnp.where(which == 1, solarized, blurred))


def blur(images: jax.Array, sigma: jax.Array) -> jax.Array:
    """Gaussian blur; pixels at the border are repeated beyond it.

    Images are float32 `[batch, height, width, channels]`, as is the result. `sigma` is the
    deviation for each image in pixels, float32 `[batch]`, up to 2.
    """
    offsets = jnp.arange(-_REACH, _REACH + 1)
    weights = jnp.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (_REACH, _REACH)
        padded = jnp.pad(images, pad, mode="edge")
        # Sums of shifted images, as a convolution can't have a kernel for each image.
        images = sum(
            _per_image(weights[:, i])
            * jax.lax.slice_in_dim(padded, i, i + images.shape[axis], axis=axis)
            for i in range(2 * _REACH + 1)
        )  # pyright: ignore[reportAssignmentType]
    return images


def erase(
    rng: jax.Array, images: jax.Array, *, probability: float, mode: Literal["pixel", "const"]
) -> jax.Array:
    """Fills a rectangle of 2 % to a third of the area, of aspect 0.3 to 3.3, in some images.

    Args:
      rng: key.
      images: float32 `[batch, height, width, channels]`, normalised, as is the result.
      probability: share of images that are erased; ten draws are made for a rectangle that fits.
      mode: "pixel" fills with noise of mean 0 and deviation 1, "const" with 0.

    Source: arXiv:1708.04896, algorithm 1.
    """
    batch, height, width = images.shape[:3]
    area_rng, aspect_rng, place_rng, choice_rng, fill_rng = jax.random.split(rng, 5)
    tries = (batch, _ERASE_TRIES)
    area = height * width * jax.random.uniform(area_rng, tries, minval=0.02, maxval=1 / 3)
    limit = (math.log(0.3), math.log(3.3))
    aspect = jnp.exp(jax.random.uniform(aspect_rng, tries, minval=limit[0], maxval=limit[1]))
    h, w = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    h, w = (jnp.take_along_axis(x, first, axis=1) for x in (h, w))
    chosen = jax.random.bernoulli(choice_rng, probability, (batch,)) & fits.any(axis=1)
    place = jax.random.uniform(place_rng, (batch, 2))
    top = jnp.floor(place[:, :1] * (height - h + 1))
    left = jnp.floor(place[:, 1:] * (width - w + 1))
    y, x = jnp.arange(height), jnp.arange(width)
    rows = (y >= top) & (y < top + h) & chosen[:, None]
    columns = (x >= left) & (x < left + w)
    erased = rows[:, :, None, None] & columns[:, None, :, None]
    fill = 0.0 if mode == "const" else jax.random.normal(fill_rng, images.shape, images.dtype)
    return jnp.where(erased, fill, images)


def _to_gray(images: jax.Array) -> jax.Array:
    red, green, blue = (weight * images[..., i] for i, weight in enumerate(_LUMA))
    return (red + green + blue)[..., None]


def _per_image(x: jax.Array) -> jax.Array:
    """`[batch]` to `[batch, 1, 1, 1]`."""
    return x[:, None, None, None]
