# SPDX-License-Identifier: Apache-2.0
"""Corruptions of images, to see how far a model can be trusted on worse ones.

The kinds and their five severities are those of ImageNet-C (Hendrycks and Dietterich,
arXiv:1903.12261), which are defined on images of 224 x 224 pixels. Lengths in pixels scale with the
shorter side, and patterns are drawn at that size, so that smaller and larger images are corrupted
alike. The draws and interpolations
are ours, so results are close to those on the published files, and not equal to them. `frost` is
left out, since it blends photographs of frost into the image.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from vit_jax.data.ops.transforms import Op, Random

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 224  # pixels, of the images of ImageNet-C
_POINTS = 9  # a side, within a pixel; odd, so that one of them is its centre
_LONGEST = 4096  # pixels, of patterns that are drawn at that scale

# Each takes an image, float64 `[height, width, 3]` from 0 to 1, the severity's row, the scale of
# lengths, and a generator. It returns an image of the same range, which may leave it.
_Rng = np.random.Generator


def _gaussian_noise(x: np.ndarray, std: float, scale: float, rng: _Rng) -> np.ndarray:
    return x + rng.normal(0, std, x.shape)


def _shot_noise(x: np.ndarray, photons: float, scale: float, rng: _Rng) -> np.ndarray:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, share: float, scale: float, rng: _Rng) -> np.ndarray:
    drawn = rng.random(x.shape)
    return np.where(drawn < share / 2, 0.0, np.where(drawn < share, 1.0, x))


def _defocus_blur(x: np.ndarray, row: tuple[float, float], scale: float, rng: _Rng) -> np.ndarray:
    radius, smooth = row[0] * scale, row[1] * min(scale, 1)
    half = max(math.ceil(radius), 1) + 2
    # Shifts of the image by all points of a disk are averaged, with linear interpolation. As
    # published, these are whole pixels; a disk of a smaller image would have too few.
    points = _POINTS if scale < 1 else 1
    axis = (np.arange(points * (2 * half + 1)) + 0.5) / points - half - 0.5
    inside = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float64)
    share = np.maximum(1 - np.abs(axis - np.arange(-half, half + 1)[:, None]), 0)
    disk = share @ inside @ share.T
    disk = cv2.GaussianBlur(disk / disk.sum(), (3, 3) if row[0] <= 8 else (5, 5), smooth)
    return cv2.filter2D(x, -1, disk, borderType=cv2.BORDER_REFLECT_101)


def _glass_blur(x: np.ndarray, row: tuple[float, int, int], scale: float, rng: _Rng) -> np.ndarray:
    sigma, (reach, rounds) = row[0] * scale, row[1:]
    height, width = x.shape[:2]
    x = _smooth(x, sigma)
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, size=(2, height, width)) * scale
        x = _displace(x, down, right, cv2.BORDER_REPLICATE)
    return _smooth(x, sigma)


def _motion_blur(x: np.ndarray, row: tuple[float, float], scale: float, rng: _Rng) -> np.ndarray:
    return _move(x, row[0] * scale, row[1] * scale, rng.uniform(-45, 45))


def _zoom_blur(x: np.ndarray, row: tuple[float, float], scale: float, rng: _Rng) -> np.ndarray:
    factors = np.arange(1, row[0], row[1])
    return (x + sum(_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(x: np.ndarray, row: tuple[float, ...], scale: float, rng: _Rng) -> np.ndarray:
    mean, std, zoom, least, radius, sigma, keep = row
    layer = _zoom(rng.normal(mean, std, _full_size(x, scale))[..., None], zoom)
    layer = np.clip(np.where(layer < least, 0, layer), 0, 1)
    layer = _move(layer, radius, sigma, rng.uniform(-135, -45))
    layer = _fit(layer, x)[..., None]
    gray = (x @ [0.299, 0.587, 0.114])[..., None]
    whiter = np.maximum(x, gray * 1.5 + 0.5)
    return keep * x + (1 - keep) * whiter + layer + layer[::-1, ::-1]


def _fog(x: np.ndarray, row: tuple[float, float], scale: float, rng: _Rng) -> np.ndarray:
    height, width = x.shape[:2]
    size = 2 ** math.ceil(math.log2(max(height, width, 2)))
    most = max(float(x.max()), 1 / 255)
    cloud = _plasma(size, row[1], rng)[:height, :width, None]
    return (x + row[0] * cloud) * most / (most + row[0])


def _brightness(x: np.ndarray, shift: float, scale: float, rng: _Rng) -> np.ndarray:
    # The value of HSV is the largest channel; hue and saturation stay if all channels scale alike.
    value = x.max(axis=-1, keepdims=True)
    brighter = np.clip(value + shift, 0, 1)
    return np.where(value > 0, x / np.maximum(value, 1e-12) * brighter, brighter)


def _contrast(x: np.ndarray, factor: float, scale: float, rng: _Rng) -> np.ndarray:
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * factor + mean


def _elastic_transform(
    x: np.ndarray, row: tuple[float, float, float], scale: float, rng: _Rng
) -> np.ndarray:
    height, width = x.shape[:2]
    alpha, sigma, jitter = row[0] * scale, row[1], row[2] * scale
    # Smooth fields of small images are drawn on fewer points, where the average of noise over the
    # same area is larger by that factor.
    points = min(max(scale, 2 / sigma), 1)
    center, third = np.array([width, height]) / 2, min(height, width) / 3
    corners = np.array([[1, 1], [1, -1], [-1, -1]]) * third + center
    moved = corners + rng.uniform(-jitter, jitter, corners.shape)
    affine = cv2.getAffineTransform(corners.astype(np.float32), moved.astype(np.float32))
    x = cv2.warpAffine(x, affine, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    size = _full_size(x, scale / points)
    noise = (_smooth(rng.uniform(-1, 1, size), sigma * points) for _ in range(2))
    dx, dy = (alpha * points * _fit(field, x) for field in noise)
    return _displace(x, dy, dx, cv2.BORDER_REFLECT)


def _pixelate(x: np.ndarray, factor: float, scale: float, rng: _Rng) -> np.ndarray:
    height, width = x.shape[:2]
    small = (max(int(width * factor), 1), max(int(height * factor), 1))
    picture = Image.fromarray(_to_uint8(x)).resize(small, Image.Resampling.BOX)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX)) / 255


def _jpeg_compression(x: np.ndarray, quality: int, scale: float, rng: _Rng) -> np.ndarray:
    pixels = np.ascontiguousarray(_to_uint8(x)[..., ::-1])
    _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert decoded is not None  # It was encoded here.
    return decoded[..., ::-1] / 255


def _full_size(x: np.ndarray, scale: float) -> tuple[int, int]:
    """The height and width of an image at the scale of ImageNet-C, on which patterns are drawn."""
    height, width = (min(max(round(side / scale), 1), _LONGEST) for side in x.shape[:2])
    return height, width


def _fit(pattern: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Resizes a pattern, float64 `[rows, columns]`, to the height and width of an image."""
    height, width = x.shape[:2]
    if pattern.shape == (height, width):
        return pattern
    method = cv2.INTER_AREA if pattern.shape[0] > height else cv2.INTER_LINEAR
    return cv2.resize(pattern, (width, height), interpolation=method)


def _displace(x: np.ndarray, down: np.ndarray, right: np.ndarray, border: int) -> np.ndarray:
    """Takes each pixel from elsewhere; distances are in pixels, float64 `[height, width]`."""
    rows, columns = np.mgrid[: x.shape[0], : x.shape[1]]
    where = ((columns + right).astype(np.float32), (rows + down).astype(np.float32))
    return cv2.remap(x, *where, cv2.INTER_LINEAR, borderMode=border)


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    if sigma < 0.05:  # The kernel is one pixel.
        return x
    side = 2 * math.ceil(3 * sigma) + 1
    return cv2.GaussianBlur(x, (side, side), sigma, borderType=cv2.BORDER_REFLECT)


def _move(x: np.ndarray, radius: float, sigma: float, angle: float) -> np.ndarray:
    """Averages pixels along a line that starts at each, with the weights of half a Gaussian."""
    reach = max(round(2 * radius), 1)
    steps = np.arange(reach + 1)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    turn = math.radians(angle)
    rows = reach + np.rint(steps * math.sin(turn)).astype(int)
    columns = reach + np.rint(steps * math.cos(turn)).astype(int)
    np.add.at(kernel, (rows, columns), np.exp(-(steps**2) / (2 * max(sigma, 0.05) ** 2)))
    return cv2.filter2D(x, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


def _zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """Enlarges the centre of an image to its size, `[height, width, channels]`."""
    height, width, channels = x.shape
    h, w = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - h) // 2, (width - w) // 2
    part = np.ascontiguousarray(x[top : top + h, left : left + w])
    zoomed = cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR)
    return zoomed.reshape(height, width, channels)


def _plasma(size: int, decay: float, rng: _Rng) -> np.ndarray:
    """A cloud from 0 to 1, float64 `[size, size]`, by the diamond-square algorithm."""
    cloud, step, noise = np.zeros((size, size)), size, 100.0

    def average(*corners: np.ndarray) -> np.ndarray:
        mean = np.mean(corners, axis=0)
        return mean + noise * rng.uniform(-noise, noise, mean.shape)

    while step >= 2:
        half = step // 2
        corners = cloud[::step, ::step]
        right = np.roll(corners, -1, 1)
        cloud[half::step, half::step] = average(
            corners, right, np.roll(corners, -1, 0), np.roll(right, -1, 0)
        )
        middles = cloud[half::step, half::step]
        cloud[::step, half::step] = average(corners, right, middles, np.roll(middles, 1, 0))
        below = np.roll(corners, -1, 0)
        cloud[half::step, ::step] = average(corners, below, middles, np.roll(middles, 1, 1))
        step, noise = half, noise / decay
    cloud -= cloud.min()
    return cloud / max(cloud.max(), 1e-12)


def _to_uint8(x: np.ndarray) -> np.ndarray:
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


# By name, a function and what it is given at each severity, as published.
_KINDS: dict[str, tuple[Callable[..., np.ndarray], tuple]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (
        _glass_blur,
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (
        _zoom_blur,
        ((1.105, 0.01), (1.155, 0.01), (1.205, 0.02), (1.255, 0.02), (1.305, 0.03)),
    ),
    "snow": (
        _snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "fog": (_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (
        _elastic_transform,
        (
            (488, 170.8, 24.4),
            (488, 19.52, 48.8),
            (12.2, 2.44, 4.88),
            (17.08, 2.44, 4.88),
            (29.28, 2.44, 4.88),
        ),
    ),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg_compression, (25, 18, 15, 10, 7)),
}
KINDS = tuple(_KINDS)


@dataclasses.dataclass(frozen=True)
class Corrupt(Random):
    """Corrupts an image by a `kind` of ImageNet-C at a `severity` of 1 to 5.

    The draws depend on the seed, the position, the kind and the severity, so that the same image is
    corrupted in the same way in any run, on any number of hosts.
    """

    kind: str
    severity: int = 3

    def __post_init__(self) -> None:
        if self.kind == "frost":
            raise ValueError(
                "kind='frost': it blends photographs of frost into images, which are not part of "
                f"this package: expected one of {', '.join(KINDS)}"
            )
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity={self.severity}: expected a whole number from 1 to 5")

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        own = (int(rng.integers(2**62)), zlib.crc32(self.kind.encode()), self.severity)
        corrupt, rows = _KINDS[self.kind]
        scale = min(image.shape[:2]) / _SIDE
        x = image[..., :3].astype(np.float64) / 255
        x = corrupt(x, rows[self.severity - 1], scale, np.random.default_rng(own))
        return _to_uint8(x)


OPS: dict[str, type[Op]] = {"corrupt": Corrupt}
