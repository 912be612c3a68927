# SPDX-License-Identifier: Apache-2.0
"""Geometric operations on images, uint8 `[height, width, 3]`: resizing and affine maps."""

import functools
import math
from typing import Literal

import cv2
import numpy as np

from vit_jax.data.ops.decode import check_size

# Methods without antialiasing are "bilinear", as published models were trained, and "bicubic" (a =
# -0.75, as in OpenCV and PyTorch). "area" averages if both sides shrink, and is bilinear otherwise.
# The last two are Pillow's BILINEAR and BICUBIC.
Method = Literal["bilinear", "bicubic", "area", "bilinear_antialias", "bicubic_antialias"]

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
    if method.endswith("_antialias"):
        return _resample(image, height, width, method)
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


def _resample(image: np.ndarray, height: int, width: int, method: Method) -> np.ndarray:
    rows = _resample_rows(image, height, method)
    columns = _resample_rows(rows.transpose(1, 0, 2), width, method)
    return np.clip(columns.transpose(1, 0, 2) + 0.5, 0, 255).astype(np.uint8)


def _resample_rows(image: np.ndarray, size: int, method: Method) -> np.ndarray:
    """Resamples the first axis to `size`, as float32."""
    places, weights = _taps(image.shape[0], size, method)
    flat = np.ascontiguousarray(image).reshape(image.shape[0], -1)
    total = np.zeros((size, flat.shape[1]), np.float32)
    for place, weight in zip(places, weights, strict=True):
        total += flat[place] * weight[:, None]
    return total.reshape(size, *image.shape[1:])


@functools.lru_cache(maxsize=256)
def _taps(old: int, new: int, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """The old pixels that make each new one, and their weights: intp and float32 `[taps, new]`.

    The kernel is a triangle, or a cubic with a = -0.5 (Keys 1981), widened if the image shrinks.
    """
    scale = old / new
    width = max(scale, 1.0)
    support = width * (2 if method == "bicubic_antialias" else 1)
    centre = (np.arange(new) + 0.5) * scale
    first = np.floor(centre - support + 0.5)
    places = first + np.arange(math.ceil(2 * support) + 1)[:, None]
    inside = (places >= 0) & (places < old) & (places < np.floor(centre + support + 0.5))
    x = np.abs(places + 0.5 - centre) / width
    if method == "bicubic_antialias":
        near = (1.5 * x - 2.5) * x * x + 1
        weights = np.where(x < 1, near, ((-0.5 * x + 2.5) * x - 4) * x + 2)
        weights = np.where(x < 2, weights, 0)
    else:
        weights = np.maximum(0, 1 - x)
    weights = np.where(inside, weights, 0)
    weights /= weights.sum(axis=0)
    return np.clip(places, 0, old - 1).astype(np.intp), weights.astype(np.float32)
