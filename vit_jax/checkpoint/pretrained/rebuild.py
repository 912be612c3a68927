# SPDX-License-Identifier: Apache-2.0
"""Rebuilds the model of pretrained weights from their own description, without a config."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoint.pretrained.adapt import adapt_params
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.models.variants import MODELS
from vit_jax.utils.registry import bind, keywords

# Arguments that change how a model runs, and not what it computes.
_RUN = ("constrain", "scan", "remat", "float8")


def rebuild_model(weights: Weights, **given: Any) -> Any:
    """Returns the Flax module of the weights, with as many classes as their head; 0 without one.

    Args:
      weights: describe the model.
      **given: arguments of `make_vit` or `make_mixer` that override the description.

    Raises:
      UserError: the model has no such argument, or its sizes are not known.
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
    """Fits weights to the model that `rebuild_model` made of them.

    Args:
      model: from `rebuild_model`.
      weights: to be fitted.
      image_shape: height, width and channels of an image; position embeddings are resized to it.

    Returns:
      `(params, notes)`: nested dict of NumPy arrays in the dtypes of the model's parameters, and
      one line for each change that made them fit.

    Raises:
      UserError: the parameters do not fit.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    # Only shapes matter: all values come from the weights.
    init: Callable[..., Any] = lambda x: model.init(jax.random.key(0), x, train=False)  # noqa: E731
    shapes = jax.eval_shape(init, images)["params"]
    return adapt_params(
        weights,
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes),
        target_grid=model.grid(image_shape[:2]),
        num_class_tokens=model.num_class_tokens,
    )
