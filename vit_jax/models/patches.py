# SPDX-License-Identifier: Apache-2.0
"""Images of any size as rows of patches, and the layers that depend on where a patch is.

A row has the patches of one image, or of several that share it, and padding behind them. Sources:
NaFlex of SigLIP 2, arXiv:2502.14786, section 2.4; NaViT, arXiv:2307.06304, section 3.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models.resampling import Method, axis_weights, kernel_matrix

_HIGHEST = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class PatchBatch:
    """Patches of images, in place of images `[batch, height, width, channels]`.

    Attributes:
      pixels: float `[batch, tokens, height, width, channels]`, the pixels of patches.
      coordinates: int32 `[batch, tokens, 2]`, the row and the column of each patch in its image.
      grids: int32 `[batch, images, 2]`, the rows and columns of patches of each image; 1 x 1 for
        images that are absent. A patch that was dropped still counts.
      segments: int32 `[batch, tokens]`, the number from 1 of the image that a patch belongs to; 0
        for padding.
    """

    pixels: jax.Array
    coordinates: jax.Array
    grids: jax.Array
    segments: jax.Array

    @classmethod
    def of_images(cls, pixels: jax.Array, grids: jax.Array) -> "PatchBatch":
        """The patches of one image a row, without gaps: row by row of its grid, then padding.

        Args:
          pixels: float `[batch, tokens, height, width, channels]`.
          grids: int32 `[batch, 2]`.
        """
        rows, columns = grids[:, :1], grids[:, 1:]
        index = jnp.arange(pixels.shape[1], dtype=jnp.int32)
        valid = index < rows * columns
        # Padding is at the first patch, where any table of positions has a value.
        coordinates = jnp.where(valid[..., None], _divide(index, columns), 0)
        return cls(pixels, coordinates, grids[:, None], valid.astype(jnp.int32))

    @classmethod
    def split_columns(cls, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Takes columns of patches apart, as `data.ops.patches.to_column` makes them.

        Takes uint8 `[batch, (1 + tokens) * size, size, channels]`. Returns patches, uint8 `[batch,
        tokens, size, size, channels]`, and the rows and columns of each image, int32 `[batch, 2]`.
        """
        batch, _, size, channels = columns.shape
        patches = columns.reshape(batch, -1, size, size, channels)
        head = patches[:, 0].reshape(batch, -1)[:, :4].astype(jnp.int32)
        return patches[:, 1:], head[:, ::2] + 256 * head[:, 1::2]

    @property
    def is_packed(self) -> bool:
        """Whether several images may share a row."""
        return self.grids.shape[1] > 1


def _divide(index: jax.Array, columns: jax.Array) -> jax.Array:
    return jnp.stack(jnp.divmod(index, jnp.maximum(columns, 1)), axis=-1)


class Layout(NamedTuple):
    """Where the patches of a `PatchBatch` are.

    Attributes:
      coordinates: int32 `[batch, tokens, 2]`.
      sizes: int32 `[batch, tokens, 2]`, the grid of each patch's own image.
    """

    coordinates: jax.Array
    sizes: jax.Array

    @classmethod
    def of(cls, batch: PatchBatch) -> "Layout":
        """The layout of a batch; padding is in the first image of its row."""
        image = jnp.maximum(batch.segments - 1, 0)
        sizes = jnp.take_along_axis(batch.grids, image[..., None], axis=1)
        return cls(batch.coordinates, jnp.maximum(sizes, 1))


class Segments(NamedTuple):
    """Which image each token belongs to; tokens attend to those of their own image.

    Attributes:
      ids: int32 `[batch, tokens]`, from 1; 0 for padding, which attends to itself, so that no row
        of a softmax is empty.
      images: number of images that a row may have. With 1, padding is behind all other tokens.
    """

    ids: jax.Array
    images: int

    def mask(self) -> jax.Array:
        """Which keys each query attends to: bool `[batch, queries, keys]`."""
        return self.ids[:, :, None] == self.ids[:, None, :]

    def members(self) -> jax.Array:
        """Which tokens each image has: bool `[batch, images, tokens]`."""
        return self.ids[:, None, :] == jnp.arange(1, self.images + 1)[:, None]

    def lengths(self) -> jax.Array:
        """The number of tokens before padding, int32 `[batch]`."""
        return (self.ids > 0).sum(axis=1, dtype=jnp.int32)

    def pad(self, length: int) -> "Segments":
        """Adds padding up to a number of tokens."""
        return Segments(jnp.pad(self.ids, ((0, 0), (0, length - self.ids.shape[1]))), self.images)


def mean_of_images(x: jax.Array, segments: Segments) -> jax.Array:
    """Means over the tokens of each image: `[batch, tokens, width]` to `[batch, images, width]`.

    The mean of an absent image is 0. Sums are float32, and the result has the dtype of `x`.
    """
    members = segments.members().astype(jnp.float32)
    total = jnp.einsum("bst,btw->bsw", members, x.astype(jnp.float32), precision=_HIGHEST)
    return (total / jnp.maximum(members.sum(axis=2), 1)[..., None]).astype(x.dtype)


def interpolate_positions(
    table: jax.Array, layout: Layout, *, method: Method, keep_aspect: bool = False
) -> jax.Array:
    """Resizes a table of position embeddings to the grid of each image.

    Args:
      table: float32 `[rows, columns, width]`.
      layout: of the patches.
      method: see `resampling.axis_weights`.
      keep_aspect: whether the table is resized to the square of the longer side, of which an image
        takes the upper left part: `pos_embed_ar_preserving` of timm.

    Returns:
      float32 `[batch, tokens, width]`, one embedding for each patch.
    """
    rows, columns, width = table.shape
    sizes = _square(layout.sizes) if keep_aspect else layout.sizes
    y, x = (
        axis_weights(method, layout.coordinates[..., i], length, sizes[..., i], xp=jnp)
        for i, length in enumerate((rows, columns))
    )
    weights = (y[..., :, None] * x[..., None, :]).reshape(*y.shape[:-1], rows * columns)
    return jnp.einsum("bnp,pw->bnw", weights, table.reshape(-1, width), precision=_HIGHEST)


def _square(sizes: jax.Array) -> jax.Array:
    return jnp.broadcast_to(sizes.max(axis=-1, keepdims=True), sizes.shape)


def interpolate_axes(
    tables: tuple[jax.Array, jax.Array], layout: Layout, *, keep_aspect: bool = False
) -> jax.Array:
    """Sums the embeddings of the row and of the column, each resized to the grid of each image.

    Takes tables of rows and columns, float32 `[length, width]`, and returns float32 `[batch,
    tokens, width]`; `keep_aspect` is as in `interpolate_positions`. Interpolation is without
    antialiasing, as in timm. Source: arXiv:2307.06304, section 3.4.
    """
    total = 0.0
    sizes = _square(layout.sizes) if keep_aspect else layout.sizes
    for i, table in enumerate(tables):
        weights = axis_weights(
            "bilinear_half_pixel",
            layout.coordinates[..., i],
            table.shape[0],
            sizes[..., i],
            xp=jnp,
        )
        total += jnp.einsum("bnl,lw->bnw", weights, table, precision=_HIGHEST)
    return jnp.asarray(total)


def grid_layout(grid: tuple[int, int]) -> Layout:
    """The layout of one image with (rows, columns) of patches."""
    index = jnp.arange(math.prod(grid), dtype=jnp.int32)
    coordinates = _divide(index, jnp.asarray(grid[1]))[None]
    return Layout(coordinates, jnp.broadcast_to(jnp.asarray(grid, jnp.int32), coordinates.shape))


class PatchEmbedding(nn.Module):
    """The convolution of a Vision Transformer, whose patches do not overlap.

    Attributes:
      features: width of the embeddings.
      patch_size: (height, width) of the patches of the images.
      kernel_size: (height, width) of the kernel that is trained, which each call resizes to
        `patch_size` (see `resampling.kernel_matrix`).
      use_bias: whether there is a bias.
      dtype: of the computation.

    Call: `[batch, height, width, channels]` to `[batch, rows, columns, features]`, or patches
    `[batch, tokens, height, width, channels]` to `[batch, tokens, features]`. The parameters are
    those of `flax.linen.Conv`.
    """

    features: int
    patch_size: tuple[int, int]
    kernel_size: tuple[int, int]
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        if self.kernel_size != self.patch_size:
            rows, columns = (
                jnp.asarray(kernel_matrix("bilinear_half_pixel", old, new), jnp.float32)
                for old, new in zip(self.kernel_size, self.patch_size, strict=True)
            )
            resize = functools.partial(jnp.einsum, precision=_HIGHEST)
            kernel = resize("ri,cj,ijxf->rcxf", rows, columns, kernel.astype(jnp.float32))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if x.ndim == 5:
            x = x.reshape(*x.shape[:2], -1) @ kernel.reshape(-1, self.features)
        else:
            x = jax.lax.conv_general_dilated(
                x, kernel, self.patch_size, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        if self.use_bias:
            x += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return x
