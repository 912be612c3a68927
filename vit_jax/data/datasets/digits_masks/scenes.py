# SPDX-License-Identifier: Apache-2.0
"""Scenes of any size that are drawn by rule: digits on backgrounds, with labels of pixels."""

import cv2
import numpy as np

CLASSES = (
    "background",
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)
# The side of a digit, and the distance of the places where it may be, as shares of the shorter side
# of the scene.
_SIDE, _STEP = 2 / 3, 1 / 6
# The brightest background, the darkest digit, and the deviation of the noise.
_DARK, _BRIGHT, _NOISE = 60, 190, 4.0
_TRIES = 10
# Metres from the camera: of the background in the first and in the last row, and of digits. A digit
# at one metre has this share of the shorter side, and its brightness falls to a share with depth.
_FAR, _NEAR = (6.0, 4.0), (1.0, 3.0)
_SIDE_AT_1_M, _LEAST_LIGHT = 0.9, 0.5


def draw_scene(
    digits: np.ndarray, labels: np.ndarray, *, height: int, width: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene with the first of some digits, and with more of them as its size allows.

    Args:
      digits: uint8 `[n, 8, 8]`, of values 0 to 255.
      labels: of the digits, integers `[n]`.
      height: of the scene in pixels.
      width: of the scene in pixels.
      seed: of all choices.

    Returns:
      The scene, uint8 `[height, width, 3]`, and its label map, uint8 `[height, width]`: 0 for the
      background, and 1 plus the label where a digit is.
    """
    # RandomState and not default_rng: NumPy promises that its stream never changes.
    rng = np.random.RandomState(seed)
    scene = _draw_background(height, width, rng)
    label_map = np.zeros((height, width), np.uint8)
    most = max(height, width) // min(height, width)  # a digit for each square
    for digit, label in zip(digits[:most], labels[:most], strict=True):
        place = _find_place(label_map, rng)
        color = rng.randint(_BRIGHT, 256, 3).astype(np.float32)
        if place is None:
            continue
        part, inside = _paste(scene, digit, color, *place)
        label_map[part][inside] = 1 + label
    return _finish(scene, rng), label_map


def draw_depth_scene(
    digits: np.ndarray, *, height: int, width: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene in which digits are the smaller and the darker, the farther they are.

    Nearer digits hide farther ones, and all of them a floor. The arguments are those of
    `draw_scene`; a scene has a digit for each square, and at least two.

    Returns:
      The scene, uint8 `[height, width, 3]`, and the depth of each pixel in metres, float32
      `[height, width]`.
    """
    rng = np.random.RandomState(seed)
    scene = _draw_background(height, width, rng)
    depth = np.repeat(np.linspace(*_FAR, height, dtype=np.float32)[:, None], width, axis=1)
    short = min(height, width)
    digits = digits[: max(2, max(height, width) // short)]
    for distance, digit in zip(-np.sort(-rng.uniform(*_NEAR, len(digits))), digits, strict=True):
        side = round(short * _SIDE_AT_1_M / distance)
        top, left = (rng.randint(length - side + 1) for length in (height, width))
        light = 1 - (1 - _LEAST_LIGHT) * (distance - _NEAR[0]) / (_NEAR[1] - _NEAR[0])
        color = light * rng.randint(_BRIGHT, 256, 3).astype(np.float32)
        part, inside = _paste(scene, digit, color, top, left, side)
        depth[part][inside] = distance
    return _finish(scene, rng), depth


def _draw_background(height: int, width: int, rng: np.random.RandomState) -> np.ndarray:
    corners = rng.randint(0, _DARK + 1, (2, 2, 3)).astype(np.float32)
    return cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)


def _paste(
    scene: np.ndarray, digit: np.ndarray, color: np.ndarray, top: int, left: int, side: int
) -> tuple[tuple[slice, slice], np.ndarray]:
    """Draws a digit; returns the square where it is, and which of its pixels it covers."""
    ink = cv2.resize(digit.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    ink = np.clip(ink / 255, 0, 1)
    part = np.s_[top : top + side, left : left + side]
    scene[part] += ink[..., None] * (color - scene[part])
    return part, ink >= 0.5


def _finish(scene: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    scene += rng.normal(0, _NOISE, scene.shape)
    return np.clip(np.rint(scene), 0, 255).astype(np.uint8)


def _find_place(label_map: np.ndarray, rng: np.random.RandomState) -> tuple[int, int, int] | None:
    """Top, left and side of a square without a digit; None if none was found."""
    height, width = label_map.shape
    short = min(height, width)
    side, step = round(short * _SIDE), short * _STEP
    for _ in range(_TRIES):
        top, left = (
            round(step * rng.randint(int((length - side) / step + 1e-6) + 1))
            for length in (height, width)
        )
        if not label_map[top : top + side, left : left + side].any():
            return top, left, side
    return None
