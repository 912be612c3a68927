# SPDX-License-Identifier: Apache-2.0
"""Geometric operations on images, uint8 `[height, width, 3]`: resizing and affine maps."""

import math
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from vit_jax.data.ops.decode import check_size

# Methods without antialiasing are "bilinear", as published models were trained, and "bicubic" (a =
# -0.75, as in OpenCV and PyTorch). "area" averages if both sides shrink, and is bilinear otherwise.
# The others are those of Pillow.
Method = Literal[
    "bilinear",
    "bicubic",
    "area",
    "bilinear_antialias",
    "bicubic_antialias",
    "lanczos_antialias",
    "nearest",
]
_PILLOW = {
    "bilinear_antialias": Image.Resampling.BILINEAR,
    "bicubic_antialias": Image.Resampling.BICUBIC,
    "lanczos_antialias": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}

Fill = tuple[int, int, int]


def resize_image(
    image: np.ndarray, height: int, width: int, method: Method = "bilinear"
) -> np.ndarray:
    """Resizes to uint8 `[height, width, 3]` with half-pixel centres, whatever the aspect ratio.

    Raises `ImageError` if the result would have more than `MAX_PIXELS` pixels.
    """
    old_height, old_width = image.shape[:2]
    if (old_height, old_width) == (height, width):
        return image
    check_size(width, height)  # If the aspect is kept, a narrow strip may become huge.
    if method in _PILLOW:
        return np.array(Image.fromarray(image).resize((width, height), _PILLOW[method]))
    if method == "area" and height <= old_height and width <= old_width:
        flag = cv2.INTER_AREA
    else:
        flag = cv2.INTER_CUBIC if method == "bicubic" else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=flag)


def rotate(image: np.ndarray, degrees: float, *, fill: Fill, flag: int) -> np.ndarray:
    """Rotates an image, uint8 `[height, width, 3]`, counter-clockwise about its centre.

    `fill` is the colour of pixels from outside of the image, and `flag` is `cv2.INTER_NEAREST` or
    `cv2.INTER_LINEAR`.
    """
    y, x = ((side - 1) / 2 for side in image.shape[:2])
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]]
    return _warp(image, matrix, fill, flag)


def shear_x(image: np.ndarray, slope: float, *, fill: Fill, flag: int) -> np.ndarray:
    """Moves row y by `slope` * y pixels to the left; other arguments are those of `rotate`."""
    return _warp(image, [[1, slope, 0], [0, 1, 0]], fill, flag)


def shear_y(image: np.ndarray, slope: float, *, fill: Fill, flag: int) -> np.ndarray:
    """Moves column x by `slope` * x pixels upwards; other arguments are those of `rotate`."""
    return _warp(image, [[1, 0, 0], [slope, 1, 0]], fill, flag)


def translate(image: np.ndarray, x: float, y: float, *, fill: Fill, flag: int) -> np.ndarray:
    """Moves the image by `x` pixels to the left and `y` upwards; other arguments as in `rotate`."""
    return _warp(image, [[1, 0, x], [0, 1, y]], fill, flag)


def cut_out(image: np.ndarray, y: int, x: int, reach: int, *, fill: Fill) -> np.ndarray:
    """Fills the square from `reach` pixels before to `reach` after `y, x` (arXiv:1708.04552)."""
    image = image.copy()
    image[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = fill
    return image


def _warp(image: np.ndarray, matrix: list[list[float]], fill: Fill, flag: int) -> np.ndarray:
    """Applies an affine map; `matrix`, 2x3, maps (x, y) of the result to (x, y) of the image."""
    height, width = image.shape[:2]
    return cv2.warpAffine(
        image,
        np.array(matrix, np.float64),
        (width, height),
        flags=flag | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )
