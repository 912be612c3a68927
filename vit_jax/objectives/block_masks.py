# SPDX-License-Identifier: Apache-2.0
"""Masks of blocks of patches, drawn on the device, of a known total.

Sources: BEiT, arXiv:2106.08254, algorithm 1; shares of images as in iBOT and DINOv2. Where blocks
do not fill a mask up to its count, single patches do, as in DINOv3, so that counts are exact.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

# Blocks that are tried for an image.
_TRIES = 40
_LEAST_AREA = 4
_ASPECT = 0.3
# Images among which shares are stratified, at least. A group is a run of rows, so that on most
# meshes its rows are on one device.
_GROUP = 16


@dataclasses.dataclass(frozen=True)
class BlockMasks:
    """Draws masks for a batch of images.

    The rows of a batch form groups. In each group, `share` of the images have a mask, and their
    ratios are one from each of as many equal parts of `ratio`. So the number of masked patches of a
    group is bounded by `capacity`, and close to it.

    Attributes:
      grid: rows and columns of patches.
      ratio: least and greatest share of the patches of an image that are masked.
      share: share of the images that have a mask.
    """

    grid: tuple[int, int]
    ratio: tuple[float, float]
    share: float

    def group(self, images: int) -> int:
        """The number of images in a group, in a batch of `images`.

        It does not depend on the mesh, so that the masks don't either. It is 16, or the next larger
        divisor of `images`, since few images can't have any share of masks.
        """
        sizes = range(min(_GROUP, images), images + 1)
        return next(size for size in sizes if images % size == 0)

    def masked(self, group: int) -> int:
        """The number of images of a group that have a mask; at least 1."""
        # Rounded down in groups of 16, whose masks runs under way have.
        rounded = math.floor if group == _GROUP else round
        return max(1, rounded(group * self.share))

    def capacity(self, group: int) -> int:
        """The greatest number of masked patches in a group of images."""
        low, high = self.ratio
        count, patches = self.masked(group), math.prod(self.grid)
        ends = (low + (high - low) * (i + 1) / count for i in range(count))
        return sum(math.floor(patches * end + 1e-6) for end in ends)

    def draw(self, rng: jax.Array, images: int) -> jax.Array:
        """Draws the masks of a batch, bool `[images, patches]`."""
        count_rng, block_rng, fill_rng = jax.random.split(rng, 3)
        counts = self._draw_counts(count_rng, images)
        masks = self._draw_blocks(block_rng, counts)
        noise = jax.random.uniform(fill_rng, masks.shape)
        # Masked patches come first, then the others in a random order.
        order = jnp.argsort(jnp.where(masks, -1.0, noise), axis=1)
        rank = jnp.argsort(order, axis=1)
        return rank < counts[:, None]

    def _draw_counts(self, rng: jax.Array, images: int) -> jax.Array:
        """The number of masked patches of each image, int32 `[images]`."""
        group = self.group(images)
        masked, groups = self.masked(group), images // group
        ratio_rng, order_rng = jax.random.split(rng)
        low, high = self.ratio
        place = jnp.arange(masked) + jax.random.uniform(ratio_rng, (groups, masked))
        ratios = low + (high - low) * place / masked
        # Rounded up at the end of a part, a count would be above the capacity.
        patches = math.prod(self.grid)
        ends = [low + (high - low) * (i + 1) / masked for i in range(masked)]
        most = jnp.asarray([math.floor(patches * end + 1e-6) for end in ends])
        least = max(1, int(low * patches + 1e-6))
        counts = jnp.clip(jnp.floor(patches * ratios).astype(jnp.int32), least, most)
        counts = jnp.pad(counts, ((0, 0), (0, group - masked)))
        order = jnp.argsort(jax.random.uniform(order_rng, counts.shape), axis=1)
        return jnp.take_along_axis(counts, order, axis=1).reshape(images)

    def _draw_blocks(self, rng: jax.Array, counts: jax.Array) -> jax.Array:
        """Blocks within the counts, bool `[images, patches]`; some counts are not reached."""
        rows, columns = self.grid
        images = len(counts)
        draws = jax.random.uniform(rng, (_TRIES, 4, images))
        largest = 0.5 * rows * columns

        def place(masks: jax.Array, draw: jax.Array) -> tuple[jax.Array, None]:
            left = counts - masks.sum(axis=(1, 2))
            most = jnp.minimum(left, largest)
            area = _LEAST_AREA + (most - _LEAST_AREA) * draw[0]
            limit = math.log(_ASPECT)
            aspect = jnp.exp(limit + (-limit - limit) * draw[1])
            height = jnp.round(jnp.sqrt(area * aspect))
            width = jnp.round(jnp.sqrt(area / aspect))
            top = jnp.floor(draw[2] * (rows - height + 1))
            start = jnp.floor(draw[3] * (columns - width + 1))
            y, x = jnp.arange(rows), jnp.arange(columns)
            in_rows = (y >= top[:, None]) & (y < (top + height)[:, None])
            in_columns = (x >= start[:, None]) & (x < (start + width)[:, None])
            block = in_rows[:, :, None] & in_columns[:, None]
            added = (block & ~masks).sum(axis=(1, 2))
            fits = (height < rows) & (width < columns) & (added > 0) & (added <= most)
            return masks | (block & fits[:, None, None]), None

        masks = jnp.zeros((images, rows, columns), bool)
        masks, _ = jax.lax.scan(place, masks, draws)
        return masks.reshape(images, rows * columns)


def gather_masked(masks: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the masked patches of each group of images.

    Args:
      masks: bool `[groups, images, patches]`.
      capacity: number of places for the patches of a group.

    Returns:
      Indices into the patches of a group, int32 `[groups, capacity]`; whether each is a masked
      patch, and not a place that is left over, bool of the same shape; and 1 / (masked patches of
      its image), or 0 for places that are left over, float32 of the same shape.
    """
    groups, images, patches = masks.shape
    flat = masks.reshape(groups, images * patches)
    found, indices = jax.lax.top_k(flat.astype(jnp.int32), capacity)
    counts = masks.sum(axis=2)
    of_image = jnp.take_along_axis(counts, indices // patches, axis=1)
    valid = found > 0
    return indices, valid, jnp.where(valid, 1 / jnp.maximum(of_image, 1), 0.0)
