# SPDX-License-Identifier: Apache-2.0
"""Accuracy of each head of a linear probe over a whole split."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from vit_jax.evaluators.base import Columns, Evaluator, write_details
from vit_jax.losses import make_targets, softmax_cross_entropy
from vit_jax.objectives.base import Batch, Params
from vit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probes(Evaluator):
    """Top-1 accuracy and cross entropy of each head, and of the best one.

    Attributes:
      objective: has several heads, such as a `LinearProbe`.
    """

    choose: bool = False

    judges_head = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.head_names:
            raise UserError(
                f"evals.{self.name}.name='probes' is for objective.name='linear_probe'; expected "
                "'classification' here"
            )

    @property
    def head_names(self) -> tuple[str, ...]:
        return self.objective.head_names

    @property
    def metrics(self) -> tuple[str, ...]:
        heads = (f"{name}_{metric}" for name in self.head_names for metric in ("top1", "loss"))
        return ("top1", "loss", *heads)

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Columns to sum: `top1` and `loss`, float32 `[batch, heads]`."""
        logits = self.objective.predict(params, batch)["head_logits"]
        hits = jnp.argmax(logits, axis=-1) == batch["label"]
        losses = softmax_cross_entropy(logits, make_targets(batch["label"], logits.shape[-1])[None])
        return {"top1": hits.T, "loss": losses.T}, {}

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns `HEAD_top1` and `HEAD_loss` of each head, and the `count` of examples.

        `top1` and `loss` are those of the head with the best accuracy on this split. The JSON file
        of details has the same results.
        """
        sums, count, _ = self.sum_split(params)
        top1, loss = ((sums[key] / count).tolist() for key in ("top1", "loss"))
        results = {f"{name}_top1": x for name, x in zip(self.head_names, top1, strict=True)}
        results |= {f"{name}_loss": x for name, x in zip(self.head_names, loss, strict=True)}
        best = top1.index(max(top1))
        results |= {"top1": top1[best], "loss": loss[best], "count": count}
        write_details(details, {"results": results})
        return results
