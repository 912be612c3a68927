# SPDX-License-Identifier: Apache-2.0
"""Measures what quantization costs: accuracy, agreement and differences on images."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.data.classes import Classes
from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.data.sources import open_source
from vit_jax.export.signature import without_folders
from vit_jax.inference.model import LoadedModel
from vit_jax.models.interface import takes_any_size
from vit_jax.observe.console import log
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.utils.errors import UserError

BATCH_SIZE = 64
# Images of an evaluator's split that are measured unless --split names it.
MAX_IMAGES = 5000
# Images that are drawn where no others are known.
DRAWN = 64


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to measure on.

    Attributes:
      title: what they are, in words.
      data: the split that they are read from; None for images that are drawn.
      labelled: whether their labels are classes of the model.
      limit: most images; None for all.
    """

    title: str
    data: DatasetSpec | None = None
    labelled: bool = False
    limit: int | None = None

    def read(self, model: LoadedModel) -> Iterator[tuple[np.ndarray, Any, np.ndarray]]:
        """Yields images, uint8 `[batch, *image_shape]`, labels, and which rows count, bool."""
        if self.data is None:
            drawn = draw_images(model.image_shape)
            yield drawn, None, np.ones(len(drawn), bool)
            return
        seen, limit = 0, math.inf if self.limit is None else self.limit
        with contextlib.closing(eval_batches(self.data, corrupt=CorruptCounter())) as batches:
            for batch in batches:
                counts = batch["mask"] > 0
                counts &= seen + np.cumsum(counts) <= limit
                seen += int(counts.sum())
                yield batch["image"], batch["label"] if self.labelled else None, counts
                if seen >= limit:
                    return


def draw_images(image_shape: tuple[int, int, int]) -> np.ndarray:
    """Draws seeded images of coloured blobs of several sizes, uint8 `[64, *image_shape]`."""
    rng = np.random.default_rng(0)
    height, width, channels = image_shape
    images = np.empty((DRAWN, *image_shape), np.uint8)
    for i in range(DRAWN):
        side = 2 ** (1 + i % 5)
        for channel in range(channels):
            small = rng.integers(0, 256, (side, side), np.uint8)
            smooth = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            images[i, ..., channel] = np.asarray(smooth)
    return images


def find_images(
    model: LoadedModel, layer: str, *, data: str | None, split: str | None, data_dir: str | None
) -> Images:
    """Finds images for a model: those given, those of an evaluator of its run, or drawn ones.

    Args:
      model: that is quantized.
      layer: whose output is written; only logits are compared with labels.
      data: name of a dataset; None for that of the run.
      split: of the data; None for that of an evaluator, or `test` of `data`.
      data_dir: of TFDS; None for that of the run.

    Raises:
      UserError: `data` or `split` is given and can't be read, its classes are not those of the
        model, or the model takes images of any size.
    """
    if takes_any_size(model.module):
        raise UserError(
            f"--quantize: {model.source} takes images of any size: expected a model for one size"
        )
    size = model.round_up(BATCH_SIZE)
    if data is None:
        spec = _find_evaluated(model, size, split=split, data_dir=data_dir)
        if spec is None and split is not None:
            raise UserError(f"--split={split}: the model has no run with data: expected --data")
        if spec is None:
            reason = "the data of the model is not known"
            if (model.config.get("data") or {}).get("name"):
                reason = "no evaluator of the run classifies"
            return Images(f"{DRAWN} drawn images, as {reason}")
        try:
            if split is not None:
                open_source(spec.name, split, data_dir=spec.data_dir, key="--split")
            return _open(model, layer, spec, limit=None if split else MAX_IMAGES)
        except UserError as e:
            if split is not None:
                raise
            log(f"{spec.key}: {e}")
            return Images(f"{DRAWN} drawn images, as the data of the run can't be read")
    open_source(data, split or "test", data_dir=data_dir, key="--split")
    spec = DatasetSpec(data, split or "test", model.preparation.line, size, data_dir, "--data")
    return _open(model, layer, spec, limit=None)


def _find_evaluated(
    model: LoadedModel, size: int, *, split: str | None, data_dir: str | None
) -> DatasetSpec | None:
    """The split of the evaluator `val` of a run, or else of the first that classifies."""
    section: Mapping[str, Any] = model.config.get("data") or {}
    evaluators: Mapping[str, Any] = model.config.get("evals") or {}
    for name, evaluator in sorted(evaluators.items(), key=lambda item: item[0] != "val"):
        if evaluator and evaluator.get("name", "classification") == "classification":
            source = evaluator.get("data_name") or section.get("name")
            if source and evaluator.get("split"):
                folder = data_dir or evaluator.get("data_dir") or section.get("data_dir")
                wanted = split or evaluator["split"]
                line = model.preparation.line
                return DatasetSpec(source, wanted, line, size, folder, f"evals.{name}")
    return None


def _open(model: LoadedModel, layer: str, spec: DatasetSpec, *, limit: int | None) -> Images:
    info = spec.info
    labelled = layer == "logits" and model.classifies and bool(info.num_classes)
    if labelled:
        classes = Classes(model.num_classes, model.class_names, model.source)
        spec, note = spec.match(classes, key=spec.key)
        if note:
            log(note)
    shape = spec.image_shape()
    if shape != model.image_shape:
        raise UserError(
            f"{spec.key}: images are {list(shape)} after {spec.preprocess!r}; the model takes "
            f"{list(model.image_shape)}"
        )
    count = len(spec.open())
    title = f"{spec.split} of {without_folders(str(spec))}"
    title += "" if limit is None or count <= limit else f", the first {limit:,} of {count:,}"
    return Images(title, spec, labelled, limit)


@dataclasses.dataclass(frozen=True)
class Cost:
    """How the outputs of a quantized program differ from those of the model.

    Attributes:
      count: number of images.
      images: what they are.
      top1: accuracy of the model and of the program; None without labels.
      deviation: standard error of the difference of the two, from the images whose result changed.
      agreement: share of the images with the same most probable class; None for features.
      difference: largest difference of a probability; None for features.
      cosine: mean and least cosine between features; None for logits.
    """

    count: int
    images: str
    top1: tuple[float, float] | None = None
    deviation: float | None = None
    agreement: float | None = None
    difference: float | None = None
    cosine: tuple[float, float] | None = None

    def describe(self) -> str:
        """Describes the cost in a line."""
        parts = []
        if self.top1 is not None and self.deviation is not None:
            before, after = self.top1
            parts.append(
                f"top-1 {after:.2%} in place of {before:.2%}, a difference of "
                f"{100 * (after - before):+.2f} points (standard error {100 * self.deviation:.2f})"
            )
        if self.agreement is not None:
            parts.append(f"the same class for {self.agreement:.2%} of the images")
            parts.append(f"probabilities differ by {self.difference:.2g} at most")
        if self.cosine is not None:
            mean, least = self.cosine
            parts.append(f"cosine of the outputs {mean:.5f} on average, {least:.5f} at least")
        if self.top1 is None and self.cosine is None:
            parts.append("no labels, so the drop in accuracy is not known")
        return f"{', '.join(parts)}; {self.count:,} images: {self.images}"

    def as_json(self) -> dict[str, Any]:
        """Returns the fields that are known."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def measure(
    model: LoadedModel,
    run: Callable[[np.ndarray], np.ndarray],
    layer: str,
    images: Images,
    *,
    what: str,
) -> Cost:
    """Compares a program with the model that it was made from; logs progress.

    Args:
      model: before quantization.
      run: the program, from uint8 `[n, *image_shape]` to float32 `[n, ...]`.
      layer: whose output the program returns.
      images: to compare on.
      what: name of the program's file.

    Raises:
      UserError: no image can be read, or the program gives values that are not finite.
    """
    compare = _compare_logits if layer == "logits" and model.classifies else _compare_features
    columns: list[dict[str, np.ndarray]] = []
    total = DRAWN
    if images.data is not None:
        total = min(len(images.data.open()), images.limit or math.inf)
    with ProgressLog(f"{what}: comparing", total=total, unit="images") as progress:
        for batch, labels, counts in images.read(model):
            if not counts.any():
                continue
            before, after = model.features(batch, layer)[counts], run(batch)[counts]
            if not np.isfinite(after).all():
                raise UserError(f"{what}: gives values that are not finite; nothing is written")
            columns.append(compare(model, before, after))
            if labels is not None:
                columns[-1] |= _judge(labels[counts], before, after)
            progress.advance(len(before))
    if not columns:
        raise UserError(f"--quantize: no image of {images.title} can be read")
    rows = {k: np.concatenate([c[k] for c in columns]) for k in columns[0]}
    count = len(next(iter(rows.values())))
    found: dict[str, Any] = {}
    if "before" in rows:
        change = rows["after"].astype(np.float64) - rows["before"]
        found["top1"] = float(rows["before"].mean()), float(rows["after"].mean())
        found["deviation"] = float(change.std() / math.sqrt(count))
    if "same" in rows:
        found["agreement"] = float(rows["same"].mean())
        found["difference"] = float(rows["difference"].max())
    else:
        found["cosine"] = float(rows["cosine"].mean()), float(rows["cosine"].min())
    return Cost(count, images.title, **found)


def _compare_logits(
    model: LoadedModel, before: np.ndarray, after: np.ndarray
) -> dict[str, np.ndarray]:
    p, q = (model.predict(logits).probabilities for logits in (before, after))
    return {
        "same": before.argmax(axis=-1) == after.argmax(axis=-1),
        "difference": np.abs(p - q).max(axis=-1),
    }


def _compare_features(_: LoadedModel, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    x, y = (rows.reshape(len(rows), -1).astype(np.float64) for rows in (before, after))
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return {"cosine": (x * y).sum(axis=1) / np.maximum(lengths, 1e-30)}


def _judge(labels: np.ndarray, before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
    """Whether the most probable class is the label, or one of several."""
    if labels.ndim == 1:
        return {"before": before.argmax(-1) == labels, "after": after.argmax(-1) == labels}
    rows = np.arange(len(labels))
    return {
        "before": labels[rows, before.argmax(-1)] > 0,
        "after": labels[rows, after.argmax(-1)] > 0,
    }
