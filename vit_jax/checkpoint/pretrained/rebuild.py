# SPDX-License-Identifier: Apache-2.0
"""Rebuilds the model of pretrained weights from their own description, without a config."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from vit_jax.checkpoint.pretrained.adapt import adapt_params, find_initialised, make_blanks
from vit_jax.checkpoint.pretrained.towers import TEXT, take_part
from vit_jax.checkpoint.pretrained.weights import (
    ATTENTION_0,
    POSEMB,
    RELATIVE,
    Weights,
)
from vit_jax.models.interface import example_inputs, find_position_grid
from vit_jax.models.two_towers import TOWERS
from vit_jax.models.variants import MODELS
from vit_jax.utils.bounds import check_growth
from vit_jax.utils.errors import UserError, first_line
from vit_jax.utils.registry import bind, find_part, is_part, keywords

# Arguments that change how a model runs, and not what it computes.
_RUN = ("constrain", "scan", "remat", "attention", "blocks", "float8", "lora", "any_size")

_MAX_LISTED = 4  # parameters in one line of an error


class MissingError(UserError):
    """Weights lack parameters of their model.

    Attributes:
      names: the first few of their paths, as text.
    """

    def __init__(self, paths: Sequence[str]):
        more = len(paths) - _MAX_LISTED
        self.names = ", ".join(paths[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
        super().__init__(
            f"{len(paths)} parameters of the model are not in these weights: {self.names}; "
            "expected weights that hold all of them"
        )


def rebuild_model(weights: Weights, *, run: Mapping[str, Any] | None = None, **given: Any) -> Any:
    """Returns the Flax module of the weights, with as many classes as their head; 0 without one.

    Args:
      weights: describe the model.
      run: arguments such as `dtype` and `constrain`, which are ignored if the model has no such.
      **given: arguments of the constructor that override the description.

    Raises:
      UserError: the model has no such argument, its sizes are not known, or it is defined in a
        module outside of this package that the user has not named.
    """
    name = weights.model["name"]
    if name == TEXT:
        raise UserError(
            "these weights are of a text tower alone; expected a whole model, or model.name="
            "'two_towers' with them as init_from"
        )
    make = find_part(MODELS, name, key="model.name", gives=(nn.Module,))
    known = keywords(make).keys() - set(_RUN)
    args = {name: value for name, value in weights.model.items() if name in known}
    if not is_part(name):  # Others say how many classes they have, and name their head at will.
        head = weights.params.get("head/kernel")
        args["num_classes"] = 0 if head is None else head.shape[-1]
    for section in (s for s in TOWERS.values() if isinstance(args.get(s), Mapping)):
        args[section] = {k: value for k, value in args[section].items() if k not in _RUN}
        given = {**given, section: {**args[section], **given.get(section, {})}}
    args |= {name: value for name, value in (run or {}).items() if name in keywords(make)}
    (args,) = bind(args | given, make, key="model")
    return make(**args)


def fill_model(
    model: Any,
    weights: Weights,
    image_shape: tuple[int, int, int],
    *,
    held: Collection[str] = (),
    **adapt: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Fits weights to the model that `rebuild_model` made of them.

    Position embeddings are resized to images of `image_shape`: height, width and channels.

    Args:
      model: the Flax module.
      weights: any float dtype.
      image_shape: of one image.
      held: paths of parameters that the caller has; those that the weights do not fill are NaN.
      **adapt: further arguments of `adapt_params`.

    Returns:
      `(params, notes)`: nested dict of NumPy arrays in the dtypes of the model's parameters, and
      one line for each change that made them fit.

    Raises:
      MissingError: the weights lack some.
      UserError: the parameters do not fit.
    """
    variables = init_shapes(model, image_shape)
    sizes = (x.size * x.dtype.itemsize for x in jax.tree.leaves(variables["params"]))
    try:
        check_growth(sum(x.nbytes for x in weights.params.values()), sum(sizes))
    except ValueError as e:
        raise UserError(f"the model that these weights describe is not theirs: {e}") from None
    params, notes = adapt_params(
        weights,
        make_blanks(variables["params"]),
        target_grid=find_position_grid(model, image_shape[:2]),
        num_class_tokens=getattr(model, "num_class_tokens", 0),
        **adapt,
    )
    if missing := [path for path in find_initialised(params) if path not in held]:
        raise MissingError(missing)
    return params, notes


def check_complete(weights: Weights) -> Any:
    """Rebuilds a model, and checks that the weights are its parameters and no others.

    Args:
      weights: of a model of this package.

    Returns:
      The Flax module.

    Raises:
      UserError: the model can't be rebuilt, or a parameter is missing, left over or of another
        shape.
    """
    model = rebuild_model(weights)
    try:
        init = init_shapes(model, _find_image_shape(weights, model))
    except UserError:
        raise
    except Exception as e:  # Flax and JAX have many types for sizes that do not go together.
        raise UserError(f"the model can't be rebuilt: {first_line(e)}") from e
    flat: dict[str, Any] = traverse_util.flatten_dict(init["params"], sep="/")
    ours = {path: tuple(x.shape) for path, x in flat.items()}
    theirs = {path: tuple(x.shape) for path, x in weights.params.items()}
    problems = [
        f"{path} is {theirs.get(path, 'missing')}, expected {ours.get(path, 'none of that name')}"
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path)
    ]
    if problems:
        more = len(problems) - _MAX_LISTED
        raise UserError(
            f"{len(problems)} parameters are not those of the model that the source describes: "
            f"{'; '.join(problems[:_MAX_LISTED])}{f'; and {more} more' if more > 0 else ''}"
        )
    return model


def init_shapes(model: Any, image_shape: tuple[int, ...]) -> Any:
    """Returns the shapes of a model's variables, without computing them."""

    def init() -> Any:
        inputs = example_inputs(model, image_shape)
        return model.init(jax.random.key(0), *inputs, train=False)

    return jax.eval_shape(init)


def _find_image_shape(weights: Weights, model: Any) -> tuple[int, int, int]:
    """Returns (height, width, channels) of an image with as many patches as the weights are for.

    The patches are in one row, since shapes of parameters only depend on their number.
    """
    kernels = ("conv_root/kernel", "stem/kernel", "embedding/kernel")
    params = weights.params
    if hasattr(model, "towers"):
        params, model = take_part(params, "img"), model.img
    channels = next(params[path].shape[2] for path in kernels if path in params)
    patches = 1
    if POSEMB in params and getattr(model, "posemb_grid", None) is None:
        patches = params[POSEMB].shape[1] - model.num_class_tokens
    biases = params.get(f"{ATTENTION_0}/{RELATIVE}")
    if biases is not None:  # A row of n patches has 2 n - 1 distances, and there are three more.
        patches = (len(biases) - 2) // 2
    mixing = params.get("MixerBlock_0/token_mixing/Dense_0/kernel")
    if mixing is not None:
        patches = mixing.shape[0]
    rows, columns = getattr(model, "stride", model.patch_size)
    return rows, columns * max(patches, 1), channels
