# SPDX-License-Identifier: Apache-2.0
"""What a classifier says of images: of arrays by label, of files and Pillow images by name."""

import dataclasses
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from vit_jax.utils.errors import UserError
from vit_jax.utils.text import printable

_SHOWN = 3  # classes of an image in its `repr`


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predictions for an array of images.

    Attributes:
      logits: float32 `[n, num_classes]`.
      probabilities: float32 `[n, num_classes]`. Each row sums to 1 if the model was trained with a
        softmax; the classes are independent if it was trained with a sigmoid.
    """

    logits: np.ndarray
    probabilities: np.ndarray

    def top(self, k: int) -> np.ndarray:
        """The `k` most probable labels of each image, the most probable first, int64 `[n, k]`.

        Raises:
          UserError: `k` is less than 1.
        """
        _check_k(k)
        return np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ImagePrediction:
    """The prediction for one image.

    Attributes:
      path: path of its file; None for an image in memory.
      logits: float32 `[num_classes]`.
      probabilities: float32 `[num_classes]`, see `Prediction`.
      class_names: name of each class; its number where there are no names.
    """

    path: str | None
    logits: np.ndarray
    probabilities: np.ndarray
    class_names: Sequence[str]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` most probable classes as (name, probability), the most probable first.

        Raises:
          UserError: `k` is less than 1.
        """
        _check_k(k)
        labels: list[int] = np.argsort(-self.probabilities, kind="stable")[:k].tolist()
        return [(self.class_names[i], float(self.probabilities[i])) for i in labels]

    def __repr__(self) -> str:
        classes = ", ".join(f"{name} {100 * p:.1f} %" for name, p in self.top(_SHOWN))
        return f"{'image' if self.path is None else printable(self.path)}: {classes}"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ImagePredictions(Sequence[ImagePrediction]):
    """The predictions for several images; a sequence of `ImagePrediction`.

    Attributes:
      paths: path of each image; None for an image in memory.
      logits: float32 `[n, num_classes]`.
      probabilities: float32 `[n, num_classes]`, see `Prediction`.
      class_names: name of each class; its number where there are no names.
    """

    paths: tuple[str | None, ...]
    logits: np.ndarray
    probabilities: np.ndarray
    class_names: Sequence[str]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """The `k` most probable classes of each image, see `ImagePrediction.top`."""
        return [image.top(k) for image in self]

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> ImagePrediction: ...
    @overload
    def __getitem__(self, index: slice) -> "ImagePredictions": ...
    def __getitem__(self, index: int | slice) -> "ImagePrediction | ImagePredictions":
        rows = self.logits[index], self.probabilities[index], self.class_names
        if isinstance(index, slice):
            return ImagePredictions(self.paths[index], *rows)
        return ImagePrediction(self.paths[index], *rows)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ImageFeatures(Sequence[np.ndarray]):
    """Features or attention weights of images; a sequence of those of each image.

    `numpy.asarray` returns `values`.

    Attributes:
      paths: path of each image; None for an image in memory.
      values: float32 `[n, ...]`.
    """

    paths: tuple[str | None, ...]
    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `values`."""
        return self.values.shape

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageFeatures": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | ImageFeatures":
        if isinstance(index, slice):
            return ImageFeatures(self.paths[index], self.values[index])
        return self.values[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype, copy=copy)

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.values.shape[1:]))
        names = ("image" if path is None else printable(path) for path in self.paths)
        return "\n".join(f"{name}: {self.values.dtype} [{shape}]" for name in names)


def _check_k(k: int) -> None:
    if not isinstance(k, int | np.integer) or k < 1:
        raise UserError(f"top({k!r}): expected a whole number, at least 1")
