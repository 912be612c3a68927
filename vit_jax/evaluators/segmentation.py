# SPDX-License-Identifier: Apache-2.0
"""How well the classes of pixels are predicted, over a whole split and in a picture."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data.ops.decode import MAX_PIXELS
from vit_jax.data.ops.transforms import Decode, Pad, PadTo, Resize, ResizeLong, ResizeSmall
from vit_jax.data.sources.base import IGNORED
from vit_jax.evaluators.base import Columns, Evaluator, write_details, write_file
from vit_jax.models.interface import find_grid
from vit_jax.objectives import segmentation
from vit_jax.objectives.base import Batch, Params
from vit_jax.observe.console import log
from vit_jax.utils.errors import UserError
from vit_jax.utils.palette import color_classes

# Images of the lowest and of the highest mIoU in the picture, and the side of one of them.
_SHOWN = 8
_SIDE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Evaluator):
    """Compares predicted classes with label maps, pixel by pixel, at the size of the label maps.

    Attributes:
      window: side of the windows that are segmented one by one; None for whole images.
      stride: pixels from one window to the next; None for the side of a window.
      flip: whether probabilities are averaged with those of the mirrored image.
      label_size: height and width that hold each mask: masks then keep their size, and logits are
        resized to it; None for masks that are resized like their images.
    """

    objective: segmentation.Segmentation
    window: int | None = None
    stride: int | None = None
    flip: bool = False
    label_size: tuple[int, int] | None = None

    needs_labels = False
    takes_any_size = True

    def __post_init__(self) -> None:
        super().__post_init__()
        key = f"evals.{self.name}"
        if not isinstance(self.objective, segmentation.Segmentation):
            raise UserError(
                f"{key}.name='segmentation' is for objective.name='segmentation'; expected "
                "'classification' here"
            )
        classes = self.data.info.pixel_classes
        if classes != self.objective.classes:
            theirs = f"{len(classes)} classes of pixels" if classes else "no classes of pixels"
            raise UserError(
                f"{key}: {self.data} has {theirs}, and the model was made for "
                f"{len(self.objective.classes)}: expected data with masks of the same names in the "
                "same order"
            )
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
            find_grid(self.objective.model, (min(side, height), min(side, width)))
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
                    "changes what the image shows, and masks keep their size with label_size: "
                    "expected operations that resize and pad"
                )

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("miou", "pixel_accuracy", "mean_class_accuracy")

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Columns: `confusion` of pixels by label and prediction, int32 `[batch, c, c]`, to sum.

        The others are `predicted`, uint8 `[batch, h, w]`, and `miou` of each image, float32
        `[batch]`, over the classes that it or its prediction has.
        """
        window = None if self.window is None else (self.window, self.window)
        stride = None if self.stride is None else (self.stride, self.stride)
        options: dict[str, Any] = {}
        if self.label_size is not None:
            options["resize"] = functools.partial(
                segmentation.resize_to_masks, extent=batch["extent"], size=self.label_size
            )
        probabilities = self.objective.segment(
            params, batch["image"], window=window, stride=stride, flip=self.flip, **options
        )
        predicted = probabilities.argmax(axis=-1)
        labels, count = batch["label_map"].astype(jnp.int32), len(self.objective.classes)
        pairs = jnp.where(labels == IGNORED, count**2, labels * count + predicted)
        confusion = jax.vmap(lambda x: jnp.bincount(x.ravel(), length=count**2 + 1))(pairs)
        confusion = confusion[:, :-1].reshape(-1, count, count)
        columns = {"predicted": predicted.astype(jnp.uint8), "miou": _mean_iou(confusion, jnp)}
        return {"confusion": confusion}, columns

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns the metrics and the `count` of images.

        Intersections and unions are sums over all images; a class that neither labels nor
        predictions have does not count. If some records can't be read, `corrupt` is their number.
        Details are a JSON file with the results by class and the images by their mIoU, and a
        picture of the worst and of the best ones.
        """
        classes = self.objective.classes
        total = np.zeros((len(classes),) * 2, np.int64)
        scores: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        shown: dict[int, tuple[np.ndarray, ...]] = {}

        def count(params: Params, batch: Batch) -> Any:
            summed, others = self.judge_batch(params, batch)
            # As integers, since a float32 holds no more than 2**24 pixels.
            there = batch["mask"].astype(jnp.int32)[:, None, None]
            pictures = (batch["image"], batch["label_map"], others["predicted"])
            pictures += (batch["extent"],) if "extent" in batch else ()
            confusion = (summed["confusion"] * there).sum(axis=0)
            return confusion, others["miou"], batch["mask"], () if details is None else pictures

        for confusion, miou, mask, pictures in self.map_split(self.jit(count), params):
            total += confusion
            start = sum(map(len, scores))
            scores.append(miou)
            masks.append(mask)
            there = np.flatnonzero(mask).tolist() if pictures else ()
            shown |= {start + i: _crop(*(p[i] for p in pictures)) for i in there}
            order = _rank(np.concatenate(scores), np.concatenate(masks))
            kept = {*order[:_SHOWN].tolist(), *order[-_SHOWN:].tolist()}
            shown = {i: one for i, one in shown.items() if i in kept}
        images = int(np.concatenate(masks).sum())
        if not images:
            raise self.nothing_to_read(self.data)
        results: dict[str, float] = describe_confusion(total) | {"count": images}
        if corrupt := len(self.data.open()) - images:
            results["corrupt"] = corrupt
        if details is not None:
            order = _rank(np.concatenate(scores), np.concatenate(masks))
            self._write(details, results, total, np.concatenate(scores), order, shown)
        return results

    def _write(
        self,
        details: Path,
        results: dict[str, float],
        confusion: np.ndarray,
        scores: np.ndarray,
        order: np.ndarray,
        shown: dict[int, tuple[np.ndarray, ...]],
    ) -> None:
        source = self.data.open()
        iou, accuracy = class_iou(confusion), class_accuracy(confusion)
        rows = [
            {
                "label": label,
                "name": name,
                "pixels": int(confusion[label].sum()),
                "iou": None if np.isnan(iou[label]) else float(iou[label]),
                "accuracy": None if np.isnan(accuracy[label]) else float(accuracy[label]),
            }
            for label, name in enumerate(self.objective.classes)
        ]
        few = dict.fromkeys([*order[:_SHOWN].tolist(), *order[-_SHOWN:].tolist()])
        ranked = [{"image": source.describe(i), "miou": float(scores[i])} for i in few]
        record = {"results": results, "pixel_classes": rows, "images": ranked}
        write_details(details, record | {"confusion": confusion.tolist()})
        path = Path(f"{details}.png")
        write_file(path, draw_examples([shown[i] for i in few if i in shown]))
        log(f"wrote {path}: the worst and the best images, their masks and what is predicted")


def _crop(
    image: np.ndarray, label_map: np.ndarray, predicted: np.ndarray, extent: Any = None
) -> tuple[np.ndarray, ...]:
    """An image and its maps without their padding; see `DatasetSpec.blank` for the extent."""
    if extent is None:
        return image, label_map, predicted
    top, left, rows, columns, height, width = extent
    maps = (x[:height, :width] for x in (label_map, predicted))
    return image[top : top + rows, left : left + columns], *maps


def _rank(scores: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The images that count, from the lowest score on."""
    there = np.flatnonzero((masks > 0) & ~np.isnan(scores))
    return there[np.argsort(scores[there], kind="stable")]


def class_iou(confusion: Any, xp: Any = np) -> Any:
    """Intersection over union of each class, `[..., classes]`; NaN for a class that is nowhere.

    `confusion` has the number of pixels by label and prediction, `[..., classes, classes]`; `xp` is
    the module of its arrays.
    """
    hits = xp.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(axis=-1) + confusion.sum(axis=-2) - hits
    return xp.where(union > 0, hits / xp.maximum(union, 1), xp.nan)


def class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """The share of pixels of each class that are predicted right; NaN for a class without pixels.

    Float64 `[classes]`, from numbers of pixels by label and prediction, `[classes, classes]`.
    """
    count = confusion.sum(axis=1)
    return np.where(count > 0, np.diag(confusion) / np.maximum(count, 1), np.nan)


def _mean_iou(confusion: Any, xp: Any) -> Any:
    """The mean over the classes that are somewhere, `[...]`; NaN if there are none."""
    return xp.nanmean(class_iou(confusion, xp), axis=-1)


def describe_confusion(confusion: np.ndarray) -> dict[str, float]:
    """The metrics of a split from its numbers of pixels, integers `[classes, classes]`.

    They are 0 where no pixel has a label.
    """
    if not confusion.any():
        return dict.fromkeys(("miou", "pixel_accuracy", "mean_class_accuracy"), 0.0)
    return {
        "miou": float(_mean_iou(confusion, np)),
        "pixel_accuracy": float(np.trace(confusion) / confusion.sum()),
        "mean_class_accuracy": float(np.nanmean(class_accuracy(confusion))),
    }


def draw_examples(examples: list[tuple[np.ndarray, ...]]) -> bytes:
    """Encodes a row of images, one of their label maps, and one of predictions, as a PNG.

    An example is an image, uint8 `[h, w, 3]`, and its two maps of classes, uint8 `[h, w]`.
    """
    if not examples:
        return cv2.imencode(".png", np.full((1, 1, 3), 255, np.uint8))[1].tobytes()
    columns = []
    for image, *maps in examples:
        height, width = image.shape[:2]
        scale = _SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        parts = [image, *map(color_classes, maps)]
        resized = [cv2.resize(part, size, interpolation=cv2.INTER_NEAREST) for part in parts]
        columns.append(np.concatenate(resized))
    grid = np.concatenate(columns, axis=1)
    return cv2.imencode(".png", grid[..., ::-1])[1].tobytes()
