# SPDX-License-Identifier: Apache-2.0
"""Supervised classification."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.losses import LOSSES, make_targets, smooth_labels, top1_hits
from vit_jax.models.patches import PatchBatch
from vit_jax.objectives.augment import ERASE_KEY, Augmentation, distort, erase
from vit_jax.objectives.base import Batch, Params
from vit_jax.objectives.mixing import mix
from vit_jax.objectives.pixels import ImageObjective, Pixels, check_pixels
from vit_jax.utils.bounds import read_text
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.registry import takes_options_of

# Tells the draws of patch sizes from other random numbers of a seed.
PATCH_KEY = 1


@dataclasses.dataclass(frozen=True)
class Supervised(ImageObjective):
    """A classifier trained on labels.

    Attributes:
      model: called as `model(images, train=...)`, it returns `(logits, out)`.
      num_classes: width of the targets.
      loss_name: key of `LOSSES`.
      label_smoothing: share of the target's mass that is spread over all classes.
      augmentation: augmentation of training images, on the device.
      class_weights: factors on the terms of the loss, one for each class; None for 1.
      binary_targets: whether any non-zero target becomes 1 after mixing (arXiv:2110.00476).
    """

    model: nn.Module
    num_classes: int
    loss_name: str = "softmax"
    label_smoothing: float = 0.0
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    class_weights: tuple[float, ...] | None = None
    binary_targets: bool = False

    draws_patch_size = True
    takes_any_size = True
    takes_rows = True

    def at_step(self, *, seed: int, step: int) -> "Supervised":
        """The objective with the size of patches that a step draws of `model.patch_sizes`."""
        sizes = getattr(self.model, "patch_sizes", ())
        if not sizes:
            return self
        # All processes draw the same.
        drawn = np.random.default_rng((seed, step, PATCH_KEY)).integers(len(sizes))
        return self.with_model(self.model.at_patch_size(sizes[drawn]))

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        images = self.normalize(batch["image"][:1])
        return dict(self.model.init(rng, images, train=False))["params"]

    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        if "places" in batch:
            return self._prepare_rows(batch)
        options = self.augmentation
        images = self.normalize(distort(rng, batch["image"], options))
        if options.random_erasing:
            erase_rng, mode = jax.random.fold_in(rng, ERASE_KEY), options.random_erasing_mode
            images = erase(erase_rng, images, probability=options.random_erasing, mode=mode)
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
        if self.binary_targets:
            targets = (targets > 0).astype(targets.dtype)
        # An image of two classes has no right answer, so mixing leaves no accuracy to report.
        is_single = batch["label"].ndim == 1 and not (options.mixup or options.cutmix)
        return {"image": images, "target": targets} | (
            {"label": batch["label"]} if is_single else {}
        )

    def _prepare_rows(self, batch: Batch) -> Batch:
        """Prepares rows that images share: labels and targets are `[rows, images, ...]`."""
        label = batch["label"]
        targets = make_targets(join_rows(label), self.num_classes)
        targets = smooth_labels(targets, self.label_smoothing)
        prepared: dict[str, Any] = {
            "image": self.normalize_rows(batch),
            "target": targets.reshape(*label.shape[:2], -1),
        }
        return prepared | ({"label": label} if label.ndim == 2 else {})

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = batch["image"]
        logits, _ = self.apply(params, images, rng)
        metrics = {}
        if isinstance(images, PatchBatch):
            metrics = {"padding": (images.segments == 0).mean(dtype=jnp.float32)}
            if images.is_packed:
                batch = batch | {k: join_rows(batch[k]) for k in ("target", "label") if k in batch}
        loss = self.losses(logits, batch["target"]).mean()
        return loss, {"loss": loss} | metrics | self.measure(logits, batch)

    def predict(self, params: Params, batch: Batch) -> dict[str, Any]:
        outputs: Any = self.model.apply(
            {"params": params}, self.normalize(batch["image"]), train=False
        )
        return outputs[1]

    def apply(self, params: Params, images: jax.Array, rng: jax.Array) -> Any:
        """Returns `(logits, out)` of the model in training, for images from `augment`.

        The logits are `[batch, classes]`; `out` has all outputs by name.
        """
        return self.model.apply({"params": params}, images, train=True, rngs={"dropout": rng})

    def measure(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Returns the accuracy `top1` in training, a float32 scalar, where `augment` left labels.

        The logits are `[batch, classes]`.
        """
        return {"top1": top1_hits(logits, batch["label"]).mean()} if "label" in batch else {}

    def losses(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """The losses, float32 `[batch]`, for logits and targets `[batch, classes]`."""
        return LOSSES[self.loss_name](logits, targets, self.class_weights)


def join_rows(x: jax.Array) -> jax.Array:
    """`[rows, images, ...]` to `[rows * images, ...]`, the order of a model's outputs."""
    return x.reshape(-1, *x.shape[2:])


@takes_options_of(Augmentation)
def make_supervised(
    *,
    model: nn.Module,
    num_classes: int,
    loss: Literal["softmax", "sigmoid"] = "softmax",
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] | str | None = None,
    binary_targets: bool = False,
    pixel_mean: Pixels = 0.5,
    pixel_std: Pixels = 0.5,
    **augmentation: Any,
) -> Supervised:
    """Makes a `Supervised` from config values; `augmentation` are fields of `Augmentation`.

    `class_weights` may be the path of a text file with one number a line. Raises `UserError` if a
    value is out of its range, if the number of class weights is not that of the classes, or if
    targets are binary with another loss than sigmoid or with label smoothing.
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(f"objective.label_smoothing={label_smoothing}: expected 0 <= value < 1")
    if binary_targets and (loss != "sigmoid" or label_smoothing):
        raise UserError(
            f"objective.binary_targets with objective.loss={loss!r}, objective.label_smoothing="
            f"{label_smoothing}: expected loss='sigmoid' and label_smoothing=0"
        )
    mean, std = check_pixels(pixel_mean, pixel_std)
    return Supervised(
        model,
        num_classes,
        loss,
        label_smoothing,
        Augmentation(**augmentation),
        None if class_weights is None else _read_class_weights(class_weights, num_classes),
        binary_targets,
        pixel_mean=mean,
        pixel_std=std,
    )


def _read_class_weights(given: tuple[float, ...] | str, num_classes: int) -> tuple[float, ...]:
    key = "objective.class_weights" + (f"={given!r}" if isinstance(given, str) else "")
    try:
        lines = read_text(given).split() if isinstance(given, str) else given
        weights = tuple(float(x) for x in lines)
    except (OSError, ValueError) as e:
        raise UserError(
            f"{key}: {describe_error(e)}; expected a text file with one number a line"
        ) from None
    if len(weights) != num_classes:
        raise UserError(f"{key}: {len(weights)} weights; expected one for each of {num_classes}")
    if not all(0 <= x < np.inf for x in weights) or not any(weights):
        raise UserError(f"{key}: expected finite weights of at least 0, and not all 0")
    return weights
