# SPDX-License-Identifier: Apache-2.0
"""Images of any size as columns of patches, within a budget of tokens.

A column is an image too, uint8 `[(1 + budget) * size, size, 3]`, so it goes through loaders and
batches as any other: the patches row by row, then zeros, behind one patch whose first bytes are the
number of rows and columns. Source: NaFlex of SigLIP 2, arXiv:2502.14786, section 2.4.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from vit_jax.data.ops import crops
from vit_jax.data.ops.geometry import Method, resize_image
from vit_jax.data.ops.transforms import InceptionCrop, Op, Random, Transform

# Limits of the factor on the sides of an image, and how exactly it is found, as published.
_LEAST, _MOST, _WIDTH = 5e-7, 100.0, 1e-5
_MOST_SIDE = 2**16 - 1


def fit_budget(height: int, width: int, *, size: int, budget: int) -> tuple[int, int]:
    """Returns the rows and columns of patches of an image, at most `budget` in all.

    The image is scaled as much as the budget allows, up or down; each side is rounded up to whole
    patches, so the aspect is kept up to a patch.

    Args:
      height: of the image in pixels.
      width: of the image in pixels.
      size: of a patch in pixels.
      budget: number of patches, at least 1.
    """

    def scale(side: int, factor: float) -> int:
        return max(math.ceil(side * factor / size), 1)

    low, high = _LEAST, _MOST
    while high - low >= _WIDTH:
        middle = (low + high) / 2
        if scale(height, middle) * scale(width, middle) <= budget:
            low = middle
        else:
            high = middle
    return scale(height, low), scale(width, low)


def to_column(image: np.ndarray, *, size: int, budget: int) -> np.ndarray:
    """Cuts an image into patches.

    Takes uint8 `[rows * size, columns * size, 3]` of at most `budget` patches, and returns uint8
    `[(1 + budget) * size, size, 3]`.
    """
    rows, columns = image.shape[0] // size, image.shape[1] // size
    column = np.zeros((1 + budget, size, size, 3), np.uint8)
    column[0].reshape(-1)[:4] = np.array([rows, columns], "<u2").view(np.uint8)
    patches = image.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    column[1 : 1 + rows * columns] = patches.reshape(-1, size, size, 3)
    return column.reshape(-1, size, 3)


def read_column(column: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Takes a column of patches apart.

    Takes uint8 `[(1 + budget) * size, size, 3]`, and returns the patches of its image, uint8
    `[rows * columns, size, size, 3]`, with (rows, columns).
    """
    size = column.shape[1]
    rows, columns = np.ascontiguousarray(column[:size]).reshape(-1)[:4].view("<u2").tolist()
    return column[size:].reshape(-1, size, size, 3)[: rows * columns], (rows, columns)


def to_images(columns: np.ndarray) -> np.ndarray:
    """Puts patches together again, to be looked at.

    Takes uint8 `[batch, (1 + budget) * size, size, 3]`, and returns images that are padded with
    zeros on the right and below, uint8 `[batch, height, width, 3]`.
    """
    count, _, size, channels = columns.shape
    patches = columns.reshape(count, -1, size, size, channels)
    heads = np.ascontiguousarray(patches[:, 0].reshape(count, -1)[:, :4])
    grids = heads.view("<u2").astype(int).clip(1)
    height, width = grids.max(axis=0) * size
    images = np.zeros((count, height, width, channels), columns.dtype)
    for image, (rows, columns_), own in zip(images, grids, patches, strict=True):
        cut = own[1 : 1 + rows * columns_].reshape(rows, columns_, size, size, channels)
        image[: rows * size, : columns_ * size] = cut.swapaxes(1, 2).reshape(
            rows * size, columns_ * size, channels
        )
    return images


def find_patches(ops: tuple[Op, ...]) -> "Patches | InceptionPatches | None":
    """The operation of a line that makes columns of patches, which is its last; None without."""
    last = ops[-1] if ops else None
    return last if isinstance(last, Patches | InceptionPatches) else None


def _check(op: Any) -> None:
    if op.size < 2:
        raise ValueError(f"size={op.size}: expected patches of at least 2 pixels")
    if op.budget > _MOST_SIDE:
        raise ValueError(f"budget={op.budget}: expected {_MOST_SIDE:,} patches at most")


def _resize(image: np.ndarray, size: int, budget: int, method: Method) -> np.ndarray:
    rows, columns = fit_budget(*image.shape[:2], size=size, budget=budget)
    resized = resize_image(image, rows * size, columns * size, method)
    return to_column(resized, size=size, budget=budget)


@dataclasses.dataclass(frozen=True)
class Patches(Transform):
    """Resizes an image to at most `budget` patches of `size` pixels, and cuts it into these."""

    size: int
    budget: int
    method: Method = "bilinear_antialias"

    def __post_init__(self) -> None:
        _check(self)

    def change(self, image: np.ndarray) -> np.ndarray:
        return _resize(image, self.size, self.budget, self.method)


@dataclasses.dataclass(frozen=True)
class InceptionPatches(Random):
    """Resizes a random part of an image as `Patches` does; the part is that of `InceptionCrop`."""

    size: int
    budget: int
    area_min: float = 5
    area_max: float = 100
    aspect_min: float = 3 / 4
    aspect_max: float | None = None
    method: Method = "bilinear_antialias"
    variant: crops.Variant = "uniform"

    def __post_init__(self) -> None:
        _check(self)
        _ = self._crop

    @property
    def _crop(self) -> InceptionCrop:
        return InceptionCrop(
            size=self.size,
            area_min=self.area_min,
            area_max=self.area_max,
            aspect_min=self.aspect_min,
            aspect_max=self.aspect_max,
            variant=self.variant,
        )

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left, height, width = self._crop.draw(image.shape[0], image.shape[1], rng)
        part = image[top : top + height, left : left + width]
        return _resize(part, self.size, self.budget, self.method)


OPS: dict[str, type[Op]] = {"patches": Patches, "inception_patches": InceptionPatches}
