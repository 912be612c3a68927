# SPDX-License-Identifier: Apache-2.0
"""Mixing of each example with its neighbour in the batch, on the device."""

import jax
import jax.numpy as jnp


def mix(
    rng: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    switch_prob: float,
) -> tuple[jax.Array, jax.Array]:
    """Applies mixup or cutmix; where both are on, cutmix in a share `switch_prob` of the steps.

    Args:
      rng: key of this step.
      images: float32 `[batch, height, width, channels]`, as in the result.
      targets: float32 `[batch, classes]`, as in the result.
      mixup_alpha: see `mixup`; 0 for none.
      cutmix_alpha: see `cutmix`; 0 for none.
      switch_prob: 0 to 1.
    """
    if not cutmix_alpha:
        return mixup(rng, images, targets, alpha=mixup_alpha) if mixup_alpha else (images, targets)
    if not mixup_alpha:
        return cutmix(rng, images, targets, alpha=cutmix_alpha)
    switch_rng, mixup_rng, cutmix_rng = jax.random.split(rng, 3)
    switch = jax.random.bernoulli(switch_rng, switch_prob)
    weight = _draw_weight(mixup_rng, mixup_alpha)
    stays = _draw_box(cutmix_rng, images.shape, cutmix_alpha)
    of_images, of_targets = (jnp.where(switch, x, weight) for x in (stays, stays.mean()))
    return _blend(images, targets, of_images, of_targets)


def mixup(
    rng: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Blends each example with its neighbour in the batch, one weight a batch.

    The weight is Beta(alpha, alpha), folded so that the own example weighs more. Images and targets
    are those of `mix`, of the same shapes. Source: arXiv:1710.09412.
    """
    weight = _draw_weight(rng, alpha)
    return _blend(images, targets, weight, weight)


def cutmix(
    rng: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Replaces a box of each image by that of its neighbour, one box a batch.

    The box has 1 - Beta(alpha, alpha) of the area and the image's aspect. It is cut off at the
    border, and targets are weighted by the area inside the image. Images and targets are those of
    `mix`. Source: arXiv:1905.04899.
    """
    stays = _draw_box(rng, images.shape, alpha)
    return _blend(images, targets, stays, stays.mean())


def _draw_weight(rng: jax.Array, alpha: float) -> jax.Array:
    weight = jax.random.beta(rng, alpha, alpha)
    return jnp.maximum(weight, 1 - weight)


def _draw_box(rng: jax.Array, shape: tuple[int, ...], alpha: float) -> jax.Array:
    """1 where the own image stays and 0 in the box, float32 `[height, width, 1]`."""
    weight_rng, y_rng, x_rng = jax.random.split(rng, 3)
    share = jnp.sqrt(1 - jax.random.beta(weight_rng, alpha, alpha))
    inside = []
    for key, side in ((y_rng, shape[1]), (x_rng, shape[2])):
        half = jnp.floor(jnp.floor(side * share) / 2)
        centre = jax.random.randint(key, (), 0, side)
        place = jnp.arange(side)
        inside.append((place >= centre - half) & (place < centre + half))
    rows, columns = inside
    return 1.0 - (rows[:, None] & columns)[..., None]


def _blend(
    images: jax.Array, targets: jax.Array, image_weight: jax.Array, target_weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def blend(x: jax.Array, weight: jax.Array) -> jax.Array:
        return weight * x + (1 - weight) * jnp.roll(x, 1, axis=0)

    return blend(images, image_weight), blend(targets, target_weight)
