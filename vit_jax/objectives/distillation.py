# SPDX-License-Identifier: Apache-2.0
"""Distillation: a student learns from labels and from a teacher that sees the same images."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.losses import distillation_divergence, softmax_cross_entropy
from vit_jax.objectives.base import Batch, Params, check_share
from vit_jax.objectives.pixels import denormalize, normalize
from vit_jax.objectives.supervised import Supervised, make_supervised
from vit_jax.objectives.teacher import Teacher, load_teacher
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import takes_options_of

TEACHER = "teacher"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Supervised):
    """(1 - alpha) times the supervised loss plus alpha times the distance to the teacher.

    A model with a distillation token learns from labels with its first head and from the teacher
    with its second (arXiv:2012.12877, section 3); any other learns both with its one head. The
    teacher sees the same augmented pixels as the student (arXiv:2106.05237), normalised as it
    expects them.

    The other attributes are those of the student and its loss on labels.

    Attributes:
      source: the teacher's checkpoint, which is loaded on first use. The teacher's parameters are
        constants of the step: in no checkpoint, no optimizer state and no average.
      image_shape: height, width and channels of the images that both see.
      kind: "soft" for the divergence from the teacher's probabilities, "hard" for the cross entropy
        with its most likely class.
      alpha: weight of the teacher.
      temperature: softens both distributions where the kind is "soft".
      class_names: of the data by label, which the teacher's must be; None if they are not known.
    """

    source: str
    image_shape: tuple[int, int, int]
    kind: Literal["soft", "hard"]
    alpha: float
    temperature: float
    class_names: tuple[str, ...] | None = None

    takes_any_size = False  # The teacher would have to take them too.

    @functools.cached_property
    def teacher(self) -> Teacher:
        return load_teacher(
            self.source,
            student=self.model,
            num_classes=self.num_classes,
            image_shape=self.image_shape,
            class_names=self.class_names,
        )

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        student = {name: x for name, x in params.items() if name != TEACHER}
        logits, out = self.apply(student, batch["image"], rng)
        taught = out.get("distillation_logits", logits)
        teacher_logits = self._teacher_logits(params[TEACHER], batch["image"])
        label_loss = self.losses(out.get("class_logits", logits), batch["target"]).mean()
        if self.kind == "hard":
            best = jax.nn.one_hot(jnp.argmax(teacher_logits, axis=-1), taught.shape[-1])
            teacher_loss = softmax_cross_entropy(taught, best).mean()
        else:
            teacher_loss = distillation_divergence(taught, teacher_logits, self.temperature).mean()
        loss = (1 - self.alpha) * label_loss + self.alpha * teacher_loss
        metrics = {"loss": loss, "label_loss": label_loss, "teacher_loss": teacher_loss}
        return loss, metrics | self.measure(logits, batch)

    def constants(self) -> dict[str, Any]:
        return {TEACHER: self.teacher.params}

    def notes(self) -> tuple[str, ...]:
        count = sum(x.size for x in jax.tree.leaves(self.teacher.params))
        first = f"teacher from {self.source}: {count:,} parameters, not trained"
        return (first, *(f"  {note}" for note in self.teacher.notes))

    def _teacher_logits(self, params: Params, images: jax.Array) -> jax.Array:
        """Returns float32 `[batch, classes]` for images from `augment`."""
        ours = (self.pixel_mean, self.pixel_std)
        theirs = (self.teacher.pixel_mean, self.teacher.pixel_std)
        if ours != theirs:
            images = normalize(denormalize(images, *ours), *theirs)
        outputs: Any = self.teacher.model.apply({"params": params}, images, train=False)
        return jax.lax.stop_gradient(outputs[0].astype(jnp.float32))


@takes_options_of(make_supervised)
def make_distillation(
    *,
    model: nn.Module,
    num_classes: int,
    image_shape: tuple[int, int, int],
    multi_label: bool = False,
    class_names: tuple[str, ...] | None = None,
    teacher: str | None = None,
    kind: Literal["soft", "hard"] = "soft",
    alpha: float = 0.5,
    temperature: float = 1.0,
    **supervised: Any,
) -> Distillation:
    """Makes a `Distillation` from config values; the rest are those of `make_supervised`.

    `model` is the student, and `teacher` a checkpoint that `load_pretrained` reads, with its own
    pixel statistics. `multi_label` tells whether examples of the data have several labels, and
    `class_names` are theirs. Raises `UserError` if there is no teacher, or if a value is out of its
    range; a teacher that does not fit is found when it is loaded.
    """
    if not teacher:
        raise UserError(
            "objective.teacher is missing: expected a workdir, a file or a name such as "
            "'augreg+imagenet2012:B/16@224' for objective.name='distillation'"
        )
    check_share(alpha=alpha)
    if temperature <= 0:
        raise UserError(f"objective.temperature={temperature}: expected more than 0")
    if multi_label:
        raise UserError(
            "objective.name='distillation' takes one label an example, and the data have several: "
            "expected objective.name='supervised' with loss='sigmoid'"
        )
    student = make_supervised(model=model, num_classes=num_classes, **supervised)
    return Distillation(
        **vars(student),
        source=teacher,
        image_shape=image_shape,
        kind=kind,
        alpha=alpha,
        temperature=temperature,
        class_names=class_names,
    )
