# SPDX-License-Identifier: Apache-2.0
"""What evaluators of pixels share: windows, label maps of any size, the worst and best images."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import cv2
import jax
import numpy as np

from vit_jax.data.ops.decode import MAX_PIXELS
from vit_jax.data.ops.transforms import Decode, Pad, PadTo, Resize, ResizeLong, ResizeSmall
from vit_jax.evaluators.base import Evaluator, write_details, write_file
from vit_jax.objectives.base import Batch, Params
from vit_jax.objectives.dense import DenseObjective, resize_to_masks
from vit_jax.observe.console import log
from vit_jax.utils.errors import UserError

# The worst and the best images in the picture, and the side of one of them.
_SHOWN = 8
_SIDE = 128

# From maps `[h, w]` of one image to their colours, uint8 `[h, w, 3]`.
Paint = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelEvaluator(Evaluator, abc.ABC):
    """Compares what is found for each pixel with label maps, at the size of the label maps.

    Attributes:
      window: side of the windows that are computed one by one; None for whole images.
      stride: pixels from one window to the next; None for the side of a window.
      flip: whether results are averaged with those of the mirrored image.
      label_size: height and width that hold each label map: these then keep their size, and outputs
        are resized to it; None for label maps that are resized like their images.
      kind: the objective that is evaluated.
      score: what images are ranked by, among the columns of `judge_batch`.
      low_is_bad: whether images with a low score are the worst.
    """

    objective: DenseObjective
    window: int | None = None
    stride: int | None = None
    flip: bool = False
    label_size: tuple[int, int] | None = None

    kind: ClassVar[type[DenseObjective]]
    score: ClassVar[str]
    low_is_bad: ClassVar[bool]
    needs_labels = False
    takes_any_size = True

    def __post_init__(self) -> None:
        super().__post_init__()
        key = f"evals.{self.name}"
        if not isinstance(self.objective, self.kind):
            name = self.kind.__name__.lower()
            raise UserError(
                f"{key}.name={name!r} is for objective.name={name!r}; expected 'classification' "
                "here, or the evaluator of the objective"
            )
        self.check_data()
        if "label_map" not in self.data.blank():
            raise UserError(
                f"{key}.preprocess={self.data.preprocess!r}: expected 'label_map' in keep(...)"
            )
        self.check(self.window is None or self.window >= 1, "window", "pixels, or None")
        self.check(
            self.stride is None or 1 <= self.stride <= (self.window or 0),
            "stride",
            f"1 to evals.{self.name}.window={self.window} pixels, or None",
        )
        if self.label_size is not None:
            self._check_line()
            data = dataclasses.replace(self.data, label_size=tuple(self.label_size))
            object.__setattr__(self, "data", data)
        height, width = self.data.image_shape()[:2]
        side = self.window or max(height, width)
        try:
            self.objective.check_size((min(side, height), min(side, width)))
        except UserError as e:
            raise UserError(f"{key}: {e}") from None

    def _check_line(self) -> None:
        self.check(
            self.label_size is not None
            and len(self.label_size) == 2
            and min(self.label_size) >= 1
            and math.prod(self.label_size) <= MAX_PIXELS,
            "label_size",
            "(height, width) in pixels",
        )
        for op in self.data.ops():
            pads = isinstance(op, Pad | PadTo) and op.mode == "constant"
            if not pads and not isinstance(op, Decode | Resize | ResizeSmall | ResizeLong):
                raise UserError(
                    f"evals.{self.name}.preprocess={self.data.preprocess!r}: {type(op).__name__} "
                    "changes what the image shows, and label maps keep their size with label_size: "
                    "expected operations that resize and pad"
                )

    @abc.abstractmethod
    def check_data(self) -> None:
        """Raises `UserError` unless the label maps are of what the model finds."""

    def find_pixels(self, params: Params, batch: Batch) -> jax.Array:
        """What the objective finds for each pixel of the label maps, float32 `[b, h, w, c]`."""
        window = None if self.window is None else (self.window, self.window)
        stride = None if self.stride is None else (self.stride, self.stride)
        options: dict[str, Any] = {}
        if self.label_size is not None:
            options["resize"] = functools.partial(
                resize_to_masks, extent=batch["extent"], size=self.label_size
            )
        return self.objective.find_pixels(
            params, batch["image"], window=window, stride=stride, flip=self.flip, **options
        )

    @abc.abstractmethod
    def gather(self, params: Params, batch: Batch) -> tuple[Any, jax.Array, jax.Array]:
        """Counts a batch, within jit.

        Returns arrays from a batch for `summarize`, the score of each image, float32 `[batch]`, NaN
        for images without one, and what is predicted, `[batch, h, w]`.
        """

    @abc.abstractmethod
    def summarize(self, parts: list[Any]) -> tuple[dict[str, float], dict[str, Any]]:
        """The metrics of a split and more that the details have, from `gather` of each batch."""

    @abc.abstractmethod
    def paint(self, label_map: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The colours of two maps, uint8 `[h, w, 3]`."""

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns the metrics and the `count` of images.

        If some records can't be read, `corrupt` is their number. Details are a JSON file with the
        images by their score, and a picture of the worst and of the best ones.
        """
        parts: list[Any] = []
        scores: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        shown: dict[int, tuple[np.ndarray, ...]] = {}

        def count(params: Params, batch: Batch) -> Any:
            part, score, predicted = self.gather(params, batch)
            pictures = (batch["image"], batch["label_map"], predicted)
            pictures += (batch["extent"],) if "extent" in batch else ()
            return part, score, batch["mask"], () if details is None else pictures

        for part, score, mask, pictures in self.map_split(self.jit(count), params):
            parts.append(part)
            start = sum(map(len, scores))
            scores.append(score)
            masks.append(mask)
            there = np.flatnonzero(mask).tolist() if pictures else ()
            shown |= {start + i: _crop(*(p[i] for p in pictures)) for i in there}
            order = self._rank(np.concatenate(scores), np.concatenate(masks))
            kept = {*order[:_SHOWN].tolist(), *order[-_SHOWN:].tolist()}
            shown = {i: one for i, one in shown.items() if i in kept}
        images = int(np.concatenate(masks).sum())
        if not images:
            raise self.nothing_to_read(self.data)
        metrics, more = self.summarize(parts)
        results: dict[str, float] = metrics | {"count": images}
        if corrupt := len(self.data.open()) - images:
            results["corrupt"] = corrupt
        if details is not None:
            order = self._rank(np.concatenate(scores), np.concatenate(masks))
            few = list(dict.fromkeys([*order[:_SHOWN].tolist(), *order[-_SHOWN:].tolist()]))
            source, ranked = self.data.open(), np.concatenate(scores)
            listed = [{"image": source.describe(i), self.score: float(ranked[i])} for i in few]
            write_details(details, {"results": results, "images": listed} | more)
            path = Path(f"{details}.png")
            write_file(path, draw_examples([shown[i] for i in few if i in shown], self.paint))
            log(f"wrote {path}: the worst and the best images, their labels and what is predicted")
        return results

    def _rank(self, scores: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """The images that count, from the worst score on."""
        there = np.flatnonzero((masks > 0) & ~np.isnan(scores))
        bad = scores[there] if self.low_is_bad else -scores[there]
        return there[np.argsort(bad, kind="stable")]


def _crop(
    image: np.ndarray, label_map: np.ndarray, predicted: np.ndarray, extent: Any = None
) -> tuple[np.ndarray, ...]:
    """An image and its maps without their padding; see `DatasetSpec.blank` for the extent."""
    if extent is None:
        return image, label_map, predicted
    top, left, rows, columns, height, width = extent
    maps = (x[:height, :width] for x in (label_map, predicted))
    return image[top : top + rows, left : left + columns], *maps


def draw_examples(examples: list[tuple[np.ndarray, ...]], paint: Paint) -> bytes:
    """Encodes a row of images, one of their label maps, and one of predictions, as a PNG.

    An example is an image, uint8 `[h, w, 3]`, and its two maps `[h, w]`, which `paint` colours.
    """
    if not examples:
        return cv2.imencode(".png", np.full((1, 1, 3), 255, np.uint8))[1].tobytes()
    columns = []
    for image, label_map, predicted in examples:
        height, width = image.shape[:2]
        scale = _SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        parts = [image, *paint(label_map, predicted)]
        resized = [cv2.resize(part, size, interpolation=cv2.INTER_NEAREST) for part in parts]
        below = ((0, _SIDE - size[1]), (0, 0), (0, 0))
        columns.append(np.concatenate([np.pad(x, below, constant_values=255) for x in resized]))
    grid = np.concatenate(columns, axis=1)
    return cv2.imencode(".png", grid[..., ::-1])[1].tobytes()
