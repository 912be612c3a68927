# SPDX-License-Identifier: Apache-2.0
"""The grid of patches, and positions on it: computed, or learned and then resized.

Sine-cosine and rotary embeddings are functions of the row and the column of a patch, so they fit a
grid of any size and shape. Learned embeddings are interpolated to fit another grid.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.utils.errors import UserError

Method = Literal["bilinear", "bicubic"]

# Values of `model.position_embedding` that are computed, and the `endpoint` of `sincos_2d`.
FIXED_POSITIONS = {"sincos2d": True, "sincos2d_mae": False}


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each pair of channels, each repeated for both channels.

    Both are float32 `[length, head_dim]`, or `[batch, length, head_dim]`.
    """

    cos: jax.Array
    sin: jax.Array


def patch_grid(image_size: tuple[int, ...], stride: tuple[int, int]) -> tuple[int, int]:
    """Returns the rows and columns of patches in an image of (height, width) pixels.

    Raises `UserError` if `stride`, (height, width) of a patch in pixels, does not divide the image.
    """
    for size, step in zip(image_size, stride, strict=True):
        if size % step:
            raise UserError(
                f"an image of {image_size[0]}x{image_size[1]} can't be cut into patches of "
                f"{stride[0]}x{stride[1]}: set model.patch_size to a divisor, or resize in "
                "data.preprocess"
            )
    return image_size[0] // stride[0], image_size[1] // stride[1]


def sincos_2d(
    grid: tuple[int, int], width: int, *, temperature: float = 10_000.0, endpoint: bool = True
) -> np.ndarray:
    """Returns fixed 2D position embeddings, float32 `[1, rows * columns, width]`.

    The four quarters of the channels hold sin(x w), cos(x w), sin(y w) and cos(y w). The
    frequencies w fall from 1 to 1 / temperature in equal ratios; 1 / temperature is included
    (arXiv:2205.01580), or excluded without `endpoint` (arXiv:2111.06377).
    """
    frequencies = temperature ** -np.linspace(0, 1, width // 4, endpoint=endpoint)
    rows, columns = np.indices(grid).reshape(2, -1, 1) * frequencies
    channels = [np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)]
    return np.concatenate(channels, axis=1)[None].astype(np.float32)


def fixed_positions(kind: str | None, grid: tuple[int, int], width: int) -> np.ndarray | None:
    """Returns what `sincos_2d` does for a fixed `model.position_embedding`, and None for others."""
    if kind not in FIXED_POSITIONS:
        return None
    return sincos_2d(grid, width, endpoint=FIXED_POSITIONS[kind])


def rotation_2d(
    grid: tuple[int, int], head_dim: int, *, theta: float, num_prefix_tokens: int
) -> Rotation:
    """Returns an axial 2D rotary embedding, `[num_prefix_tokens + rows * columns, head_dim]`.

    The first half of the channels turns with the row, the second with the column. The angle of
    pair j of an axis is position * theta^(-4 j / head_dim). Prefix tokens, which have no position,
    are not turned. `head_dim`, the number of channels of a head, must divide by 4.
    Sources: arXiv:2104.09864; in 2D: arXiv:2403.13298, section 3.2 ("axial").
    """
    frequencies = theta ** -(4 * np.arange(head_dim // 4) / head_dim)
    angles = np.indices(grid).reshape(2, -1, 1) * frequencies
    angles = np.repeat(np.concatenate(list(angles), axis=1), 2, axis=1)
    angles = np.concatenate([np.zeros((num_prefix_tokens, head_dim)), angles])
    return Rotation(
        cos=jnp.asarray(np.cos(angles), jnp.float32), sin=jnp.asarray(np.sin(angles), jnp.float32)
    )


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates each pair (2 j, 2 j + 1) of channels by the angles of each token.

    Takes `[batch, length, heads, head_dim]` of any floating dtype; shape and dtype are kept.
    """
    cos, sin = (table[..., None, :] for table in rotation)
    even, odd = x[..., ::2], x[..., 1::2]
    turned = jnp.stack([-odd, even], axis=-1).reshape(x.shape)
    return (x * cos + turned * sin).astype(x.dtype)


def resize_posemb(
    posemb: np.ndarray,
    *,
    source_grid: tuple[int, int],
    target_grid: tuple[int, int],
    num_prefix_tokens: int,
    method: Method = "bilinear",
) -> np.ndarray:
    """Interpolates position embeddings from one grid of patches to another.

    "bilinear" aligns corners: the first and the last row (column) keep their values, and the others
    are evenly spaced between them; a single row takes the first. The published checkpoints were
    fine-tuned, and their accuracies measured, with this rule. The half-pixel rule of
    `jax.image.resize` samples at other positions, and gives other logits.

    "bicubic" is the rule for images, as in timm: half-pixel centres, Keys' kernel with a = -0.5,
    widened if the grid becomes smaller.

    Source: Dosovitskiy et al., arXiv:2010.11929, section 3.2 ("2D interpolation"), done there by
    `scipy.ndimage.zoom(order=1)`. That call also zeroes the last row and column for some pairs
    of sizes (28 to 48), where a position is rounded past the last one; this function does not.

    Args:
      posemb: `[1, num_prefix_tokens + rows * columns, width]`, any float dtype.
      source_grid: (rows, columns) of `posemb`.
      target_grid: (rows, columns) of the result.
      num_prefix_tokens: tokens in front of the grid (such as the class token), which are copied.
      method: "bilinear" or "bicubic".

    Returns:
      `[1, num_prefix_tokens + target rows * target columns, width]`, in the dtype of `posemb`.
    """
    prefix, grid = np.split(np.asarray(posemb), [num_prefix_tokens], axis=1)
    width = grid.shape[-1]
    grid = grid.reshape(*source_grid, width)
    make_matrix = {"bilinear": _align_corners_matrix, "bicubic": _bicubic_matrix}[method]
    rows, columns = map(make_matrix, source_grid, target_grid)
    grid = np.einsum("ri,cj,ijw->rcw", rows, columns, grid, optimize=True)
    return np.concatenate([prefix, grid.reshape(1, -1, width).astype(prefix.dtype)], axis=1)


def _align_corners_matrix(source: int, target: int) -> np.ndarray:
    """Returns float64 `[target, source]`: row `i` holds the weights of output `i`."""
    # Output i samples position i * (source - 1) / (target - 1); integers keep the last one exact.
    gaps = max(target - 1, 1)
    lower, remainder = np.divmod(np.arange(target) * (source - 1), gaps)
    upper = np.minimum(lower + 1, source - 1)
    fraction = (remainder / gaps)[:, None]
    identity = np.eye(source)
    return (1 - fraction) * identity[lower] + fraction * identity[upper]


def _bicubic_matrix(source: int, target: int) -> np.ndarray:
    """Returns float64 `[target, source]`: row `i` holds the weights of output `i`."""
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale - 0.5
    x = np.abs(centres[:, None] - np.arange(source)) / max(scale, 1.0)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)
