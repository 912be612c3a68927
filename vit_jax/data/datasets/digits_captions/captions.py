# SPDX-License-Identifier: Apache-2.0
"""Places and captions of the digits, by rule."""

import numpy as np

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CANVAS = 12  # pixels of a side
_SHIFT = 2  # pixels
# All places: 0 to 2 from the top, and from the left.
PLACES = np.stack(np.divmod(np.arange(9), 3), axis=1)
_WAYS = ("up", "", "down"), ("left", "", "right")
_PARTS = ("top", "", "bottom"), ("left", "", "right")


def find_places(labels: np.ndarray) -> np.ndarray:
    """The place of each digit, int64 `[n, 2]`, see `PLACES`.

    The digits of each class take the nine places in turn, in the order of the table. Labels are
    int `[n]`.
    """
    turns = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        turns[rows] = np.arange(len(rows))
    return PLACES[turns % len(PLACES)]


def draw(image: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Places an image, uint8 `[8, 8]`, on a black canvas, uint8 `[12, 12]`."""
    top, left = _SHIFT * place
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def describe(label: int, place: np.ndarray) -> tuple[str, ...]:
    """The captions of a digit at a place."""
    way = " and ".join(w[i] for w, i in zip(_WAYS, place, strict=True) if w[i])
    part = " ".join(w[i] for w, i in zip(_PARTS, place, strict=True) if w[i])
    name = NAMES[label]
    return (
        f"a photo of the digit {name}, {f'shifted {way}' if way else 'in the middle'}",
        f"the number {name}, {f'moved {way}' if way else 'centred'}",
        f"a handwritten {name} {f'at the {part}' if part else 'in the middle'}",
    )
