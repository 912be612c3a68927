# SPDX-License-Identifier: Apache-2.0
"""Colour operations.

All take an image as uint8 `[height, width, 3]` in RGB and return an image of the same shape and
dtype. Definitions are those of Pillow's `ImageOps` and `ImageEnhance`, on which published
augmentation policies are based.
"""

import cv2
import numpy as np

_LEVELS = np.arange(256)
# ITU-R 601, in Pillow's fixed-point numbers of 16 bits.
_LUMA = np.array([[19595, 38470, 7471]], np.float32) / 65536
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def to_gray(image: np.ndarray) -> np.ndarray:
    """The luma of an image, uint8 `[height, width]`."""
    return np.floor(cv2.transform(image.astype(np.float32), _LUMA) + 0.5).astype(np.uint8)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Replaces each channel by the luma."""
    return cv2.merge([to_gray(image)] * 3)


def invert(image: np.ndarray) -> np.ndarray:
    """Replaces each value v by 255 - v."""
    return 255 - image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the `bits` highest of the eight bits; with 0, the image is black."""
    return image & np.uint8(256 - 2 ** (8 - bits)) if bits else np.zeros_like(image)


def solarize(image: np.ndarray, threshold: int = 128) -> np.ndarray:
    """Inverts the values of `threshold` or more."""
    return map_values(image, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS))


def solarize_add(image: np.ndarray, addition: int, threshold: int = 128) -> np.ndarray:
    """Adds `addition` to the values below `threshold`."""
    return map_values(image, np.where(threshold > _LEVELS, _LEVELS + addition, _LEVELS))


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to the range from 0 to 255."""
    limits = [cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]
    low, high = np.transpose(limits)
    scale = 255 / np.maximum(high - low, 1)
    stretched = _LEVELS[:, None] * scale - low * scale
    return map_values(image, np.where(high > low, stretched, _LEVELS[:, None]))


def equalize(image: np.ndarray) -> np.ndarray:
    """Equalizes the histogram of each channel."""
    tables = np.empty((256, 3))
    for channel in range(3):
        histogram = cv2.calcHist([image], [channel], None, [256], [0, 256]).astype(np.int64).ravel()
        # The highest value that occurs is excluded, so that it becomes 255.
        step = (histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
        before = np.cumsum(histogram) - histogram
        tables[:, channel] = (before + step // 2) // step if step else _LEVELS
    return map_values(image, tables)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Interpolates from black (`factor` 0) to the image (1), or extrapolates beyond it."""
    return map_values(image, blend(0, _LEVELS, factor))


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Interpolates from the image's mean luma (`factor` 0) to the image (1), or extrapolates."""
    mean = int(to_gray(image).mean() + 0.5)
    return map_values(image, blend(mean, _LEVELS, factor))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Interpolates from gray (`factor` 0) to the image (1), or extrapolates beyond it."""
    return to_uint8(blend(to_gray(image)[..., None], image, factor))


def turn_hue(image: np.ndarray, share: float) -> np.ndarray:
    """Turns the hue by this share of the circle of colours, in 256 steps as torchvision does."""
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL))
    hue = hue + np.uint8(int(share * 255) % 256)  # The circle closes where uint8 overflows.
    return cv2.cvtColor(cv2.merge([hue, saturation, value]), cv2.COLOR_HSV2RGB_FULL)


def adjust_sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Interpolates from a smoothed image (`factor` 0) to the image (1); border pixels stay."""
    smooth = image.astype(np.float32)
    smooth[1:-1, 1:-1] = np.rint(cv2.filter2D(smooth, -1, _SMOOTH)[1:-1, 1:-1])
    return to_uint8(blend(smooth, image, factor))


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs by a Gaussian of standard deviation `sigma` in pixels; the border is replicated."""
    size = 2 * int(4 * sigma + 0.5) + 1
    # OpenCV's weights for uint8 have eight bits, which is off by more than one level.
    image = image.astype(np.float32)
    blurred = cv2.GaussianBlur(image, (size, size), sigma, borderType=cv2.BORDER_REPLICATE)
    return to_uint8(blurred + 0.5)


def blend(start: np.ndarray | int, end: np.ndarray, factor: float) -> np.ndarray:
    """Interpolates from `start` (`factor` 0) to `end` (1), in float32; shapes are broadcast."""
    start = np.asarray(start, np.float32)
    return start + np.float32(factor) * (end.astype(np.float32) - start)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Clips values of any shape to 0 and 255; fractions are cut off, as in Pillow."""
    return np.clip(values, 0, 255).astype(np.uint8)


def map_values(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Looks values of an image up in a table, `[256]` or `[256, 3]`, see `to_uint8`."""
    table = to_uint8(table)
    return cv2.LUT(image, table if table.ndim == 1 else table[None])
