# SPDX-License-Identifier: Apache-2.0
"""How well the classes of pixels are predicted, over a whole split and in a picture."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data.sources.base import IGNORED
from vit_jax.evaluators.base import Columns
from vit_jax.evaluators.pixels import PixelEvaluator
from vit_jax.objectives import segmentation
from vit_jax.objectives.base import Batch, Params
from vit_jax.utils.errors import UserError
from vit_jax.utils.palette import color_classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(PixelEvaluator):
    """Compares predicted classes with label maps, pixel by pixel; see `PixelEvaluator`."""

    objective: segmentation.Segmentation

    kind = segmentation.Segmentation
    score = "miou"
    low_is_bad = True

    def check_data(self) -> None:
        classes = self.data.info.pixel_classes
        if classes != self.objective.classes:
            theirs = f"{len(classes)} classes of pixels" if classes else "no classes of pixels"
            raise UserError(
                f"evals.{self.name}: {self.data} has {theirs}, and the model was made for "
                f"{len(self.objective.classes)}: expected data with masks of the same names in the "
                "same order"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("miou", "pixel_accuracy", "mean_class_accuracy")

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Columns: `confusion` of pixels by label and prediction, int32 `[batch, c, c]`, to sum.

        The others are `predicted`, uint8 `[batch, h, w]`, and `miou` of each image, float32
        `[batch]`, over the classes that it or its prediction has.
        """
        predicted = self.find_pixels(params, batch).argmax(axis=-1)
        labels, count = batch["label_map"].astype(jnp.int32), len(self.objective.classes)
        pairs = jnp.where(labels == IGNORED, count**2, labels * count + predicted)
        confusion = jax.vmap(lambda x: jnp.bincount(x.ravel(), length=count**2 + 1))(pairs)
        confusion = confusion[:, :-1].reshape(-1, count, count)
        columns = {"predicted": predicted.astype(jnp.uint8), "miou": _mean_iou(confusion, jnp)}
        return {"confusion": confusion}, columns

    def gather(self, params: Params, batch: Batch) -> tuple[Any, jax.Array, jax.Array]:
        summed, others = self.judge_batch(params, batch)
        # As integers, since a float32 holds no more than 2**24 pixels.
        there = batch["mask"].astype(jnp.int32)[:, None, None]
        return (summed["confusion"] * there).sum(axis=0), others["miou"], others["predicted"]

    def summarize(self, parts: list[Any]) -> tuple[dict[str, float], dict[str, Any]]:
        """Intersections and unions are sums over all images.

        A class that neither labels nor predictions have does not count.
        """
        confusion = np.sum(np.asarray(parts, np.int64), axis=0)
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
        details = {"pixel_classes": rows, "confusion": confusion.tolist()}
        return describe_confusion(confusion), details

    def paint(self, label_map: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return color_classes(label_map), color_classes(predicted)


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
