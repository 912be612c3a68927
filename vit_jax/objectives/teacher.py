# SPDX-License-Identifier: Apache-2.0
"""Loads the teacher of a distillation."""

import dataclasses
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.rebuild import fill_model, rebuild_model
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.objectives.base import Params
from vit_jax.objectives.pixels import Pixels, check_pixels
from vit_jax.utils.errors import UserError, name_key


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model with its parameters on the host, and with the normalisation that it expects.

    `model(images, train=False)` returns `(logits, out)`; the pixel statistics are those of
    `ImageObjective`, and `notes` has one line for each change that made the model fit.
    """

    model: nn.Module
    params: Params = dataclasses.field(repr=False, compare=False)
    pixel_mean: Pixels = 0.5
    pixel_std: Pixels = 0.5
    notes: tuple[str, ...] = ()


def load_teacher(
    source: str,
    *,
    student: Any,
    num_classes: int,
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...] | None = None,
) -> Teacher:
    """Loads a model of any size and kind that has the student's classes.

    Args:
      source: see `load_pretrained`.
      student: a model; the teacher has the same `dtype` and `constrain`.
      num_classes: number of classes that the teacher must have.
      image_shape: height, width and channels; position embeddings are resized to fit.
      class_names: of the student by label; None if they are not known.

    Raises:
      UserError: it can't be read, has no head, or has other classes.
    """
    try:
        weights = load_pretrained(source)
        run = {k: getattr(student, k) for k in ("dtype", "constrain") if hasattr(student, k)}
        model = rebuild_model(weights, run=run)
        _check_classes(weights, model.num_classes, num_classes)
        _check_names(weights.class_names, class_names)
        params, notes = fill_model(model, weights, image_shape)
    except UserError as e:
        raise name_key("objective.teacher", source, e) from e
    mean, std = (weights.preprocess.get(name, 0.5) for name in ("mean", "std"))
    mean, std = check_pixels(mean, std)
    return Teacher(model, params, mean, std, (*weights.notes, *notes))


def _check_classes(weights: Weights, theirs: int, ours: int) -> None:
    if not theirs:
        raise UserError("it has no head; expected a classifier")
    if theirs != ours:
        raise UserError(f"it has {theirs} classes and the student {ours}: expected the same")
    if not np.any(weights.params.get("head/kernel", 1)):
        raise UserError("its head is all zeros: it was published untrained; expected a classifier")


def _check_names(theirs: tuple[str, ...] | None, ours: tuple[str, ...] | None) -> None:
    for label, (a, b) in enumerate(zip(theirs or (), ours or (), strict=False)):
        if a != b:
            raise UserError(
                f"its class {label} is {a!r} and that of the data {b!r}: expected the same classes "
                "in the same order"
            )
