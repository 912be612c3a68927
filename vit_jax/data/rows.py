# SPDX-License-Identifier: Apache-2.0
"""Several images in a row of patches, without a search for images that fit together.

Row r has the images of positions r * K to (r + 1) * K, whatever their sizes: each image is resized
to its share of the row's patches. The shares are drawn for the row, and what an image leaves of its
share, since its aspect is kept, is added to that of the next. So which images share a row is
arithmetic, every step has equally many images, and next to no patch is padding. Source: NaViT,
arXiv:2307.06304, sections 2 and 3.3, which draws sizes and dropped patches in the same way.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from vit_jax.data.ops.patches import read_column
from vit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How images share rows; the fields are keys of the section `data`.

    Attributes:
      images_per_row: how many share a row; 1 for one image a row, and nothing else of this.
      size_spread: the longest side of an image over the shortest, if all were squares. Sides are
        drawn uniformly between the two.
      drop_patches: the least and the largest share of the patches of an image that are left out;
        drawn uniformly for each image.
    """

    images_per_row: int = 1
    size_spread: float = 1.0
    drop_patches: tuple[float, ...] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.images_per_row < 1:
            raise UserError(f"data.images_per_row={self.images_per_row}: expected 1 or more")
        if not 1 <= self.size_spread < float("inf"):
            raise UserError(
                f"data.size_spread={self.size_spread}: expected 1 or more, the longest side of an "
                "image over the shortest"
            )
        rates = self.drop_patches
        if len(rates) != 2 or not 0 <= rates[0] <= rates[1] < 1:
            raise UserError(
                f"data.drop_patches={rates}: expected the least and the largest share that is left "
                "out, such as (0.0, 0.5)"
            )
        for key, value, off in (
            ("size_spread", self.size_spread, 1),
            ("drop_patches", tuple(rates), (0, 0)),
        ):
            if self.images_per_row == 1 and value != off:
                raise UserError(
                    f"data.{key}={value} with data.images_per_row=1: expected 2 or more images in "
                    "a row"
                )

    def check(self, tokens: int) -> None:
        """Raises `UserError` unless each image has a patch of a row of `tokens`."""
        sides = self._sides(np.arange(self.images_per_row), 0.0)
        least = self._areas(sides).min() / self._areas(sides).sum() * tokens
        if least < 1:
            raise UserError(
                f"data.images_per_row={self.images_per_row}, data.size_spread={self.size_spread}: "
                f"the smallest image would have {least:.2f} of the {tokens:,} patches of a row: "
                "expected fewer images, a smaller spread, or a larger BUDGET in data.preprocess"
            )

    def draw(self, tokens: int, rng: np.random.Generator) -> Iterator[tuple[int, int, float]]:
        """The images of a row of `tokens` patches, the largest first.

        Yields the place of each image, its share of the patches, and the share of its own patches
        that is left out. The shares add up to `tokens`. Each row has sides from each of as many
        equal parts of their range as there are images, so that rows have equal mixtures.
        """
        count = self.images_per_row
        areas = self._areas(self._sides(rng.permutation(count), rng.random()))
        ends = np.floor(np.cumsum(areas) / areas.sum() * tokens + 0.5).astype(int)
        ends[-1] = tokens
        shares = np.diff(ends, prepend=0).clip(1)
        rates = rng.uniform(*self.drop_patches, size=count)
        for place in np.argsort(-shares, kind="stable"):
            yield int(place), int(shares[place]), float(rates[place])

    def _sides(self, parts: np.ndarray, shift: float) -> np.ndarray:
        return 1 + (self.size_spread - 1) * (parts + shift) / self.images_per_row

    def _areas(self, sides: np.ndarray) -> np.ndarray:
        return sides**2


# One image in each row.
ALONE = Packing()


class Row:
    """A row to which images are added.

    Attributes:
      features: `image`, uint8 `[(1 + tokens) * size, size, 3]`, patches behind one that is not
        used; `places`, int32 `[tokens, 3]`, the number of the image from 1, or 0 for padding, and
        the row and the column of each patch; `grids`, int32 `[images, 2]`, rows and columns of the
        patches of each image, before patches are left out.
    """

    def __init__(self, blank: Mapping[str, np.ndarray]):
        self.features = {name: blank[name].copy() for name in ("image", "places", "grids")}
        self._used = 0

    def add(
        self, place: int, column: np.ndarray, budget: int, rate: float, rng: np.random.Generator
    ) -> int:
        """Adds the image of a place, and returns how many of the row's patches it takes.

        Args:
          place: of the image in its row, from 0.
          column: its patches, as `ops.patches.to_column` makes them.
          budget: the most patches that it may take.
          rate: the share of its patches that is left out.
          rng: draws which.
        """
        patches, (rows, columns) = read_column(column)
        kept = np.arange(len(patches))
        if rate and len(patches):
            number = min(max(round(len(patches) * (1 - rate)), 1), budget)
            kept = np.sort(rng.choice(len(patches), number, replace=False))
        part = slice(self._used, self._used + len(kept))
        size = column.shape[1]
        self.features["image"].reshape(-1, size, size, 3)[1:][part] = patches[kept]
        self.features["places"][part, 0] = place + 1
        self.features["places"][part, 1:] = np.stack(np.divmod(kept, max(columns, 1)), axis=1)
        self.features["grids"][place] = max(rows, 1), max(columns, 1)
        self._used += len(kept)
        return len(kept)


def blank_row(column: np.ndarray, images: int) -> dict[str, np.ndarray]:
    """The features of a row of padding, see `Row`, as long as a column of patches."""
    tokens = column.shape[0] // column.shape[1] - 1
    return {
        "image": np.zeros_like(column),
        "places": np.zeros((tokens, 3), np.int32),
        "grids": np.ones((images, 2), np.int32),
    }


def unpack(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """The images of rows, to be looked at: uint8 `[rows * images, height, width, 3]`.

    Takes features `[rows, ...]` as `Row` has them. Patches that were left out are black, and images
    are padded on the right and below.
    """
    columns, places, grids = (np.asarray(batch[name]) for name in ("image", "places", "grids"))
    size, number = columns.shape[2], grids.shape[1]
    height, width = grids.reshape(-1, 2).max(axis=0) * size
    images = np.zeros((len(columns) * number, height, width, 3), np.uint8)
    for row, column in enumerate(columns):
        patches = column.reshape(-1, size, size, 3)[1:]
        for patch, (image, y, x) in zip(patches, places[row], strict=True):
            if image:
                where = images[row * number + image - 1]
                where[y * size : (y + 1) * size, x * size : (x + 1) * size] = patch
    return images
