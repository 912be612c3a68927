# SPDX-License-Identifier: Apache-2.0
"""Colours of the classes and of the depths of pixels."""

import numpy as np

# The value of pixels without a class.
_IGNORED = 255
# Colours of depths from the nearest to the farthest, evenly spaced; their lightness falls.
_DEPTHS = np.array(
    [(255, 250, 200), (250, 190, 90), (225, 105, 75), (150, 45, 120), (70, 20, 110), (10, 5, 35)]
)


def make_palette() -> np.ndarray:
    """A colour for each value of a map of classes, uint8 `[256, 3]`.

    The bits of a number are dealt to the three channels from the highest bit on, so that numbers
    that are near have colours that are far apart: the palette of Pascal VOC. 255 is white.
    """
    numbers = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = (numbers >> (3 * place + channel)) & 1
            palette[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    palette[_IGNORED] = 255
    return palette


def color_classes(classes: np.ndarray) -> np.ndarray:
    """The colours of a map of classes, uint8 `[h, w]`, as uint8 `[h, w, 3]`."""
    return make_palette()[classes]


def color_depth(depth: np.ndarray, nearest: float, farthest: float) -> np.ndarray:
    """The colours of depths, float32 `[h, w]`, as uint8 `[h, w, 3]`: light ones are near.

    `nearest` and `farthest` are the limits of the colours. Depths that are not known, which are 0,
    are black.
    """
    places = np.linspace(nearest, max(farthest, nearest + 1e-6), len(_DEPTHS))
    channels = [np.interp(depth, places, _DEPTHS[:, i]) for i in range(3)]
    colors = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    colors[depth <= 0] = 0
    return colors
