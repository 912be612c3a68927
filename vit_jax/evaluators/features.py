# SPDX-License-Identifier: Apache-2.0
"""Evaluators of frozen features: a simple classifier is fit to one split and tested on another."""

import abc
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.base import Columns, Evaluator, write_details
from vit_jax.objectives.base import Batch, Params
from vit_jax.observe.console import log
from vit_jax.parallel.mesh import BATCH_AXES, batch_sharding
from vit_jax.utils.errors import UserError
from vit_jax.utils.text import describe_size


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of a split, float32 `[n, width]`, and its labels, int32 `[n]`, in memory."""

    features: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureEvaluator(Evaluator):
    """Computes the features of two splits, `pre_logits`, and fits a classifier to those of one.

    A subclass defines `metrics` and `judge`.

    Attributes:
      data: the split that the classifier is tested on; it need not be of the dataset that the run
        is trained on.
      train_split: the split of the same dataset that it is fit to.
    """

    train_split: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.info.multi_label:
            raise UserError(
                f"evals.{self.name}: {self.data} has several labels an example; expected a "
                "dataset with one"
            )

    @property
    def train_data(self) -> DatasetSpec:
        """The split that the classifier is fit to."""
        return dataclasses.replace(self.data, split=self.train_split, split_key="train_split")

    @abc.abstractmethod
    def judge(self, train: Features, test: Features) -> tuple[dict[str, float], dict[str, Any]]:
        """Returns results by metric, and more of them for the file of details."""

    def open(self) -> None:
        super().open()
        self.train_data.open()

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Columns: `features`, float32 `[batch, width]`, and `label`, int32 `[batch]`."""
        features = self.objective.predict(params, batch)["pre_logits"].astype(jnp.float32)
        return {}, {"features": features, "label": batch["label"]}

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns results by metric, and the `count` of examples of the test split."""
        train, test = (self._read(params, data) for data in (self.train_data, self.data))
        results, more = self.judge(train, test)
        results |= {"count": len(test.labels)}
        write_details(details, {"results": results} | more)
        return results

    @functools.cached_property
    def _logged(self) -> set[str]:
        # Splits whose size has been logged.
        return set()

    def _read(self, params: Params, data: DatasetSpec) -> Features:
        total = len(data.open())
        found, start = None, 0
        for _, rows in self.map_split(self.sum_batch, params, data):
            if found is None:
                found = self._allocate(total, rows["features"].shape[1:], data)
            seen = rows["mask"] > 0
            stop = start + int(seen.sum())
            found.features[start:stop] = rows["features"][seen]
            found.labels[start:stop] = rows["label"][seen]
            start = stop
        if found is None or not start:
            raise self.nothing_to_read(data)
        return Features(found.features[:start], found.labels[:start])

    def _allocate(self, total: int, shape: tuple[int, ...], data: DatasetSpec) -> Features:
        if len(shape) != 1:
            raise UserError(
                f"evals.{self.name}: the model gives features of the shape {shape} for an image; "
                "expected a vector: set model.classifier to 'token', 'gap' or 'map'"
            )
        if data.split not in self._logged:
            self._logged.add(data.split)
            size = describe_size(4 * total * shape[0])
            log(
                f"{self.name}: features of {total:,} images of {data}, {shape[0]:,} values each: "
                f"{size} of host memory"
            )
        return Features(np.empty((total, *shape), np.float32), np.empty(total, np.int32))


def whiten(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Shifts and scales features so that those of `train` have mean 0 and deviation 1.

    All are float `[n, width]`, and are returned in the same order, shapes and dtypes.
    """
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-5
    return [(x - mean) / std for x in (train, *others)]


def shard_rows(x: np.ndarray, mesh: Mesh, *, size: int = 0) -> jax.Array:
    """Shards `[n, ...]` over the batch axes of a mesh.

    Rows of zeros are added, up to `size` rows at least and to a multiple of what the axes divide.
    """
    size = max(size, len(x))
    size += -size % math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    padding = [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)]
    return put(np.pad(x, padding), batch_sharding(mesh))


def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Makes a global array, of any shape and dtype, of one that each process has whole."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
