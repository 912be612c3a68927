# SPDX-License-Identifier: Apache-2.0
"""Attention rollout, attention distance and related statistics of tokens, in numpy."""

import numpy as np


def rollout(attention: np.ndarray) -> np.ndarray:
    """Computes how much each input token contributes to each output token, after all blocks.

    Heads are averaged, and the residual connection has the same weight as the attention:
    R = A_L ... A_1 with A_l = (mean over heads + 1) / 2. Source: arXiv:2005.00928, section 3.

    Args:
      attention: weights, float `[layers, heads, length, length]`; each row sums to 1.

    Returns:
      float64 `[length, length]`; each row sums to 1.
    """
    length = attention.shape[-1]
    joined = np.eye(length)
    for weights in attention.mean(axis=1, dtype=np.float64):
        joined = (weights + np.eye(length)) / 2 @ joined
    return joined


def image_row(weights: np.ndarray, *, num_class_tokens: int, prefix: int) -> np.ndarray:
    """Selects the weights from the representation of the image to each patch.

    Args:
      weights: float `[..., length, length]`.
      num_class_tokens: with any, the first class token represents the image; otherwise the mean
        over all patches does.
      prefix: number of tokens before the patches.

    Returns:
      Of the same dtype, `[..., patches]`.
    """
    rows = weights[..., 0, :] if num_class_tokens else weights[..., prefix:, :].mean(axis=-2)
    return rows[..., prefix:]


def mean_distances(
    attention: np.ndarray, *, prefix: int, grid: tuple[int, int], stride: tuple[int, int]
) -> np.ndarray:
    """Computes the mean attention distance of each head.

    Source: arXiv:2010.11929, appendix D.7. Tokens before the patches are left out.

    Args:
      attention: weights, float `[layers, heads, length, length]`.
      prefix: number of tokens before the patches.
      grid: rows and columns of patches.
      stride: height and width of a patch in pixels.

    Returns:
      Pixels, float64 `[layers, heads]`.
    """
    centres = np.indices(grid).reshape(2, -1).T * np.asarray(stride)
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    weights = attention[..., prefix:, prefix:]
    among_patches = weights.sum(axis=-1)
    means = (weights * distances).sum(axis=-1) / np.maximum(among_patches, 1e-12)
    return means.mean(axis=-1)


def cosine_similarity(x: np.ndarray) -> np.ndarray:
    """Cosine similarity of each pair of rows: float `[n, width]` to float `[n, n]`."""
    unit = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return unit @ unit.T


def principal_components(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes the directions of largest variance of the rows of `x`.

    Args:
      x: float `[n, width]`.
      count: number of components; at most min(n, width) exist.

    Returns:
      Components of length 1, float64 `[count, width]`, and the coordinates of the rows along them,
      float64 `[n, count]`. The sign of each component makes its largest entry positive.
    """
    centred = x.astype(np.float64) - x.mean(axis=0)
    components = np.linalg.svd(centred, full_matrices=False)[2][:count]
    largest = np.abs(components).argmax(axis=1)[:, None]
    components = components * np.sign(np.take_along_axis(components, largest, axis=1))
    return components, centred @ components.T
