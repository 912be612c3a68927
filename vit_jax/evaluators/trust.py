# SPDX-License-Identifier: Apache-2.0
"""How far predictions can be trusted: calibration, rejection, groups, and images of other kinds."""

import csv
import dataclasses
import functools
import io
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vit_jax.data.pipeline import DatasetSpec
from vit_jax.data.sources.base import Source
from vit_jax.evaluators.base import Columns
from vit_jax.evaluators.classification import NUM_BINS, Classification
from vit_jax.evaluators.knn import find_neighbours
from vit_jax.evaluators.metrics import (
    area_under_risk,
    area_under_roc,
    calibration_error,
    fit_temperature,
    risks,
)
from vit_jax.objectives.base import Batch, Params
from vit_jax.utils.bounds import read_bytes
from vit_jax.utils.errors import UserError, describe_error

# Scores that are larger for images of the model's kind, and need no other data.
_SCORES = ("max_probability", "max_logit", "energy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trust(Classification):
    """Judges the logits as `classification` does, and how far they can be trusted.

    Attributes:
      coverages: shares of the images, the most confident ones, whose accuracy is given.
      groups: `FILE.csv:COLUMN`: a table with the columns `image` and COLUMN, which names the group
        of each image; None for no groups.
      outlier_data: a dataset of images of other kinds, such as `folder:PATH`; None for none.
      outlier_split: its split.
      train_split: the split of the dataset whose features the neighbours are searched in, for
        `knn_auroc`; None to leave this out.
      k: the neighbour whose distance is the score.
    """

    coverages: tuple[float, ...] = (0.8, 0.9)
    groups: str | None = None
    outlier_data: str | None = None
    outlier_split: str = "all"
    train_split: str | None = None
    k: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.info.multi_label:
            raise UserError(
                f"evals.{self.name}.name='trust': {self.data} has several labels an example; "
                "expected a dataset with one"
            )
        valid = all(0 < coverage <= 1 for coverage in self.coverages)
        self.check(valid, "coverages", "shares above 0 and up to 1, such as (0.8, 0.9)")
        self.check(self.k >= 1, "k", "at least 1")
        if self.train_split is not None and self.outlier_data is None:
            self.check(False, "train_split", "outlier_data too, which it is compared with")
        if self.groups is not None and not self.groups.rpartition(":")[0]:
            self.check(False, "groups", "FILE.csv:COLUMN")

    @property
    def metrics(self) -> tuple[str, ...]:
        names = [*super().metrics, "aurc", *map(_name_coverage, self.coverages)]
        names += ["worst_group_top1"] if self.groups else []
        if self.outlier_data:
            names += [f"{score}_auroc" for score in _SCORES]
            names += ["knn_auroc"] if self.train_split else []
        return (*names, "temperature", "scaled_loss", "scaled_ece")

    @property
    def _outliers(self) -> DatasetSpec | None:
        if self.outlier_data is None:
            return None
        names = {"name": self.outlier_data, "split": self.outlier_split}
        return dataclasses.replace(self.data, **names, classes=None, split_key="outlier_split")

    @property
    def _train(self) -> DatasetSpec | None:
        if self.train_split is None:
            return None
        return dataclasses.replace(self.data, split=self.train_split, split_key="train_split")

    @functools.cached_property
    def _group_of(self) -> list[str]:
        path, _, column = (self.groups or "").rpartition(":")
        return read_groups(path, column, self.data.open(), key=f"evals.{self.name}.groups")

    def open(self) -> None:
        super().open()
        if self.groups:
            _ = self._group_of
        for data in (self._outliers, self._train):
            if data is not None:
                count = len(data.open())
                if data.split_key == "train_split":
                    self.check(self.k <= count, "k", f"at most the {count} images of {data.split}")

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """As `Classification.judge_batch`, with a column `scores`, float32 `[batch, classes]`."""
        summed, others = super().judge_batch(params, batch)
        logits = self.compute_logits(params, batch).astype(jnp.float32)
        return summed, others | {"scores": logits} | self._features(params, batch)

    def judge_rows(
        self, rows: dict[str, np.ndarray]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics that need the whole split, and a record for each class."""
        results, classes = super().judge_rows(rows)
        logits, labels = rows["scores"], rows["label"]
        hits = rows["predicted"] == labels
        confidence = score_logits(logits)["max_probability"]
        results["aurc"] = area_under_risk(confidence, hits)
        curve = risks(confidence, hits)
        for coverage in self.coverages:
            last = count_covered(coverage, len(hits)) - 1
            results[_name_coverage(coverage)] = float(1 - curve[last])
        temperature = fit_temperature(logits, labels)
        scaled = logits / np.float32(temperature)
        own = np.take_along_axis(scaled, labels[:, None], axis=1)[:, 0]
        results["temperature"] = temperature
        results["scaled_loss"] = float(np.mean(score_logits(scaled)["energy"] - own))
        sure = score_logits(scaled)["max_probability"]
        results["scaled_ece"] = calibration_error(sure, hits, num_bins=NUM_BINS)
        if self.groups:
            names = np.array([self._group_of[i] for i in rows["index"]])
            by_group = {name: float(hits[names == name].mean()) for name in np.unique(names)}
            results["worst_group_top1"] = min(by_group.values())
            results |= {f"group_{name}_top1": value for name, value in by_group.items()}
        return results, classes

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns the results of `Classification.run` and those of `metrics`.

        `NAME_auroc` is the probability that an image of the split has a larger score than one of
        `outlier_data`. The temperature is the one with the least loss on this split, so
        `scaled_loss` is optimistic; `scaled_ece` may be larger than `ece`.
        """
        found: dict[str, float] = super().run(params, details=details)
        if (outliers := self._outliers) is None:
            return found
        scores = [self._score(params, data) for data in (self.data, outliers)]
        results = {f"{name}_auroc": area_under_roc(*(s[name] for s in scores)) for name in _SCORES}
        if (train := self._train) is not None:
            known = _unit(self._score(params, train)["features"])
            near = [
                find_neighbours(
                    known, _unit(s["features"]), k=self.k, mesh=self.mesh, name=self.name
                )
                for s in scores
            ]
            # The cosine similarity of the k-th neighbour; arXiv:2204.06507, equation 2.
            results["knn_auroc"] = area_under_roc(*(products[:, -1] for products, _ in near))
        results["outlier_count"] = len(scores[1]["energy"])
        # The details were written before, without the second dataset.
        return found | results

    @functools.cached_property
    def _score_batch(self) -> Any:
        def score(params: Params, batch: Batch) -> Columns:
            logits = self.compute_logits(params, batch).astype(jnp.float32)
            return {"logits": logits, "mask": batch["mask"]} | self._features(params, batch)

        return self.jit(score)

    def _features(self, params: Params, batch: Batch) -> Columns:
        if self.train_split is None:
            return {}
        return {"features": self.objective.predict(params, batch)["pre_logits"].astype(jnp.float32)}

    def _score(self, params: Params, data: DatasetSpec) -> dict[str, np.ndarray]:
        """The scores of each image that can be read, and its `features` where they are needed."""
        parts: list[dict[str, np.ndarray]] = []
        for rows in self.map_split(self._score_batch, params, data):
            seen = rows["mask"] > 0
            part = score_logits(rows["logits"][seen])
            parts.append(part | {k: rows[k][seen] for k in rows.keys() & {"features"}})
        scores = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]} if parts else {}
        if not scores or not len(scores["energy"]):
            raise self.nothing_to_read(data)
        return scores


def score_logits(logits: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of images by their logits, float `[n, classes]`; each is float `[n]`.

    `max_probability` is that of the softmax (arXiv:1610.02136), `max_logit` the largest logit
    (arXiv:1911.11132), and `energy` log(sum(exp(logits))), the negative free energy
    (arXiv:2010.03759, equation 4).
    """
    most = logits.max(axis=1)
    energy = most + np.log(np.exp(logits - most[:, None]).sum(axis=1))
    return {"max_probability": np.exp(most - energy), "max_logit": most, "energy": energy}


def read_groups(path: str, column: str, source: Source, *, key: str) -> list[str]:
    """The group of each record of a source, in its order, by the path or the name of its file.

    Args:
      path: a CSV file with the columns `image` and `column`; an image is a path that the record's
        path ends in.
      column: which names the groups.
      source: the records.
      key: the config key, for errors.

    Raises:
      UserError: the file can't be read or lacks a column, or an image has no row or several.
    """
    try:
        text = read_bytes(Path(path).expanduser()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{key}: {path} can't be read: {describe_error(e)}") from None
    reader = csv.DictReader(io.StringIO(text))
    columns = reader.fieldnames or []
    for name in ("image", column):
        if name not in columns:
            raise UserError(
                f"{key}: {path} has the columns {', '.join(columns)}; expected {name!r}"
            )
    groups: dict[str, str] = {}
    for row in reader:
        image = (row["image"] or "").removeprefix("./")
        if groups.setdefault(image, row[column] or "") != (row[column] or ""):
            raise UserError(f"{key}: {path} has {image!r} twice, in different groups: expected one")
    found = []
    for index in range(len(source)):
        parts = source.describe(index).split("/")
        names = ("/".join(parts[i:]) for i in range(len(parts)))
        group = next((groups[name] for name in names if name in groups), None)
        if group is None:
            raise UserError(
                f"{key}: {path} has no row for {source.describe(index)!r}: expected its path, or "
                "the end of it, in the column image"
            )
        found.append(group)
    return found


def count_covered(coverage: float, count: int) -> int:
    """The least number of so many images, one or more, that are a share `coverage` of them."""
    return max(int(np.ceil(round(coverage * count, 6))), 1)  # 0.55 * 100 is more than 55.


def _name_coverage(coverage: float) -> str:
    return f"top1_at_{100 * coverage:g}"


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
