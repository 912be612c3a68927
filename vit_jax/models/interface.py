# SPDX-License-Identifier: Apache-2.0
"""What the rest of the package needs of a model: one of its own, or one from outside.

A model is a Flax module with the attribute `num_classes`, 0 for none but the representation. It is
called as `model(images, train=...)` with float images `[batch, height, width, channels]` and gives
`(logits, out)`: float32 logits `[batch, num_classes]`, and a dict that has `logits` too, and
`pre_logits` `[batch, width]`, the input of the head. In training it may draw random numbers from
the stream `dropout`.

It may have more: the method `grid`, from (height, width) to (rows, columns) of patches, which
refuses sizes that do not fit; the arguments `constrain` (see `models.block_config.Constrain`),
`float8` and `dtype`; the number `num_class_tokens`, if its position embeddings are to be resized.

A model of images and texts has `towers`, its models by name, and `context_length`, and is called
with images and tokens; see `models.two_towers`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.models.block_config import unconstrained
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import report_failure

Model = Any  # types of Flax modules are of little help


def takes_any_size(model: Model) -> bool:
    """Whether the images of a model are columns of patches (see `data.ops.patches`)."""
    return getattr(getattr(model, "img", model), "any_size", False)


def find_grid(model: Model, image_size: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of patches in an image of (height, width) pixels; None without patches.

    Raises:
      UserError: the model does not take images of this size.
    """
    return model.grid(image_size) if hasattr(model, "grid") else None


def find_position_grid(model: Model, image_size: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of the position embeddings of a model for images of (height, width) pixels.

    They are those of the images unless the model resizes its embeddings. Errors are as in
    `find_grid`.
    """
    tower = getattr(model, "img", model)
    return getattr(tower, "posemb_grid", None) or find_grid(model, image_size)


def example_inputs(model: Model, image_shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """One blank image of (height, width, channels), and one text if the model takes texts too."""
    images = jnp.zeros((1, *image_shape))
    if not hasattr(model, "towers"):
        return (images,)
    return images, jnp.zeros((1, model.context_length), jnp.int32)


def unsharded(model: Model) -> Model:
    """The model as it runs on one device of any kind."""
    if hasattr(model, "towers"):
        model = model.clone(**{name: unsharded(tower) for name, tower in model.towers.items()})
    if hasattr(model, "attention"):
        model = model.clone(attention="xla", blocks="xla")
    return model.clone(constrain=unconstrained) if hasattr(model, "constrain") else model


def check_outputs(model: Model, name: str, image_shape: tuple[int, ...]) -> None:
    """Raises `UserError` unless a model gives what the package needs of it.

    Args:
      model: to be traced, without computing anything.
      name: of the model in the config.
      image_shape: height, width and channels.
    """
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        raise UserError(f"model.name={name!r} gives a model without the attribute num_classes")
    # A mesh may not divide a batch of one image.
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with report_failure(f"model.name={name!r}", name):
        find_grid(model, image_shape[:2])
        init = functools.partial(unsharded(model).init_with_output, train=False)
        given, _ = jax.eval_shape(init, jax.random.key(0), images)
    logits, out = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(out, dict) or "pre_logits" not in out:
        wrong = "expected (logits, out), and 'pre_logits' and 'logits' in the dict out"
    elif num_classes and getattr(logits, "shape", None) != (1, num_classes):
        wrong = f"expected logits [batch, {num_classes}]"
    elif num_classes and "logits" not in out:
        wrong = "expected 'logits' in out too"
    else:
        return
    shown = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", given)
    raise UserError(f"model.name={name!r} gives {shown} for one image: {wrong}")
