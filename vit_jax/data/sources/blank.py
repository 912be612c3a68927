# SPDX-License-Identifier: Apache-2.0
"""Black images, `blank:CLASSES` or `blank:CLASSES,SIZE`, to plan a run without its data."""

import dataclasses
import re

import cv2
import numpy as np

from vit_jax.data.sources.base import Dataset, DatasetInfo, Records
from vit_jax.utils.errors import UserError

_EXAMPLES = 1024


@dataclasses.dataclass(frozen=True)
class _Black(Records):
    size: int

    def read(self, row: int) -> bytes:
        black = np.zeros((self.size, self.size, 3), np.uint8)
        return cv2.imencode(".png", black)[1].tobytes()

    def describe(self, row: int) -> str:
        return f"blank[{row}]"


def blank_dataset(text: str) -> Dataset:
    """1,024 black images, all in the split `train`; labels cycle from 0 to CLASSES - 1.

    `text` is `CLASSES`, for images without a known size, or `CLASSES,SIZE` with their side in
    pixels; anything else raises `UserError`.
    """
    match = re.fullmatch(r"([1-9]\d*)(?:,([1-9]\d*))?", text)
    if not match:
        raise UserError(f"data.name='blank:{text}': expected blank:CLASSES or blank:CLASSES,SIZE")
    classes, size = int(match[1]), int(match[2] or 0)
    return Dataset(
        name=f"blank:{text}",
        info=DatasetInfo(classes, (size or None, size or None, 3), captions=True),
        records=_Black(size or 256),
        labels=np.arange(_EXAMPLES, dtype=np.int32) % classes,
        splits={"train": np.arange(_EXAMPLES)},
        captions=[("a blank image",)] * _EXAMPLES,
    )
