# SPDX-License-Identifier: Apache-2.0
"""Supervised classification."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.losses import LOSSES, make_targets, smooth_labels
from vit_jax.objectives.augment import ERASE_KEY, Augmentation, distort, erase
from vit_jax.objectives.base import Batch, Params
from vit_jax.objectives.mixing import mix
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import takes_options_of

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
      augmentation: of training images, on the device.
      pixel_mean: of pixels in [0, 1], subtracted from them; one number, or one for each channel.
      pixel_std: what they are divided by then.
    """

    model: nn.Module
    num_classes: int
    loss_name: str = "softmax"
    label_smoothing: float = 0.0
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    pixel_mean: Pixels = 0.5
    pixel_std: Pixels = 0.5

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        return dict(self.model.init(rng, self._to_float(batch["image"][:1]), train=False))["params"]

    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        options = self.augmentation
        images = self._to_float(distort(rng, batch["image"], options))
        if options.random_erasing:
            images = erase(
                jax.random.fold_in(rng, ERASE_KEY),
                images,
                probability=options.random_erasing,
                mode=options.random_erasing_mode,
            )
        targets = make_targets(batch["label"], self.num_classes)
        targets = smooth_labels(targets, self.label_smoothing)
        images, targets = mix(
            rng,
            images,
            targets,
            mixup_alpha=options.mixup,
            cutmix_alpha=options.cutmix,
            switch_prob=options.mixup_switch_prob,
        )
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
        """0 to 255 to float32; to [-1, 1] by default, as the published weights want them."""
        mean, std = (np.asarray(x, np.float32) for x in (self.pixel_mean, self.pixel_std))
        return images.astype(jnp.float32) / (255 * std) - mean / std


@takes_options_of(Augmentation)
def make_supervised(
    *,
    model: nn.Module,
    num_classes: int,
    loss: Literal["softmax", "sigmoid"] = "softmax",
    label_smoothing: float = 0.0,
    pixel_mean: Pixels = 0.5,
    pixel_std: Pixels = 0.5,
    **augmentation: Any,
) -> Supervised:
    """A `Supervised` objective from config values; `augmentation` are fields of `Augmentation`.

    Raises:
      UserError: label smoothing outside [0, 1), a deviation of 0, or a wrong augmentation.
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(f"objective.label_smoothing={label_smoothing}: expected 0 <= value < 1")
    if min(np.ravel(pixel_std)) <= 0:
        raise UserError(f"objective.pixel_std={pixel_std}: expected more than 0")
    return Supervised(
        model,
        num_classes,
        loss,
        label_smoothing,
        Augmentation(**augmentation),
        _hashable(pixel_mean),
        _hashable(pixel_std),
    )


def _hashable(pixels: Pixels) -> Pixels:
    return pixels if isinstance(pixels, float | int) else tuple(pixels)


OBJECTIVES = {"supervised": make_supervised}
