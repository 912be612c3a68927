# SPDX-License-Identifier: Apache-2.0
"""The grid of patches, and positions on it that are computed rather than learned.

Sine-cosine and rotary embeddings are functions of the row and the column of a patch, so they fit a
grid of any size and shape.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.utils.errors import UserError

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
    """Returns the embeddings that `model.position_embedding` names, as `sincos_2d`, or None."""
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
