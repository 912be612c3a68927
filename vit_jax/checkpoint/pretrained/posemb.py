# SPDX-License-Identifier: Apache-2.0
"""Resizes position embeddings, so that a model can be fine-tuned at another resolution."""

from typing import Literal

import numpy as np

Method = Literal["bilinear", "bicubic"]


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
