# SPDX-License-Identifier: Apache-2.0
"""Accuracy, loss and calibration of a classifier over a whole split, exact on any mesh."""

import csv
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.evaluators.base import Columns, Evaluator, write_details, write_file
from vit_jax.evaluators.metrics import accuracy_by_class, average_precisions
from vit_jax.evaluators.real import find_labels, read_labels
from vit_jax.losses import make_targets, sigmoid_cross_entropy, softmax_cross_entropy
from vit_jax.objectives.base import Batch, Params
from vit_jax.utils.errors import UserError

# Number of bins of the confidence, for the calibration error.
NUM_BINS = 15

# The k of top-k accuracy, which is left out where there are no more classes than that.
_TOP = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Evaluator):
    """Judges the logits.

    Attributes:
      real_json: file of the ReaL labels; None to leave them out.
    """

    real_json: str | None = None

    judges_head = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.real_json is not None and self.data.info.multi_label:
            raise UserError(
                f"evals.{self.name}.real_json={self.real_json!r}: expected a dataset with one "
                f"label an example, and {self.data} has several"
            )
        self.check_objective()

    def check_objective(self) -> None:
        """Raises `UserError` unless the objective gives `logits`."""
        if not self.objective.classifies:
            raise UserError(
                f"evals.{self.name}.name='classification': this objective has no single "
                "prediction of classes; expected 'reconstruction' for 'mae', 'probes' for "
                "'linear_probe', 'zero_shot' for 'contrastive', 'segmentation' for 'segmentation'"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        if self.data.info.multi_label:
            return ("top1", "loss", "mAP")
        top5 = ("top5",) if self.data.info.num_classes > _TOP else ()
        real = ("real_top1",) if self.real_json else ()
        return ("top1", *top5, "loss", "ece", "mean_per_class", *real)

    @functools.cached_property
    def _real(self) -> list[frozenset[int]]:
        key = f"evals.{self.name}.real_json"
        return find_labels(
            read_labels(self.real_json or "", key=key),
            self.data.open(),
            num_classes=self.data.info.num_classes,
            key=key,
        )

    def open(self) -> None:
        super().open()
        if self.real_json:
            _ = self._real

    def compute_logits(self, params: Params, batch: Batch) -> jax.Array:
        """Returns logits of a batch from the data, `[batch, classes]` of a float dtype."""
        return self.objective.predict(params, batch)["logits"]

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Returns what `run` needs of each example.

        With one label an example, the columns to sum are `top1`, `loss` and, if there are more than
        5 classes, `top5`, `[batch]`, and `bin_count`, `bin_confidence` and `bin_hits`, `[batch,
        bins]`; the others are `label` and `predicted`, int32 `[batch]`.

        With several labels, the columns to sum are `top1`, which is 1 if the most likely class is
        one of the labels, and `loss`, the sum of binary cross entropies; the others are `label` and
        `logits`, float32 `[batch, classes]`.
        """
        logits = self.compute_logits(params, batch).astype(jnp.float32)
        label = batch["label"]
        targets = make_targets(label, logits.shape[-1])
        predicted = jnp.argmax(logits, axis=-1)
        hits = jnp.take_along_axis(targets, predicted[:, None], axis=-1)[:, 0]
        if label.ndim == 2:
            summed = {"top1": hits, "loss": sigmoid_cross_entropy(logits, targets)}
            return summed, {"label": label, "logits": logits[:, : label.shape[-1]]}
        summed = {"top1": hits, "loss": softmax_cross_entropy(logits, targets)}
        if logits.shape[-1] > _TOP:
            summed["top5"] = _rank(logits, label) < _TOP
        confidence = jnp.exp(logits.max(axis=-1) - jax.nn.logsumexp(logits, axis=-1))
        # Bins are open below and closed above, as published.
        bins = jnp.clip(jnp.ceil(confidence * NUM_BINS).astype(jnp.int32) - 1, 0, NUM_BINS - 1)
        in_bin = jax.nn.one_hot(bins, NUM_BINS)
        summed["bin_count"] = in_bin
        summed["bin_confidence"] = in_bin * confidence[:, None]
        summed["bin_hits"] = in_bin * hits[:, None]
        return summed, {"label": label, "predicted": predicted}

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns means over the split by metric, and the `count` of examples.

        If some records can't be read, `corrupt` is their number. Details are a JSON file with the
        results, the accuracy of each class and the bins of the confidence, and the confusion
        matrix as a CSV file.
        """
        total, count, rows = self.sum_split(params)
        bins: list[dict[str, float]] = []
        if "bin_hits" in total:
            bins = _describe_bins(total.pop("bin_count"), total)
            # The mean gap between confidence and accuracy of Guo et al., arXiv:1706.04599, eq. 3.
            total["ece"] = np.abs(total.pop("bin_confidence") - total.pop("bin_hits")).sum()
        results = {k: float(v) / count for k, v in total.items()}
        of_split, classes = self.judge_rows(rows)
        results |= of_split
        # The order of importance, for the log.
        results = {k: results.pop(k) for k in self.metrics if k in results} | results
        results["count"] = count
        if corrupt := len(self.data.open()) - count:
            results["corrupt"] = corrupt
        record = {"results": results, "classes": classes, "calibration": bins}
        write_details(details, record | self.describe_details())
        if details is not None and "predicted" in rows:
            _write_confusion(details, rows["label"], rows["predicted"])
        return results

    def describe_details(self) -> dict[str, Any]:
        """More for the file of details."""
        return {}

    def judge_rows(
        self, rows: dict[str, np.ndarray]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics that need the whole split, and a record for each class."""
        names = self.data.info.class_names
        if "logits" in rows:
            values = average_precisions(rows["logits"], rows["label"])
            counts = rows["label"].sum(axis=0).astype(int)
            metric, results = "average_precision", {"mAP": _mean(values)}
        else:
            num_classes = self.data.info.num_classes
            values, counts = accuracy_by_class(rows["label"], rows["predicted"], num_classes)
            metric, results = "accuracy", {"mean_per_class": _mean(values)}
        if self.real_json:
            results |= _judge_real(rows["predicted"], [self._real[i] for i in rows["index"]])
        return results, [
            {
                "label": label,
                "name": names[label] if names else None,
                "count": int(counts[label]),
                metric: float(values[label]) if counts[label] else None,
            }
            for label in range(len(values))
        ]


def _rank(logits: jax.Array, label: jax.Array) -> jax.Array:
    """The number of classes before the label, int32 `[batch]`; ties are in the order of classes.

    They are counted, not sorted, so that logits stay sharded by classes. NaN comes first.
    """
    index = jnp.arange(logits.shape[-1])
    own = jnp.sum(jnp.where(index == label[:, None], logits, 0), axis=-1, keepdims=True)
    behind = (logits < own) | ((logits == own) & (index >= label[:, None]))
    return jnp.sum(~behind, axis=-1)


def _describe_bins(counts: np.ndarray, sums: Mapping[str, np.ndarray]) -> list[dict[str, float]]:
    """Mean confidence and accuracy of each bin that has examples."""
    bins = zip(counts, sums["bin_confidence"], sums["bin_hits"], strict=True)
    return [
        {"count": int(n), "confidence": float(confidence / n), "accuracy": float(hits / n)}
        for n, confidence, hits in bins
        if n
    ]


def _mean(values: np.ndarray) -> float:
    """The mean over the classes that have examples."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else 0.0


def _judge_real(predicted: np.ndarray, labels: Sequence[frozenset[int]]) -> dict[str, float]:
    """Accuracy where any of the labels is right; images without labels do not count."""
    hits = [int(p) in several for p, several in zip(predicted, labels, strict=True) if several]
    return {"real_top1": float(np.mean(hits)) if hits else 0.0, "real_count": len(hits)}


def _write_confusion(details: Path, labels: np.ndarray, predicted: np.ndarray) -> None:
    """Writes the confusion matrix as `label,predicted,count`, without its zeros."""
    pairs, counts = np.unique(np.stack([labels, predicted], 1), axis=0, return_counts=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("label", "predicted", "count"))
    writer.writerows([*pair, count] for pair, count in zip(pairs.tolist(), counts, strict=True))
    write_file(Path(f"{details}_confusion.csv"), text.getvalue())
