# SPDX-License-Identifier: Apache-2.0
"""Classification by the nearest neighbours of normalised features.

Source: Wu et al., arXiv:1805.01978, section 3.4, with the numbers of DINO (arXiv:2104.14294): each
of the k neighbours votes with exp(cosine similarity / 0.07).
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.evaluators.base import Columns
from vit_jax.evaluators.features import FeatureEvaluator, Features, put, shard_rows
from vit_jax.objectives.base import Batch, Params
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.parallel.mesh import batch_sharding
from vit_jax.runtime.preemption import interruptible

# Number of similarities that are in memory at a time.
_MAX_SIMILARITIES = 2**26
# Number of test examples that vote at a time.
_VOTERS = 4096


def find_neighbours(
    train: np.ndarray, test: np.ndarray, *, k: int, mesh: Mesh, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k rows of `train` that have the largest products with each row of `test`.

    The rows of `test` are sharded over the mesh; each block of `train` is replicated in turn.

    Args:
      train: float32 `[n, width]`; of equal products, earlier rows come first.
      test: float32 `[m, width]`.
      k: number of rows, at most n.
      mesh: the mesh to compute on.
      name: name of the evaluator, for the log.

    Returns:
      The products, float32 `[m, k]` in descending order, and the rows, int32 `[m, k]`.

    Raises:
      Preempted: the job was asked to stop.
    """
    rows, everywhere = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    queries = shard_rows(test, mesh)
    size = min(len(train), max(_MAX_SIMILARITIES // len(queries), k))
    best = (
        shard_rows(np.full((len(queries), k), -np.inf, np.float32), mesh),
        shard_rows(np.zeros((len(queries), k), np.int32), mesh),
    )
    merge = jax.jit(functools.partial(_merge_block, k=k), out_shardings=(rows, rows))
    with ProgressLog(f"{name}: neighbours", total=len(train), unit="images") as progress:
        for start in interruptible(range(0, len(train), size)):
            block = train[start : start + size]
            valid = len(block)
            block = np.pad(block, ((0, size - valid), (0, 0)))
            best = merge(best, queries, put(block, everywhere), start, valid)
            jax.block_until_ready(best)  # So that few blocks are on the device at a time.
            progress.advance(valid)
    gather = jax.jit(lambda x: x, out_shardings=everywhere)
    products, found = (np.asarray(gather(x))[: len(test)] for x in best)
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
    # The best so far come first, so that earlier rows win ties.
    values, where = jax.lax.top_k(jnp.concatenate([best[0], products], axis=1), k)
    indices = jnp.concatenate([best[1], found], axis=1)
    return values, jnp.take_along_axis(indices, where, axis=1)


def vote(
    similarities: np.ndarray, labels: np.ndarray, *, num_classes: int, temperature: float
) -> np.ndarray:
    """Finds the class with the most votes, int64 `[m]`; of equal ones, the first.

    A neighbour's vote is exp(similarity / temperature). `similarities`, float, and `labels`, int,
    are those of the neighbours, `[m, k]`.
    """
    shares = functools.partial(share_votes, num_classes=num_classes, temperature=temperature)
    predicted = np.zeros(len(labels), np.int64)
    for start in range(0, len(labels), _VOTERS):
        several = slice(start, start + _VOTERS)
        predicted[several] = shares(similarities[several], labels[several]).argmax(axis=1)
    return predicted


def share_votes(
    similarities: np.ndarray, labels: np.ndarray, *, num_classes: int, temperature: float
) -> np.ndarray:
    """Returns the share of each class in the votes of `vote`, float64 `[m, num_classes]`.

    A neighbour with a similarity of minus infinity has no vote; without any vote all classes have
    the same share.
    """
    near = similarities.astype(np.float64)
    # Subtracting the largest changes no vote's share and avoids an overflow.
    largest = near.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp((near - np.where(np.isfinite(largest), largest, 0)) / temperature)
    votes = np.zeros((len(weights), num_classes))
    np.add.at(votes, (np.arange(len(weights))[:, None], labels), weights)
    votes[weights.sum(axis=1) == 0] = 1
    return votes / votes.sum(axis=1, keepdims=True)


def rankme(features: np.ndarray) -> float:
    """Returns how many directions features use, from 1 to the width (arXiv:2210.02885, equation 1).

    It is the exponential of the entropy of the singular values of `features`, float `[n, width]`,
    after division by their sum. Labels are not needed: it shows a collapse.
    """
    x = features.astype(np.float64)
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(x.T @ x), 0))
    p = singular / max(singular.sum(), 1e-30) + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestNeighbours(FeatureEvaluator):
    """Accuracy of the vote of k neighbours, for each of several k, and `rankme` of the features.

    Attributes:
      k: numbers of neighbours.
      of: what is compared: the `features` of the model, or the `pixels` of the images, which shows
        what the same vote reaches without a model.
      temperature: divides the similarities before the exponential.
    """

    k: tuple[int, ...] = (20,)
    of: Literal["features", "pixels"] = "features"
    temperature: float = 0.07

    def __post_init__(self) -> None:
        self.check(min(self.k, default=0) >= 1, "k", "numbers of at least 1, such as (10, 20)")
        self.check(self.temperature > 0, "temperature", "more than 0")
        super().__post_init__()

    @property
    def reads_params(self) -> bool:
        return self.of == "features"

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(f"{k}nn" for k in self.k)

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Columns: `features`, float32 `[batch, width]`, and `label`, int32 `[batch]`."""
        if self.of == "features":
            return super().judge_batch(params, batch)
        pixels = batch["image"].reshape(len(batch["image"]), -1).astype(jnp.float32)
        return {}, {"features": pixels, "label": batch["label"]}

    def open(self) -> None:
        super().open()
        self._check_count(len(self.train_data.open()))

    def _check_count(self, count: int) -> None:
        expected = f"at most the {count} examples of {self.train_split} of {self.data}"
        self.check(max(self.k) <= count, "k", expected)

    def judge(self, train: Features, test: Features) -> tuple[dict[str, float], dict[str, Any]]:
        self._check_count(len(train.labels))
        x, x_test = (
            x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
            for x in (train.features, test.features)
        )
        near, found = find_neighbours(x, x_test, k=max(self.k), mesh=self.mesh, name=self.name)
        labels = train.labels[found]
        options = {"num_classes": self.data.info.num_classes, "temperature": self.temperature}
        results = {}
        for metric, k in zip(self.metrics, self.k, strict=True):
            predicted = vote(near[:, :k], labels[:, :k], **options)
            results[metric] = float(np.mean(predicted == test.labels))
        results["rankme"] = rankme(test.features)
        return results, {"temperature": self.temperature}
