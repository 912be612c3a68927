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
from jax.sharding import Mesh

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.base import (
    check_every,
    map_split,
    replicate_outputs,
    write_details,
    write_file,
)
from vit_jax.evaluators.metrics import accuracy_by_class, average_precisions
from vit_jax.evaluators.real import find_labels, read_labels
from vit_jax.losses import make_targets, sigmoid_cross_entropy, softmax_cross_entropy
from vit_jax.objectives.base import Batch, Objective, Params
from vit_jax.utils.errors import UserError

# Of the confidence, for the calibration error.
NUM_BINS = 15

# The label has to be among so many of the most likely classes; not shown for so few in all.
_TOP = 5


def batch_sums(params: Params, batch: Batch, *, objective: Objective) -> dict[str, jax.Array]:
    """Sums over the examples of a batch whose mask is 1.

    Where examples have several labels, `top1` counts those whose most likely class is one of them,
    and `loss` is the sum of binary cross entropies. Else there are `top5`, if there are more than 5
    classes, and for each bin of confidence `bin_count`, `bin_confidence` and `bin_hits`.
    """
    logits = objective.predict(params, batch)["logits"].astype(jnp.float32)
    return _sum_up(logits, batch)


def batch_results(
    params: Params, batch: Batch, *, objective: Objective
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """`batch_sums`, and what is needed of each example: `label, mask, predicted` or `logits`."""
    logits = objective.predict(params, batch)["logits"].astype(jnp.float32)
    rows = {"label": batch["label"], "mask": batch["mask"]}
    if batch["label"].ndim == 2:
        rows["logits"] = logits[:, : batch["label"].shape[-1]]
    else:
        rows["predicted"] = jnp.argmax(logits, axis=-1)
    return _sum_up(logits, batch), rows


def _sum_up(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    label, mask = batch["label"], batch["mask"]
    targets = make_targets(label, logits.shape[-1])
    several = label.ndim == 2
    hits = jnp.take_along_axis(targets, jnp.argmax(logits, axis=-1)[:, None], axis=-1)[:, 0]
    loss = sigmoid_cross_entropy if several else softmax_cross_entropy
    sums = {
        "top1": jnp.sum(mask * hits),
        "loss": jnp.sum(mask * loss(logits, targets)),
        "count": jnp.sum(mask),
    }
    if several:
        return sums
    if logits.shape[-1] > _TOP:
        sums["top5"] = jnp.sum(mask * (_rank(logits, label) < _TOP))
    confidence = jnp.exp(logits.max(axis=-1) - jax.nn.logsumexp(logits, axis=-1))
    # Bins are open below and closed above, as published.
    bins = jnp.clip(jnp.ceil(confidence * NUM_BINS).astype(jnp.int32) - 1, 0, NUM_BINS - 1)
    in_bin = mask[:, None] * jax.nn.one_hot(bins, NUM_BINS)
    sums["bin_count"] = jnp.sum(in_bin, axis=0)
    sums["bin_confidence"] = jnp.sum(in_bin * confidence[:, None], axis=0)
    sums["bin_hits"] = jnp.sum(in_bin * hits[:, None], axis=0)
    return sums


def _rank(logits: jax.Array, label: jax.Array) -> jax.Array:
    """How many classes come before the label; of equal ones, those of smaller index.

    Counted, not sorted, so that logits that are sharded by classes stay so. What is no number
    comes first.
    """
    index = jnp.arange(logits.shape[-1])
    own = jnp.sum(jnp.where(index == label[:, None], logits, 0), axis=-1, keepdims=True)
    behind = (logits < own) | ((logits == own) & (index >= label[:, None]))
    return jnp.sum(~behind, axis=-1)


@dataclasses.dataclass(frozen=True)
class Classification:
    """Judges the logits.

    Attributes:
      name: prefix of its metrics, such as `val`.
      data: the split.
      every: steps between evaluations; 0 for the end only.
      objective: whose predictions are judged.
      mesh: that the batches are put on.
      real_json: file of the ReaL labels; None to leave them out.
    """

    name: str
    data: DatasetSpec
    every: int
    objective: Objective
    mesh: Mesh
    real_json: str | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        if self.data.info.multi_label:
            return ("top1", "loss", "mAP")
        top5 = ("top5",) if self.data.info.num_classes > _TOP else ()
        real = ("real_top1",) if self.real_json else ()
        return ("top1", *top5, "loss", "ece", "mean_per_class", *real)

    @functools.cached_property
    def _corrupt(self) -> CorruptCounter:
        # Of all evaluations, so that a record is named but once.
        return CorruptCounter()

    @functools.cached_property
    def _batch_results(self):
        return replicate_outputs(
            functools.partial(batch_results, objective=self.objective), self.mesh
        )

    @functools.cached_property
    def _real(self) -> list[frozenset[int]]:
        key = f"evals.{self.name}.real_json"
        return find_labels(read_labels(self.real_json or "", key=key), self.data.open(), key=key)

    def open(self) -> None:
        self.data.open()
        if self.real_json:
            _ = self._real

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Means over the split by metric, and the `count` of examples seen.

        Records that can't be read are left out; if there are any, `corrupt` is their number.

        Raises:
          UserError: none can be read.
        """
        total: dict[str, Any] = {}
        collected: list[dict[str, np.ndarray]] = []
        for sums, rows in map_split(
            self._batch_results,
            params,
            self.data,
            name=self.name,
            mesh=self.mesh,
            corrupt=self._corrupt,
        ):
            for k, v in sums.items():
                total[k] = total.get(k, 0.0) + np.asarray(v, np.float64)
            collected.append(rows)
        count = int(total.pop("count"))
        if not count:
            raise UserError(f"evals.{self.name}: no image of {self.data.split} can be read")
        rows = {k: np.concatenate([r[k] for r in collected]) for k in collected[0]}
        seen = np.flatnonzero(rows.pop("mask"))
        rows = {k: v[seen] for k, v in rows.items()}
        bins: list[dict[str, float]] = []
        if "bin_hits" in total:
            bins = _describe_bins(total.pop("bin_count"), total)
            # The mean gap between confidence and accuracy of Guo et al., arXiv:1706.04599, eq. 3.
            total["ece"] = np.abs(total.pop("bin_confidence") - total.pop("bin_hits")).sum()
        results = {k: float(v) / count for k, v in total.items()}
        more, written = self._judge_rows(rows, seen)
        results |= more
        # In the order of importance, for the screen.
        results = {k: results.pop(k) for k in self.metrics if k in results} | results
        results["count"] = count
        if corrupt := len(self.data.open()) - count:
            results["corrupt"] = corrupt
        if details is not None:
            content = {"results": results, "classes": written, "calibration": bins}
            write_details(details, content)
            if "predicted" in rows:
                _write_confusion(details, rows["label"], rows["predicted"])
        return results

    def _judge_rows(
        self, rows: dict[str, np.ndarray], seen: np.ndarray
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of the whole split, and a record for each class."""
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
            results |= _judge_real(rows["predicted"], [self._real[i] for i in seen])
        return results, [
            {
                "label": label,
                "name": names[label] if names else None,
                "count": int(counts[label]),
                metric: float(values[label]) if counts[label] else None,
            }
            for label in range(len(values))
        ]


def _describe_bins(counts: np.ndarray, sums: Mapping[str, np.ndarray]) -> list[dict[str, float]]:
    """Mean confidence and accuracy of the bins that have examples."""
    return [
        {
            "count": int(count),
            "confidence": float(confidence / count),
            "accuracy": float(hits / count),
        }
        for count, confidence, hits in zip(
            counts, sums["bin_confidence"], sums["bin_hits"], strict=True
        )
        if count
    ]


def _mean(values: np.ndarray) -> float:
    """Over the classes that have examples."""
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


def make_classification(
    *,
    name: str,
    data: DatasetSpec,
    objective: Objective,
    mesh: Mesh,
    every: int = 0,
    real_json: str | None = None,
) -> Classification:
    """A `Classification` from config values, checked."""
    check_every(every, name=name)
    if real_json is not None and data.info.multi_label:
        raise UserError(
            f"evals.{name}.real_json={real_json!r}: expected a dataset with one label an example, "
            f"and {data} has several"
        )
    if not objective.classifies:
        raise UserError(
            f"evals.{name}.name='classification': this objective has no single prediction of "
            "classes; expected 'reconstruction' for 'mae', 'probes' for 'linear_probe'"
        )
    return Classification(name, data, every, objective, mesh, real_json)
