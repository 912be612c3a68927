# SPDX-License-Identifier: Apache-2.0
"""Colours of the classes of pixels."""

import numpy as np

# The value of pixels without a class.
_IGNORED = 255


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
