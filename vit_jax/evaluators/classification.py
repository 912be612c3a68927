# SPDX-License-Identifier: Apache-2.0
"""Accuracy and loss over a whole split, exact on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.losses import softmax_cross_entropy
from vit_jax.objectives.base import Batch, Objective, Params
from vit_jax.parallel.mesh import process_shards, put_batch
from vit_jax.utils.errors import UserError


def batch_sums(params: Params, batch: Batch, *, objective: Objective) -> dict[str, jax.Array]:
    """Sums over the examples of a batch whose mask is 1."""
    logits = objective.predict(params, batch)["logits"].astype(jnp.float32)
    mask = batch["mask"]
    targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
    return {
        "top1": jnp.sum(mask * (jnp.argmax(logits, axis=-1) == batch["label"])),
        "loss": jnp.sum(mask * softmax_cross_entropy(logits, targets)),
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
    def _batch_sums(self):
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(
            functools.partial(batch_sums, objective=self.objective), out_shardings=replicated
        )

    def run(self, params: Params) -> dict[str, float]:
        """Returns the means `top1` and `loss` and the `count` of examples seen."""
        shards, num_shards = process_shards(self.mesh)
        batches = eval_batches(self.data, shards=shards, num_shards=num_shards)
        sums = [self._batch_sums(params, put_batch(batch, self.mesh)) for batch in batches]
        total = {k: sum(float(s[k]) for s in jax.device_get(sums)) for k in sums[0]}
        count = total.pop("count")
        return {k: v / count for k, v in total.items()} | {"count": int(count)}


def make_classification(
    *, name: str, data: DatasetSpec, objective: Objective, mesh: Mesh, every: int = 0
) -> Classification:
    """A `Classification` from config values, checked."""
    if every < 0:
        raise UserError(f"evals.{name}.every={every}: expected steps, or 0 for the end only")
    return Classification(name, data, every, objective, mesh)


EVALUATORS = {"classification": make_classification}
