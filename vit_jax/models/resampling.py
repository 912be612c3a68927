# SPDX-License-Identifier: Apache-2.0
"""The weights of interpolation along one axis, for grids whose size is known or computed.

Position embeddings are resized to the grid of an image, and kernels of patches to another patch.
Both are separable: a matrix for rows and one for columns.
"""

import functools
from typing import Any, Literal

import numpy as np

# How position embeddings and kernels are interpolated; see `axis_weights`.
Method = Literal[
    "bilinear", "bilinear_half_pixel", "bilinear_antialias", "bicubic", "bicubic_no_antialias"
]

# By which position embeddings of the published `.npz` and of runs of this package are resized.
OWN_METHOD: Method = "bilinear"


def axis_weights(method: Method, index: Any, source: int, target: Any, *, xp: Any = np) -> Any:
    """Returns the weights of `source` values in some values of an axis resized to `target`.

    - "bilinear" aligns corners: the first and the last value are kept, and the others are evenly
      spaced between them; a single value is the first.
    - "bilinear_half_pixel" interpolates between half-pixel centres.
    - "bilinear_antialias" does so with a triangle that is widened if the axis becomes shorter, and
      cut off at the border.
    - "bicubic" is the same with Keys' kernel, a = -0.5.
    - "bicubic_no_antialias" has the kernel with a = -0.75, never widened, and repeats the border.

    Args:
      method: one of these.
      index: int32 `[...]`, the wanted values: 0 to target - 1.
      source: length of the axis before.
      target: length of the axis after: a number, or int32 `[...]`, one for each index.
      xp: `numpy`, or `jax.numpy` where `index` or `target` are traced.

    Returns:
      `[..., source]`, each row of which sums to 1; float64 of NumPy, float32 of JAX.
    """
    values = xp.arange(source)
    index, target = xp.asarray(index)[..., None], xp.asarray(target)[..., None]
    if method == "bilinear":
        # Value i is at i * (source - 1) / (target - 1); integers keep the last one exact.
        gaps = xp.maximum(target - 1, 1)
        lower, remainder = xp.divmod(index * (source - 1), gaps)
        return _triangle(lower + remainder / gaps - values, xp)
    scale = source / target
    centres = (index + 0.5) * scale - 0.5
    if method == "bilinear_half_pixel":
        return _triangle(xp.clip(centres, 0, source - 1) - values, xp)
    if method == "bicubic_no_antialias":
        taps = xp.floor(centres) + xp.arange(-1, 3)
        weights = _keys(centres - taps, -0.75, xp)
        at = xp.clip(taps, 0, source - 1)[..., None] == values
        return (weights[..., None] * at).sum(axis=-2)
    distances = (centres - values) / xp.maximum(scale, 1.0)
    weights = _triangle(distances, xp) if method == "bilinear_antialias" else None
    weights = _keys(distances, -0.5, xp) if weights is None else weights
    return weights / weights.sum(axis=-1, keepdims=True)


@functools.lru_cache(maxsize=256)
def resize_matrix(method: Method, source: int, target: int) -> np.ndarray:
    """Returns float64 `[target, source]`: row i holds the weights of value i, see `axis_weights`.

    The array is shared, and must not be changed.
    """
    return axis_weights(method, np.arange(target), source, target)


@functools.lru_cache(maxsize=256)
def kernel_matrix(method: Method, source: int, target: int) -> np.ndarray:
    """Returns float64 `[target, source]`, which resizes one axis of the kernel of a patch.

    It is the pseudo-inverse of the transposed matrix that resizes an image from patches of `source`
    pixels to patches of `target`: the products of larger patches and kernels are those of the
    original ones, and with smaller patches they differ least. Each axis has its own inverse: that
    of both at once loses rank where one axis grows and the other shrinks.

    Source: FlexiViT, arXiv:2212.08013, section 3.4 ("PI-resize").
    """
    return np.linalg.pinv(resize_matrix(method, source, target).T)


def _triangle(x: Any, xp: Any) -> Any:
    return xp.maximum(0.0, 1 - xp.abs(x))


def _keys(x: Any, a: float, xp: Any) -> Any:
    """Returns the cubic convolution kernel (Keys 1981, equation 4) at distances `x` in pixels."""
    x = xp.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return xp.where(x < 1, near, xp.where(x < 2, far, 0.0))
