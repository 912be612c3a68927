# SPDX-License-Identifier: Apache-2.0
"""Scenes of any size that are drawn by rule: digits on backgrounds, and the class of each pixel."""

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
    corners = rng.randint(0, _DARK + 1, (2, 2, 3)).astype(np.float32)
    scene = cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)
    label_map = np.zeros((height, width), np.uint8)
    most = max(height, width) // min(height, width)  # a digit for each square
    for digit, label in zip(digits[:most], labels[:most], strict=True):
        place = _find_place(label_map, rng)
        color = rng.randint(_BRIGHT, 256, 3).astype(np.float32)
        if place is None:
            continue
        top, left, side = place
        ink = cv2.resize(digit.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
        ink = np.clip(ink / 255, 0, 1)
        part = np.s_[top : top + side, left : left + side]
        scene[part] += ink[..., None] * (color - scene[part])
        label_map[part][ink >= 0.5] = 1 + label
    scene += rng.normal(0, _NOISE, scene.shape)
    return np.clip(np.rint(scene), 0, 255).astype(np.uint8), label_map


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
