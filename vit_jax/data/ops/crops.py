# SPDX-License-Identifier: Apache-2.0
"""The parts of an image that inception-style crops take, as different libraries draw them.

Each function draws top, left, height and width of a part, given the height and width of the image,
`area`, the least and the greatest percentage of its area, and `aspect`, the least and the greatest
width / height. All follow arXiv:1409.4842, which leaves the distributions open: they differ in how
large parts are, and so in what a model learns from.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

Variant = Literal["uniform", "tensorflow", "torchvision", "byol"]
Range = tuple[float, float]
Part = tuple[int, int, int, int]

_TRIES = 10
_TENSORFLOW_TRIES = 100


def draw_uniform(height: int, width: int, area: Range, aspect: Range, rng: np.random.Generator):
    """Draws area and aspect uniformly, ten times at most; the whole image where no part fits."""
    for _ in range(_TRIES):
        percent, ratio = _between(*area, rng), _between(*aspect, rng)
        crop_h, crop_w = _sides(height * width * percent / 100, ratio)
        if 0 < crop_h <= height and 0 < crop_w <= width:
            return _place(height, width, crop_h, crop_w, rng)
    return 0, 0, height, width


def draw_tensorflow(
    height: int, width: int, area: Range, aspect: Range, rng: np.random.Generator
) -> Part:
    """Draws as `tf.image.sample_distorted_bounding_box` does without boxes.

    The aspect is uniform, and given that the height is, between those of the least and of the
    greatest area that fit into the image: parts are smaller than with a uniform area. Neither the
    last row nor the last column is part of a smaller part. The whole image is the fallback after a
    hundred tries.
    """
    least, greatest = (percent / 100 * height * width for percent in area)
    for _ in range(_TENSORFLOW_TRIES):
        ratio = _between(*aspect, rng)
        tallest = round(math.sqrt(greatest / ratio))
        if round(tallest * ratio) > width:
            tallest = int((width + 0.5 - 1e-7) / ratio)
            tallest -= round(tallest * ratio) > width
        tallest = min(tallest, height)
        crop_h = min(round(math.sqrt(least / ratio)), tallest)
        if crop_h < tallest:
            crop_h += int(rng.integers(tallest - crop_h + 1))
        # Rounding may have put the area out of its range.
        crop_h += crop_h * round(crop_h * ratio) < least
        crop_h -= crop_h * round(crop_h * ratio) > greatest
        crop_w = round(crop_h * ratio)
        fits = 0 < crop_h <= height and 0 < crop_w <= width
        if fits and least <= crop_h * crop_w <= greatest:
            top = int(rng.integers(height - crop_h)) if crop_h < height else 0
            left = int(rng.integers(width - crop_w)) if crop_w < width else 0
            return top, left, crop_h, crop_w
    return 0, 0, height, width


def draw_torchvision(
    height: int, width: int, area: Range, aspect: Range, rng: np.random.Generator
) -> Part:
    """Draws as `RandomResizedCrop` of torchvision and timm does.

    The area is uniform and the aspect uniform in its logarithm, ten times at most; where no part
    fits, it is the largest central one whose aspect is in the range.
    """
    for _ in range(_TRIES):
        percent, ratio = _between(*area, rng), _log_uniform(*aspect, rng)
        crop_h, crop_w = _sides(height * width * percent / 100, ratio)
        if 0 < crop_h <= height and 0 < crop_w <= width:
            return _place(height, width, crop_h, crop_w, rng)
    crop_h, crop_w = height, width
    if width / height < aspect[0]:
        crop_h = min(height, max(1, round(width / aspect[0])))
    elif width / height > aspect[1]:
        crop_w = min(width, max(1, round(height * aspect[1])))
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def draw_byol(
    height: int, width: int, area: Range, aspect: Range, rng: np.random.Generator
) -> Part:
    """Draws as BYOL and the linear probes of MAE do.

    As `draw_torchvision`, but the first part is taken, and cut off where it is larger than the
    image.
    """
    percent, ratio = _between(*area, rng), _log_uniform(*aspect, rng)
    crop_h, crop_w = _sides(height * width * percent / 100, ratio)
    return _place(height, width, min(max(1, crop_h), height), min(max(1, crop_w), width), rng)


DRAWS: dict[Variant, Callable[[int, int, Range, Range, np.random.Generator], Part]] = {
    "uniform": draw_uniform,
    "tensorflow": draw_tensorflow,
    "torchvision": draw_torchvision,
    "byol": draw_byol,
}
# The greatest aspect by default; TensorFlow's has two decimals.
ASPECT_MAX: dict[Variant, float] = {**dict.fromkeys(DRAWS, 4 / 3), "tensorflow": 1.33}


def _between(low: float, high: float, rng: np.random.Generator) -> float:
    # The same number as from `rng.uniform`, several times as fast.
    return low + (high - low) * rng.random()


def _log_uniform(low: float, high: float, rng: np.random.Generator) -> float:
    return math.exp(_between(math.log(low), math.log(high), rng))


def _sides(area: float, ratio: float) -> tuple[int, int]:
    return round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))


def _place(height: int, width: int, crop_h: int, crop_w: int, rng: np.random.Generator) -> Part:
    top = int(rng.integers(height - crop_h + 1))
    left = int(rng.integers(width - crop_w + 1))
    return top, left, crop_h, crop_w
