# SPDX-License-Identifier: Apache-2.0
"""Classification by the nearest neighbours of normalised features.

Source: Wu et al., arXiv:1805.01978, section 3.4, with the numbers of DINO (arXiv:2104.14294): each
of the k neighbours votes with exp(cosine similarity / 0.07).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.features import FeatureEvaluator, Features, make_splits
from vit_jax.objectives.base import Objective
from vit_jax.observe.progress import ProgressLog
from vit_jax.parallel.mesh import BATCH_AXES, batch_sharding
from vit_jax.runtime.preemption import interruptible
from vit_jax.utils.errors import UserError

# Similarities that are in memory at a time.
_MAX_SIMILARITIES = 2**26
# Test examples that vote at a time.
_VOTERS = 4096


def find_neighbours(
    train: np.ndarray, test: np.ndarray, *, k: int, mesh: Mesh, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `train` of the largest product with each row of `test`.

    The rows of `test` stay on the mesh, spread over it; those of `train` pass by in blocks.

    Args:
      train: float32 `[n, width]`; of equal products, earlier rows come first.
      test: float32 `[m, width]`.
      k: at most n.
      mesh: to compute on.
      name: of the evaluator, for the screen.

    Returns:
      The products, float32 `[m, k]` in descending order, and the rows, int32 `[m, k]`.

    Raises:
      Preempted: the job was told to stop.
    """
    count = len(test)
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    test = np.pad(test, ((0, -count % parts), (0, 0)))
    size = min(len(train), max(_MAX_SIMILARITIES // len(test), k))
    rows = batch_sharding(mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    queries = _put(test, rows)
    best = (
        _put(np.full((len(test), k), -np.inf, np.float32), rows),
        _put(np.zeros((len(test), k), np.int32), rows),
    )
    merge = jax.jit(functools.partial(_merge_block, k=k), out_shardings=(rows, rows))
    pace = ProgressLog(f"{name}: neighbours", total=len(train), unit="images")
    for start in interruptible(range(0, len(train), size)):
        block = train[start : start + size]
        valid = len(block)
        block = np.pad(block, ((0, size - valid), (0, 0)))
        best = merge(best, queries, _put(block, everywhere), start, valid)
        jax.block_until_ready(best)  # Else all blocks would wait on the device.
        pace.advance(valid)
    gather = jax.jit(lambda x: x, out_shardings=everywhere)
    products, found = (np.asarray(gather(x))[:count] for x in best)
    return products, found


def _merge_block(
    best: tuple[jax.Array, jax.Array],
    queries: jax.Array,
    block: jax.Array,
    start: jax.Array,
    valid: jax.Array,
    *,
    k: int,
) -> tuple[jax.Array, jax.Array]:
    # Accelerators would round the factors by default.
    products = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
    position = jnp.arange(len(block))
    products = jnp.where(position < valid, products, -jnp.inf)
    found = jnp.broadcast_to(start + position, products.shape).astype(jnp.int32)
    # The best so far stand in front, as they come from earlier rows.
    values, where = jax.lax.top_k(jnp.concatenate([best[0], products], axis=1), k)
    indices = jnp.concatenate([best[1], found], axis=1)
    return values, jnp.take_along_axis(indices, where, axis=1)


def _put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def vote(
    similarities: np.ndarray, labels: np.ndarray, *, num_classes: int, temperature: float
) -> np.ndarray:
    """The class with the most votes, of equal ones the first.

    Args:
      similarities: `[m, k]` of the neighbours.
      labels: `[m, k]` of the neighbours.
      num_classes: labels are below it.
      temperature: that similarities are divided by; a vote is the exponential of that.
    """
    predicted = np.zeros(len(labels), np.int64)
    for start in range(0, len(labels), _VOTERS):
        several = slice(start, start + _VOTERS)
        near = similarities[several].astype(np.float64)
        # Less the largest, which changes no vote's share and can't overflow.
        weights = np.exp((near - near.max(axis=1, keepdims=True)) / temperature)
        votes = np.zeros((len(weights), num_classes))
        np.add.at(votes, (np.arange(len(weights))[:, None], labels[several]), weights)
        predicted[several] = votes.argmax(axis=1)
    return predicted


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestNeighbours(FeatureEvaluator):
    """Accuracy of the vote of k neighbours, for each of several k.

    Attributes:
      k: numbers of neighbours.
      temperature: of the votes.
    """

    k: tuple[int, ...]
    temperature: float

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(f"{k}nn" for k in self.k)

    def open(self) -> None:
        super().open()
        self._check(len(self.train_data.open()))

    def _check(self, count: int) -> None:
        if max(self.k) > count:
            raise UserError(
                f"evals.{self.name}.k={self.k}: expected at most the {count} examples of "
                f"{self.train_data.split} of {self.data}"
            )

    def judge(self, train: Features, test: Features) -> tuple[dict[str, float], dict[str, Any]]:
        self._check(len(train.labels))
        similarities, found = find_neighbours(
            _normalise(train.features),
            _normalise(test.features),
            k=max(self.k),
            mesh=self.mesh,
            name=self.name,
        )
        labels = train.labels[found]
        results = {}
        for metric, k in zip(self.metrics, self.k, strict=True):
            predicted = vote(
                similarities[:, :k],
                labels[:, :k],
                num_classes=self.data.info.num_classes,
                temperature=self.temperature,
            )
            results[metric] = float(np.mean(predicted == test.labels))
        return results, {"temperature": self.temperature}


def _normalise(features: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, 1e-12)


def make_knn(
    *,
    name: str,
    data: DatasetSpec,
    objective: Objective,
    mesh: Mesh,
    train_split: str,
    every: int = 0,
    k: tuple[int, ...] = (20,),
    temperature: float = 0.07,
) -> NearestNeighbours:
    """A `NearestNeighbours` from config values, checked."""
    if not k or min(k) < 1:
        raise UserError(f"evals.{name}.k={k}: expected numbers of at least 1, such as (10, 20)")
    if temperature <= 0:
        raise UserError(f"evals.{name}.temperature={temperature}: expected more than 0")
    splits = make_splits(data, train_split, every=every, name=name)
    return NearestNeighbours(
        name=name, objective=objective, mesh=mesh, k=tuple(k), temperature=temperature, **splits
    )
