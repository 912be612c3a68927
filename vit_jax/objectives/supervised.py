# SPDX-License-Identifier: Apache-2.0
"""Supervised classification."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.losses import LOSSES, smooth_labels
from vit_jax.objectives.base import Batch, Params
from vit_jax.objectives.mixing import mixup
from vit_jax.utils.errors import UserError

# One number for all channels, or one for each.
Pixels = float | tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Supervised:
    """A classifier trained on labels.

    Attributes:
      model: called as `model(images, train=...)`, gives `(logits, out)`.
      num_classes: width of the targets.
      loss_name: key of `LOSSES`.
      label_smoothing: share of the target's mass that is spread over all classes.
      mixup_alpha: of the Beta distribution that mixup draws from; 0 for none.
      pixel_mean: of pixels in [0, 1], subtracted from them; one number, or one for each channel.
      pixel_std: what they are divided by then.
    """

    model: nn.Module
    num_classes: int
    loss_name: str = "softmax"
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    pixel_mean: Pixels = 0.5
    pixel_std: Pixels = 0.5

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return dict(self.model.init(rng, self._to_float(batch["image"][:1]), train=False))["params"]

    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        images = self._to_float(batch["image"])
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
        outputs: Any = self.model.apply(
            {"params": params}, self._to_float(batch["image"]), train=False
        )
        return outputs[1]

    def _to_float(self, images: jax.Array) -> jax.Array:
        """uint8 images to float32; to [-1, 1] by default, as the published weights want them."""
        mean, std = (np.asarray(x, np.float32) for x in (self.pixel_mean, self.pixel_std))
        return images.astype(jnp.float32) / (255 * std) - mean / std


def make_supervised(
    *,
    model: nn.Module,
    num_classes: int,
    loss: Literal["softmax", "sigmoid"] = "softmax",
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    pixel_mean: Pixels = 0.5,
    pixel_std: Pixels = 0.5,
) -> Supervised:
    """A `Supervised` objective from config values.

    Raises:
      UserError: label smoothing outside [0, 1), a negative mixup, or a deviation of 0.
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(f"objective.label_smoothing={label_smoothing}: expected 0 <= value < 1")
    if mixup < 0:
        raise UserError(
            f"objective.mixup={mixup}: expected 0 (none) or the Beta's alpha, such as 0.2"
        )
    if min(np.ravel(pixel_std)) <= 0:
        raise UserError(f"objective.pixel_std={pixel_std}: expected more than 0")
    return Supervised(
        model,
        num_classes,
        loss,
        label_smoothing,
        mixup,
        _hashable(pixel_mean),
        _hashable(pixel_std),
    )


def _hashable(pixels: Pixels) -> Pixels:
    return pixels if isinstance(pixels, float | int) else tuple(pixels)


OBJECTIVES = {"supervised": make_supervised}
