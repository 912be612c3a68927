# SPDX-License-Identifier: Apache-2.0
"""Supervised classification."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.losses import LOSSES, smooth_labels
from vit_jax.objectives.base import Batch, Params
from vit_jax.objectives.mixing import mixup
from vit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Supervised:
    """A classifier trained on labels.

    Attributes:
      model: called as `model(images, train=...)`, gives `(logits, out)`.
      num_classes: width of the targets.
      loss_name: key of `LOSSES`.
      label_smoothing: share of the target's mass that is spread over all classes.
      mixup_alpha: of the Beta distribution that mixup draws from; 0 for none.
    """

    model: nn.Module
    num_classes: int
    loss_name: str = "softmax"
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return dict(self.model.init(rng, to_float(batch["image"][:1]), train=False))["params"]

    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        images = to_float(batch["image"])
        targets = jax.nn.one_hot(batch["label"], self.num_classes)
        targets = smooth_labels(targets, self.label_smoothing)
        if self.mixup_alpha:
            images, targets = mixup(rng, images, targets, alpha=self.mixup_alpha)
        return {"image": images, "target": targets}

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs: Any = self.model.apply(
            {"params": params}, batch["image"], train=True, rngs={"dropout": rng}
        )
        loss = LOSSES[self.loss_name](outputs[0], batch["target"]).mean()
        return loss, {"loss": loss}

    def predict(self, params: Params, batch: Batch) -> dict[str, Any]:
        outputs: Any = self.model.apply({"params": params}, to_float(batch["image"]), train=False)
        return outputs[1]


def to_float(images: jax.Array) -> jax.Array:
    """uint8 images to float32 in [-1, 1], as the published weights want them."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def make_supervised(
    *,
    model: nn.Module,
    num_classes: int,
    loss: Literal["softmax", "sigmoid"] = "softmax",
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
) -> Supervised:
    """A `Supervised` objective from config values.

    Raises:
      UserError: label smoothing outside [0, 1), or a negative mixup.
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(f"objective.label_smoothing={label_smoothing}: expected 0 <= value < 1")
    if mixup < 0:
        raise UserError(
            f"objective.mixup={mixup}: expected 0 (none) or the Beta's alpha, such as 0.2"
        )
    return Supervised(model, num_classes, loss, label_smoothing, mixup)


OBJECTIVES = {"supervised": make_supervised}
