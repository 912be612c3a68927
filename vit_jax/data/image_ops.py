# SPDX-License-Identifier: Apache-2.0
"""Operations on one example on the host, in numpy and OpenCV (which releases the GIL).

An operation is a frozen dataclass that maps a features dict to another. Its fields are its
arguments in a preprocessing string. `Random` ones also take a generator that depends on nothing
but the seed and the example's position. Images stay uint8: the device makes floats of them.
"""

import abc
import dataclasses
import math
from typing import Any

import cv2
import numpy as np

from vit_jax.utils.errors import UserError

Features = dict[str, Any]


class Transform(abc.ABC):
    """Features to features, the same each time."""

    @abc.abstractmethod
    def __call__(self, features: Features) -> Features: ...


class Random(abc.ABC):
    """Features to features, with random choices."""

    @abc.abstractmethod
    def __call__(self, features: Features, rng: np.random.Generator) -> Features: ...


def decode_image(encoded: bytes) -> np.ndarray:
    """JPEG, PNG, ... bytes to uint8 `[height, width, 3]` in RGB.

    Raises:
      ValueError: the bytes are no image that OpenCV can read.
    """
    try:
        # EXIF orientation is left alone, as it was for the published weights.
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise ValueError(f"{len(encoded)} bytes that are no readable image")
    return image


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, half-pixel centres, no antialiasing: as the published models were trained."""
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


@dataclasses.dataclass(frozen=True)
class Decode(Transform):
    """Encoded bytes to uint8 RGB."""

    def __call__(self, features: Features) -> Features:
        return features | {"image": decode_image(features["image"])}


@dataclasses.dataclass(frozen=True)
class Resize(Transform):
    """To `height` x `width` (a square if one is given); the aspect is not kept."""

    height: int
    width: int | None = None

    def __call__(self, features: Features) -> Features:
        width = self.width or self.height
        return features | {"image": resize_image(features["image"], self.height, width)}


@dataclasses.dataclass(frozen=True)
class ResizeSmall(Transform):
    """The shorter side to `size`, the aspect kept."""

    size: int

    def __call__(self, features: Features) -> Features:
        image = features["image"]
        scale = self.size / min(image.shape[:2])
        height, width = (max(self.size, round(side * scale)) for side in image.shape[:2])
        return features | {"image": resize_image(image, height, width)}


@dataclasses.dataclass(frozen=True)
class CentralCrop(Transform):
    """The middle `size` x `size` pixels of an image that has as many."""

    size: int

    def __call__(self, features: Features) -> Features:
        image = features["image"]
        height, width = image.shape[:2]
        if min(height, width) < self.size:
            raise UserError(
                f"central_crop({self.size}) of a {height}x{width} image: put resize_small before it"
            )
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return features | {"image": image[top : top + self.size, left : left + self.size]}


@dataclasses.dataclass(frozen=True)
class InceptionCrop(Random):
    """A random part of the image, resized to `size` x `size` (arXiv:1409.4842).

    The part has `area_min` to `area_max` percent of the area and an aspect of 3/4 to 4/3; where
    ten draws find none, the whole image is taken.
    """

    size: int
    area_min: float = 5
    area_max: float = 100

    def __post_init__(self) -> None:
        if not 0 < self.area_min <= self.area_max <= 100:
            raise ValueError(
                f"area_min={self.area_min}, area_max={self.area_max}: expected "
                "0 < area_min <= area_max <= 100"
            )

    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        image = features["image"]
        height, width = image.shape[:2]
        top, left, h, w = 0, 0, height, width
        for _ in range(10):
            area = height * width * rng.uniform(self.area_min, self.area_max) / 100
            aspect = rng.uniform(3 / 4, 4 / 3)
            crop_h, crop_w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < crop_h <= height and 0 < crop_w <= width:
                h, w = crop_h, crop_w
                top = int(rng.integers(height - h + 1))
                left = int(rng.integers(width - w + 1))
                break
        crop = image[top : top + h, left : left + w]
        return features | {"image": resize_image(crop, self.size, self.size)}


@dataclasses.dataclass(frozen=True)
class FlipLr(Random):
    """Mirrors left and right in half of the cases."""

    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        flip = rng.random() < 0.5
        return features | {"image": features["image"][:, ::-1] if flip else features["image"]}


@dataclasses.dataclass(frozen=True)
class RandomShift(Random):
    """Moves the image by up to `pixels` each way; the border is filled with the edge's colour."""

    pixels: int

    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        image, p = features["image"], self.pixels
        height, width = image.shape[:2]
        top, left = rng.integers(2 * p + 1, size=2)
        padded = cv2.copyMakeBorder(image, p, p, p, p, cv2.BORDER_REPLICATE)
        return features | {"image": padded[top : top + height, left : left + width]}


OPS: dict[str, type] = {
    "decode": Decode,
    "resize": Resize,
    "resize_small": ResizeSmall,
    "central_crop": CentralCrop,
    "inception_crop": InceptionCrop,
    "flip_lr": FlipLr,
    "random_shift": RandomShift,
}
