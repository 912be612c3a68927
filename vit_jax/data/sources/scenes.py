# SPDX-License-Identifier: Apache-2.0
"""Digits on backgrounds: `digits_masks:SIZE` with masks, `digits_depth:SIZE` with depths.

HEIGHTxWIDTH may take the place of SIZE.
"""

import dataclasses
import functools
import re

import numpy as np

from vit_jax.data.datasets.digits import table
from vit_jax.data.datasets.digits_masks.scenes import CLASSES, draw_depth_scene, draw_scene
from vit_jax.data.sources.base import Dataset, DatasetInfo, Records
from vit_jax.utils.errors import UserError

# The sides that are allowed: a digit has 8 pixels, and the images of a batch are in memory.
_LEAST, _MOST = 16, 4096
# Scenes of training that begin with the same digit.
_SCENES = 10
# Digits of a scene at most.
_DIGITS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class _Scenes(Records):
    """Scenes, each of which begins with a digit of its own and has others of the same split.

    Attributes:
      name: of the dataset.
      height: in pixels.
      width: in pixels.
      digits: uint8 `[rows of the table, 8, 8]`, 0 to 255.
      labels: of the digits.
      first: the digit that each scene begins with.
      others: by scene, the rows of the table that other digits are from.
      depth: whether label maps are of depths.
    """

    name: str
    height: int
    width: int
    digits: np.ndarray
    labels: np.ndarray
    first: np.ndarray
    others: list[np.ndarray]
    depth: bool

    def read(self, row: int) -> np.ndarray:
        return _draw(self, row)[0]

    def __getitem__(self, row: int) -> np.ndarray:
        return _draw(self, row)[1]

    def describe(self, row: int) -> str:
        return f"{self.name}[{row}]"


# An image and its label map are read one after the other.
@functools.lru_cache(maxsize=256)
def _draw(scenes: _Scenes, row: int) -> tuple[np.ndarray, np.ndarray]:
    """The image of a row and its label map."""
    # RandomState and not default_rng: NumPy promises that its stream never changes.
    others = np.random.RandomState(row).choice(scenes.others[row], _DIGITS - 1)
    rows = np.append(scenes.first[row], others)
    size = {"height": scenes.height, "width": scenes.width}
    if scenes.depth:
        image, label_map = draw_depth_scene(scenes.digits[rows], **size, seed=row)
    else:
        image, label_map = draw_scene(scenes.digits[rows], scenes.labels[rows], **size, seed=row)
    image.flags.writeable = label_map.flags.writeable = False
    return image, label_map


@functools.cache
def scenes_dataset(text: str) -> Dataset:
    """Scenes of SIZE x SIZE or HEIGHTxWIDTH pixels, which are drawn when they are read.

    `test` has a scene for each digit of that split of `digits`; `validation` one for each tenth of
    the others, and `train` ten for each of those that are left. Raises `UserError` for a text that
    is no size, or a size out of range.
    """
    return _make_scenes("digits_masks", text)


@functools.cache
def depth_scenes_dataset(text: str) -> Dataset:
    """Scenes like those of `scenes_dataset`, with depths in place of masks."""
    return _make_scenes("digits_depth", text)


def _make_scenes(kind: str, text: str) -> Dataset:
    depth, name = kind == "digits_depth", f"{kind}:{text}"
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not _LEAST <= min(height, width) <= max(height, width) <= _MOST:
        raise UserError(
            f"data.name={name!r}: expected {kind}:SIZE or {kind}:HEIGHTxWIDTH, of "
            f"{_LEAST} to {_MOST} pixels"
        )
    images, labels = table.load_digits()
    train, test = table.split_indices(labels)
    held_out = np.arange(len(train)) % 10 == 9
    parts = {
        "train": np.repeat(train[~held_out], _SCENES),
        "validation": train[held_out],
        "test": test,
    }
    ends = np.cumsum([len(rows) for rows in parts.values()])
    splits = {
        split: np.arange(end - len(rows), end)
        for (split, rows), end in zip(parts.items(), ends, strict=True)
    }
    scenes = _Scenes(
        name,
        height,
        width,
        table.to_uint8_range(images),
        labels,
        np.concatenate(list(parts.values())),
        [rows for rows in parts.values() for _ in rows],
        depth,
    )
    classes = None if depth else CLASSES
    info = DatasetInfo(0, (height, width, 3), pixel_classes=classes, pixel_depth=depth)
    none = np.zeros(ends[-1], np.int32)
    return Dataset(name, info, scenes, none, splits, label_maps=scenes)
