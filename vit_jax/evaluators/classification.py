# SPDX-License-Identifier: Apache-2.0
"""Accuracy and loss over a whole split, exact on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.losses import make_targets, sigmoid_cross_entropy, softmax_cross_entropy
from vit_jax.objectives.base import Batch, Objective, Params
from vit_jax.parallel.mesh import process_shards, put_batch
from vit_jax.utils.errors import UserError


def batch_sums(params: Params, batch: Batch, *, objective: Objective) -> dict[str, jax.Array]:
    """Sums over the examples of a batch whose mask is 1.

    Where examples have several labels, `top1` counts those whose most likely class is one of them,
    and `loss` is the sum of binary cross entropies.
    """
    logits = objective.predict(params, batch)["logits"].astype(jnp.float32)
    mask = batch["mask"]
    targets = make_targets(batch["label"], logits.shape[-1])
    several = batch["label"].ndim == 2
    hits = jnp.take_along_axis(targets, jnp.argmax(logits, axis=-1)[:, None], axis=-1)[:, 0]
    loss = sigmoid_cross_entropy if several else softmax_cross_entropy
    return {
        "top1": jnp.sum(mask * hits),
        "loss": jnp.sum(mask * loss(logits, targets)),
        "count": jnp.sum(mask),
    }


@dataclasses.dataclass(frozen=True)
class Classification:
    """Top-1 accuracy and cross entropy.

    Attributes:
      name: prefix of its metrics, such as `val`.
      data: the split.
      every: steps between evaluations; 0 for the end only.
      objective: whose predictions are judged.
      mesh: that the batches are put on.
    """

    name: str
    data: DatasetSpec
    every: int
    objective: Objective
    mesh: Mesh

    @functools.cached_property
    def _corrupt(self) -> CorruptCounter:
        # Of all evaluations, so that a record is named but once.
        return CorruptCounter()

    @functools.cached_property
    def _batch_sums(self):
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(
            functools.partial(batch_sums, objective=self.objective), out_shardings=replicated
        )

    def run(self, params: Params) -> dict[str, float]:
        """Returns the means `top1` and `loss` and the `count` of examples seen.

        Records that can't be read are left out; if there are any, `corrupt` is their number.

        Raises:
          UserError: none can be read.
        """
        shards, num_shards = process_shards(self.mesh)
        batches = eval_batches(
            self.data, shards=shards, num_shards=num_shards, corrupt=self._corrupt
        )
        sums = [self._batch_sums(params, put_batch(batch, self.mesh)) for batch in batches]
        total = {k: sum(float(s[k]) for s in jax.device_get(sums)) for k in sums[0]}
        count = int(total.pop("count"))
        if not count:
            raise UserError(f"evals.{self.name}: no image of {self.data.split} can be read")
        results = {k: v / count for k, v in total.items()} | {"count": count}
        if corrupt := len(self.data.open()) - count:
            results["corrupt"] = corrupt
        return results


def make_classification(
    *, name: str, data: DatasetSpec, objective: Objective, mesh: Mesh, every: int = 0
) -> Classification:
    """A `Classification` from config values, checked."""
    if every < 0:
        raise UserError(f"evals.{name}.every={every}: expected steps, or 0 for the end only")
    return Classification(name, data, every, objective, mesh)


EVALUATORS = {"classification": make_classification}
