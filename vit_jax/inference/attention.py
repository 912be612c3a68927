# SPDX-License-Identifier: Apache-2.0
"""What attention weights say of an image, in numpy: from where to where, and how far."""

import numpy as np


def rollout(attention: np.ndarray) -> np.ndarray:
    """How much of each input token is in each output token, after all blocks.

    Heads are averaged; the residual connection counts as much as the attention:
    R = A_L ... A_1 with A_l = (mean over heads + 1) / 2. Source: arXiv:2005.00928, section 3.

    Args:
      attention: weights `[layers, heads, length, length]`, rows of which sum to 1.

    Returns:
      `[length, length]`, rows of which sum to 1.
    """
    length = attention.shape[-1]
    joined = np.eye(length)
    for weights in attention.mean(axis=1, dtype=np.float64):
        joined = (weights + np.eye(length)) / 2 @ joined
    return joined


def image_row(weights: np.ndarray, *, num_class_tokens: int, prefix: int) -> np.ndarray:
    """What stands for the image takes from each patch.

    Args:
      weights: `[..., length, length]`.
      num_class_tokens: if there are any, the first one stands for the image; else all patches do,
        and their mean is taken.
      prefix: tokens in front of the patches.

    Returns:
      `[..., patches]`.
    """
    rows = weights[..., 0, :] if num_class_tokens else weights[..., prefix:, :].mean(axis=-2)
    return rows[..., prefix:]


def mean_distances(
    attention: np.ndarray, *, prefix: int, grid: tuple[int, int], stride: tuple[int, int]
) -> np.ndarray:
    """How far patches look, as a mean over patches weighted by attention.

    Source: arXiv:2010.11929, appendix D.7; tokens in front of the patches are left out.

    Args:
      attention: `[layers, heads, length, length]`.
      prefix: tokens in front of the patches.
      grid: rows and columns of patches.
      stride: height and width of a patch in pixels.

    Returns:
      In pixels, `[layers, heads]`.
    """
    centres = np.indices(grid).reshape(2, -1).T * np.asarray(stride)
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    weights = attention[..., prefix:, prefix:]
    among_patches = weights.sum(axis=-1)
    means = (weights * distances).sum(axis=-1) / np.maximum(among_patches, 1e-12)
    return means.mean(axis=-1)


def cosine_similarity(x: np.ndarray) -> np.ndarray:
    """Of each pair of the rows `[n, width]`, `[n, n]`."""
    unit = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return unit @ unit.T


def principal_components(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The directions of largest variance of the rows of `x`.

    Args:
      x: `[n, width]`.
      count: of components; fewer where there are no more.

    Returns:
      Components `[count, width]` of length 1, and the coordinates of the rows along them,
      `[n, count]`. Signs are such that the largest entry of each component is positive.
    """
    centred = x.astype(np.float64) - x.mean(axis=0)
    components = np.linalg.svd(centred, full_matrices=False)[2][:count]
    largest = np.abs(components).argmax(axis=1)[:, None]
    components = components * np.sign(np.take_along_axis(components, largest, axis=1))
    return components, centred @ components.T
