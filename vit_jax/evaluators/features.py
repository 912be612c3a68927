# SPDX-License-Identifier: Apache-2.0
"""Evaluators of frozen features: a simple classifier is fit to one split and tested on another."""

import abc
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.base import check_every, map_split, replicate_outputs, write_details
from vit_jax.objectives.base import Batch, Objective, Params
from vit_jax.observe.console import log
from vit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of a split, float32 `[n, width]`, and its labels, int32 `[n]`, in memory."""

    features: np.ndarray
    labels: np.ndarray


def batch_features(params: Params, batch: Batch, *, objective: Objective) -> dict[str, jax.Array]:
    """The input of the head for each example of a batch, with its label and mask."""
    features = objective.predict(params, batch)["pre_logits"].astype(jnp.float32)
    return {"features": features, "label": batch["label"], "mask": batch["mask"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureEvaluator(abc.ABC):
    """Computes the features of both splits once for each `run`.

    Attributes:
      name: prefix of its metrics.
      data: the split that is tested on; may be of another dataset than the run is trained on.
      train_data: the split that is fit to.
      every: steps between evaluations; 0 for the end only.
      objective: whose `pre_logits` are the features.
      mesh: that the batches are put on.
    """

    name: str
    data: DatasetSpec
    train_data: DatasetSpec
    every: int
    objective: Objective
    mesh: Mesh

    @property
    @abc.abstractmethod
    def metrics(self) -> tuple[str, ...]: ...

    @abc.abstractmethod
    def judge(self, train: Features, test: Features) -> tuple[dict[str, float], dict[str, Any]]:
        """Results by metric, and more of them for the file of details."""

    def open(self) -> None:
        self.data.open()
        self.train_data.open()

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Results by metric, and the `count` of examples tested on.

        Raises:
          UserError: no image of a split can be read.
        """
        train, test = (self._read(params, data) for data in (self.train_data, self.data))
        results, more = self.judge(train, test)
        results |= {"count": len(test.labels)}
        if details is not None:
            write_details(details, {"results": results} | more)
        return results

    @functools.cached_property
    def _said(self) -> set[str]:
        # Splits whose size has been said.
        return set()

    @functools.cached_property
    def _corrupt(self) -> CorruptCounter:
        return CorruptCounter()

    @functools.cached_property
    def _batch_features(self):
        return replicate_outputs(
            functools.partial(batch_features, objective=self.objective), self.mesh
        )

    def _read(self, params: Params, data: DatasetSpec) -> Features:
        total = len(data.open())
        found, start = None, 0
        for rows in map_split(
            self._batch_features,
            params,
            data,
            name=self.name,
            mesh=self.mesh,
            corrupt=self._corrupt,
        ):
            if found is None:
                found = self._allocate(total, rows["features"].shape[1:], data)
            seen = rows["mask"] > 0
            stop = start + int(seen.sum())
            found.features[start:stop] = rows["features"][seen]
            found.labels[start:stop] = rows["label"][seen]
            start = stop
        if found is None or not start:
            raise UserError(f"evals.{self.name}: no image of {data.split} can be read")
        return Features(found.features[:start], found.labels[:start])

    def _allocate(self, total: int, shape: tuple[int, ...], data: DatasetSpec) -> Features:
        if len(shape) != 1:
            raise UserError(
                f"evals.{self.name}: the model gives features of the shape {shape} for an image; "
                "expected a vector: set model.classifier to 'token', 'gap' or 'map'"
            )
        if data.split not in self._said:
            self._said.add(data.split)
            size = 4 * total * shape[0] / 2**20
            log(
                f"{self.name}: features of {total:,} images of {data}, {shape[0]:,} values each: "
                f"{size:,.1f} MiB of host memory"
            )
        return Features(np.empty((total, *shape), np.float32), np.empty(total, np.int32))


def make_splits(data: DatasetSpec, train_split: str, *, every: int, name: str) -> dict[str, Any]:
    """The arguments `data, train_data, every` of a `FeatureEvaluator`, checked."""
    check_every(every, name=name)
    if data.info.multi_label:
        raise UserError(
            f"evals.{name}: {data} has several labels an example; expected a dataset with one"
        )
    train = dataclasses.replace(data, split=train_split, split_key="train_split")
    return {"data": data, "train_data": train, "every": every}


def whiten(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Shifts and scales features so that those of `train` have mean 0 and deviation 1."""
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-5
    return [(x - mean) / std for x in (train, *others)]
