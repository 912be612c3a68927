# SPDX-License-Identifier: Apache-2.0
"""Small image files for tests of data sources."""

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np


def encode(value: int, ending: str = ".png", size: int = 8) -> bytes:
    """An image of one grey, by which it is known again (and so is its class, if they are few)."""
    return cv2.imencode(ending, np.full((size, size, 3), value, np.uint8))[1].tobytes()


def write_folder(root: Path, counts: Mapping[str, int], *, start: int = 0) -> Path:
    """Images `root/FOLDER/N.png`, each of a grey of its own if they are few: `start` and up."""
    value = start
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / folder / f"{number:03}.png").write_bytes(encode(value % 256))
            value += 1
    return root
