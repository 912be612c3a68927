# SPDX-License-Identifier: Apache-2.0
"""The model that weights belong to, made of what they say of themselves, without any config."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoint.pretrained.adapt import adapt_params
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.models.variants import MODELS
from vit_jax.utils.registry import bind, keywords

# How a model is run, which is no part of what it computes.
_RUN = ("constrain", "scan", "remat", "float8")


def rebuild_model(weights: Weights, **given: Any) -> Any:
    """The model of a file, with as many classes as its head has; 0 without one.

    Args:
      weights: of the file.
      **given: arguments of `make_vit` or `make_mixer` in place of what the file says.

    Raises:
      UserError: an argument that the model has not, or sizes that the file does not tell.
    """
    make = MODELS[weights.model["name"]]
    known = keywords(make).keys() - set(_RUN)
    args = {name: value for name, value in weights.model.items() if name in known}
    head = weights.params.get("head/kernel")
    args["num_classes"] = 0 if head is None else head.shape[-1]
    (args,) = bind(args | given, make, key="model")
    return make(**args)


def fill_model(
    model: Any, weights: Weights, image_shape: tuple[int, int, int]
) -> tuple[dict[str, Any], list[str]]:
    """The parameters of a file for a model of the same kind, in the memory of the host.

    Args:
      model: from `rebuild_model`.
      weights: of the file.
      image_shape: height, width and channels; position embeddings are resized to fit.

    Returns:
      Parameters, and a line for each thing that was done to make them fit.

    Raises:
      UserError: they don't fit.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    # Only shapes matter: all of it comes from the file.
    init: Callable[..., Any] = lambda x: model.init(jax.random.key(0), x, train=False)  # noqa: E731
    shapes = jax.eval_shape(init, images)["params"]
    return adapt_params(
        weights,
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes),
        target_grid=model.grid(image_shape[:2]),
        num_class_tokens=model.num_class_tokens,
    )
