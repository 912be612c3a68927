# SPDX-License-Identifier: Apache-2.0
"""Accuracy of each head of a linear probe over a whole split."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.base import check_every, map_split, replicate_outputs, write_details
from vit_jax.losses import make_targets, softmax_cross_entropy
from vit_jax.objectives.base import Batch, Objective, Params
from vit_jax.objectives.linear_probe import LinearProbe
from vit_jax.utils.errors import UserError


def batch_sums(params: Params, batch: Batch, *, objective: LinearProbe) -> dict[str, jax.Array]:
    """Sums over the examples of a batch whose mask is 1; `top1` and `loss` are `[heads]`."""
    logits, mask = objective.predict(params, batch)["head_logits"], batch["mask"]
    targets = make_targets(batch["label"], logits.shape[-1])
    hits = jnp.argmax(logits, axis=-1) == batch["label"]
    losses = softmax_cross_entropy(logits, targets[None])
    return {
        "top1": jnp.sum(mask * hits, axis=1),
        "loss": jnp.sum(mask * losses, axis=1),
        "count": jnp.sum(mask),
    }


@dataclasses.dataclass(frozen=True)
class Probes:
    """Top-1 accuracy and cross entropy of each head, and of the best one.

    Attributes:
      name: prefix of its metrics, such as `val`.
      data: the split.
      every: steps between evaluations; 0 for the end only.
      objective: a linear probe.
      mesh: that the batches are put on.
      choose: whether the head that the run names at its end is the best one here.
    """

    name: str
    data: DatasetSpec
    every: int
    objective: LinearProbe
    mesh: Mesh
    choose: bool

    @property
    def metrics(self) -> tuple[str, ...]:
        heads = self.objective.head_names
        return ("top1", "loss", *(f"{name}_{x}" for name in heads for x in ("top1", "loss")))

    @functools.cached_property
    def _batch_sums(self):
        return replicate_outputs(functools.partial(batch_sums, objective=self.objective), self.mesh)

    @functools.cached_property
    def _corrupt(self) -> CorruptCounter:
        return CorruptCounter()

    def open(self) -> None:
        self.data.open()

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns `x0.1_top1` and `x0.1_loss` of each head, and the `count` of examples seen.

        `top1` and `loss` are those of the head that is best on this split.

        Raises:
          UserError: no image can be read.
        """
        sums = list(
            map_split(
                self._batch_sums,
                params,
                self.data,
                name=self.name,
                mesh=self.mesh,
                corrupt=self._corrupt,
            )
        )
        count = sum(float(s["count"]) for s in sums)
        if not count:
            raise UserError(f"evals.{self.name}: no image of {self.data.split} can be read")
        means = {key: np.sum([s[key] for s in sums], axis=0) / count for key in ("top1", "loss")}
        names = self.objective.head_names
        heads = list(zip(names, means["top1"], means["loss"], strict=True))
        results = {f"{name}_top1": float(value) for name, value, _ in heads}
        results |= {f"{name}_loss": float(value) for name, _, value in heads}
        _, best, its_loss = max(heads, key=lambda head: head[1])
        results |= {"top1": float(best), "loss": float(its_loss), "count": int(count)}
        if details is not None:
            write_details(details, {"results": results})
        return results


def make_probes(
    *,
    name: str,
    data: DatasetSpec,
    objective: Objective,
    mesh: Mesh,
    every: int = 0,
    choose: bool = False,
) -> Probes:
    """A `Probes` from config values, checked."""
    check_every(every, name=name)
    if not isinstance(objective, LinearProbe):
        raise UserError(
            f"evals.{name}.name='probes' judges objective.name='linear_probe'; expected "
            "'classification' here"
        )
    return Probes(name, data, every, objective, mesh, choose)
