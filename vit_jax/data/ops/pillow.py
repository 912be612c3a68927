# SPDX-License-Identifier: Apache-2.0
"""Geometric operations by Pillow's bicubic interpolation, as in policies of timm.

All take and return an image, uint8 `[height, width, 3]`. A pixel whose centre comes from outside of
the image is `fill`; others are interpolated from the image, whose border is replicated.
"""

import numpy as np
from PIL import Image

from vit_jax.data.ops.geometry import Fill

_BICUBIC = Image.Resampling.BICUBIC


def rotate(image: np.ndarray, degrees: float, *, fill: Fill) -> np.ndarray:
    """Rotates counter-clockwise about the centre."""
    return np.asarray(Image.fromarray(image).rotate(degrees, _BICUBIC, fillcolor=fill))


def shear_x(image: np.ndarray, slope: float, *, fill: Fill) -> np.ndarray:
    """Moves row y by `slope` * (y + 0.5) pixels to the left."""
    return _transform(image, (1, slope, 0, 0, 1, 0), fill)


def shear_y(image: np.ndarray, slope: float, *, fill: Fill) -> np.ndarray:
    """Moves column x by `slope` * (x + 0.5) pixels upwards."""
    return _transform(image, (1, 0, 0, slope, 1, 0), fill)


def translate(image: np.ndarray, x: float, y: float, *, fill: Fill) -> np.ndarray:
    """Moves the image by `x` pixels to the left and `y` upwards."""
    return _transform(image, (1, 0, x, 0, 1, y), fill)


def _transform(image: np.ndarray, data: tuple[float, ...], fill: Fill) -> np.ndarray:
    source = Image.fromarray(image)
    affine = Image.Transform.AFFINE
    return np.asarray(source.transform(source.size, affine, data, _BICUBIC, fillcolor=fill))
