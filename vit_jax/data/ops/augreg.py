# SPDX-License-Identifier: Apache-2.0
"""Operations of AugReg's RandAugment as its TensorFlow code computed them, with its faults.

The code of arXiv:2106.10270 is `autoaugment.py` of big_vision, which descends from that of
arXiv:1909.13719. Published weights were trained with it, and a recipe that follows them needs the
same pixels. All functions take and return an image, uint8 `[height, width, 3]` in RGB; what is
missing here equals the function in `colors` or `geometry`. The faults are:

- `solarize` compares bytes with a threshold that is kept in a byte: 256 is 0, 384 is 128.
- `adjust_contrast` takes height x width / 256 for the mean luma, whatever the image shows.
- `posterize` shifts by at most seven bits, so that with no bits the highest one remains; more than
  eight bits are a shift by a negative number, which is one by seven.
"""

import math

import cv2
import numpy as np

from vit_jax.data.ops import colors
from vit_jax.data.ops.geometry import Fill

_LEVELS = np.arange(256)
_LUMA = np.array([[0.2989, 0.5870, 0.1140]], np.float32)


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts the values of `threshold` modulo 256 or more."""
    return colors.solarize(image, threshold % 256)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the `bits` highest bits of each value, and one of them for 0 and for more than 8."""
    return colors.posterize(image, bits if 1 <= bits <= 8 else 1)


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to the range from 0 to 255, in float32."""
    limits = [cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]
    low, high = np.transpose(limits).astype(np.float32)
    levels = _LEVELS[:, None].astype(np.float32)
    scale = np.float32(255) / np.maximum(high - low, 1)
    return colors.map_values(image, np.where(high > low, levels * scale - low * scale, levels))


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Interpolates from a gray that depends on the size alone (`factor` 0) to the image (1)."""
    gray = min(255, image.shape[0] * image.shape[1] // 256)
    return colors.map_values(image, colors.blend(gray, _LEVELS, factor))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Interpolates from gray, which is truncated (`factor` 0), to the image (1)."""
    luma = cv2.transform(image.astype(np.float32) * np.float32(1 / 255), _LUMA)
    gray = (luma * np.float32(255.5)).astype(np.uint8)
    return colors.to_uint8(colors.blend(gray[..., None], image, factor))


def adjust_sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Interpolates from a smoothed image, which is truncated (`factor` 0), to the image (1)."""
    smooth, pixels = image.copy(), image.astype(np.float32)
    height, width = image.shape[:2]
    if height > 2 and width > 2:
        total = np.zeros((height - 2, width - 2, 3), np.float32)
        for y in range(3):
            for x in range(3):
                weight = np.float32(5 if (y, x) == (1, 1) else 1) / np.float32(13)
                total += weight * pixels[y : y + height - 2, x : x + width - 2]
        smooth[1:-1, 1:-1] = total.astype(np.uint8)
    return colors.to_uint8(colors.blend(smooth, image, factor))


def rotate(image: np.ndarray, degrees: float, *, fill: Fill) -> np.ndarray:
    """Rotates counter-clockwise about the centre; `fill` is for pixels from outside."""
    angle = np.float32(degrees) * np.float32(math.pi / 180)
    cos, sin = np.cos(angle), np.sin(angle)
    y, x = (np.float32(side - 1) for side in image.shape[:2])
    offset_x = (x - (cos * x - sin * y)) / np.float32(2)
    offset_y = (y - (sin * x + cos * y)) / np.float32(2)
    return _warp(image, [[cos, -sin, offset_x], [sin, cos, offset_y]], fill)


def shear_x(image: np.ndarray, slope: float, *, fill: Fill) -> np.ndarray:
    """Moves row y by `slope` * y pixels to the left."""
    return _warp(image, [[1, slope, 0], [0, 1, 0]], fill)


def shear_y(image: np.ndarray, slope: float, *, fill: Fill) -> np.ndarray:
    """Moves column x by `slope` * x pixels upwards."""
    return _warp(image, [[1, 0, 0], [slope, 1, 0]], fill)


def translate(image: np.ndarray, x: float, y: float, *, fill: Fill) -> np.ndarray:
    """Moves the image by `x` pixels to the left and `y` upwards."""
    return _warp(image, [[1, 0, x], [0, 1, y]], fill)


def _warp(image: np.ndarray, matrix: list[list[float]], fill: Fill) -> np.ndarray:
    """Applies an affine map in float32; it maps (x, y) of the result to (x, y) of the image."""
    height, width = image.shape[:2]
    rows, columns = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    x, y = (np.float32(a) * columns + np.float32(b) * rows + np.float32(c) for a, b, c in matrix)
    # Halves are rounded away from zero, so that -0.5 is outside. In float64 the sum is exact.
    x, y = (z.astype(np.float64) + 0.5 for z in (x, y))
    inside = (x > 0) & (x < width) & (y > 0) & (y < height)
    row, column = (np.where(inside, z, 0).astype(np.intp) for z in (y, x))
    taken = np.take(image.reshape(-1, 3), row * width + column, axis=0)
    taken[~inside] = fill
    return taken
