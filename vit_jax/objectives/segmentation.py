# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation: the class of each pixel from the patch tokens of a Vision Transformer."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.losses import softmax_cross_entropy
from vit_jax.objectives.base import Params, headless
from vit_jax.objectives.dense import DenseObjective, Head, check_options
from vit_jax.objectives.pixels import Pixels
from vit_jax.utils.errors import UserError

# The value of pixels without a class, see `data.sources.base`.
IGNORED = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(DenseObjective):
    """Cross entropy of the class of each pixel; pixels of the value `IGNORED` do not count.

    The logits of the head are resized to the label map. The parameters of the head are stored under
    `segmenter`.

    Attributes:
      classes: the names of the classes.
    """

    classes: tuple[str, ...]

    head_params = "segmenter"
    output = "pixel_logits"

    def finish(self, outputs: jax.Array) -> jax.Array:
        """The probability of each class, float32 `[batch, h, w, classes]`."""
        return jax.nn.softmax(outputs)

    def pixel_loss(
        self, params: Params, outputs: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        targets = jax.nn.one_hot(labels, len(self.classes))
        labelled = jnp.maximum(jnp.sum(labels != IGNORED), 1)
        loss = softmax_cross_entropy(outputs, targets).sum() / labelled
        hits = jnp.sum(outputs.argmax(axis=-1) == labels)
        return loss, {"pixel_accuracy": hits / labelled}


@headless
def make_segmentation(
    *,
    model: nn.Module,
    pixel_classes: tuple[str, ...] | None,
    image_shape: tuple[int, int, int],
    head: Head = "linear",
    head_width: int = 256,
    layers: int = 1,
    freeze_backbone: bool = False,
    dropout: float = 0.0,
    flip: float = 0.0,
    color_jitter: float | tuple[float, float, float] = 0.0,
    pixel_mean: Pixels = 0.5,
    pixel_std: Pixels = 0.5,
) -> Segmentation:
    """Makes a `Segmentation` from config values, see `dense.check_options`.

    Raises:
      UserError: a value out of its range, a model that is no `VisionTransformer`, or data without
        classes of pixels.
    """
    options = check_options(
        "segmentation",
        model,
        outputs=len(pixel_classes or ()),
        image_shape=image_shape,
        head=head,
        head_width=head_width,
        layers=layers,
        freeze_backbone=freeze_backbone,
        dropout=dropout,
        flip=flip,
        color_jitter=color_jitter,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )
    if not pixel_classes:
        raise UserError(
            "objective.name='segmentation' needs the class of each pixel: expected data with "
            "masks, such as --config.data.name=masks:FOLDER, or DATASET#mask=FEATURE of TFDS"
        )
    return Segmentation(**options, classes=pixel_classes)
