# SPDX-License-Identifier: Apache-2.0
"""Checks the description in a file of parameters, before a model is built by it.

A description is as untrusted as the file. Sizes must be those of the arrays, since building and
tracing a model takes time and memory by them.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint.pretrained.weights import Weights, infer_model
from vit_jax.models.two_towers import TOWERS
from vit_jax.utils.bounds import check_count, shorten
from vit_jax.utils.registry import is_part

# Most values of a description, with those of its lists, and characters of a text in it.
_MAX_VALUES = 100_000
_MAX_TEXT = 10_000
# An integer may be as large as the number of parameters, or this.
_MIN_INTEGER = 2**20
# Pixels of a side of an image, and of an image.
_MAX_SIDE, _MAX_PIXELS = 2**15, 2**27
_MAX_CHANNELS = 1024

# Arguments of models of this package that follow from the shapes of their parameters.
_SIZES = (
    "patch_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "mlp_dim",
    "tokens_mlp_dim",
    "channels_mlp_dim",
    "representation_size",
    "num_registers",
    "resnet_layers",
    "vocab_size",
    "context_length",
)


def check_description(weights: Weights) -> Weights:
    """Returns the weights; raises ValueError unless their description can be one of the arrays.

    `model` and `preprocess` are checked: their types, whether numbers are finite, and whether sizes
    are those of the parameters. Whether the model has an argument is left to its constructor.
    """
    count = sum(x.size for x in weights.params.values())
    for section in ("model", "preprocess"):
        _check_values(getattr(weights, section), section, max(count, _MIN_INTEGER))
    _check_model(weights.model, weights.params)
    _check_images(weights.preprocess)
    _check_channels(weights)
    return weights


def _check_values(section: Any, name: str, largest: int) -> None:
    if not isinstance(section, dict):
        raise ValueError(f"{name} is {shorten(section)}; expected keys and values")
    for number, (key, value) in enumerate(_walk(section, name)):
        if number == _MAX_VALUES:
            raise ValueError(f"{name} has more than {_MAX_VALUES:,} values")
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            raise ValueError(f"{key} has {len(value):,} characters; expected {_MAX_TEXT:,} at most")
        if type(value) is int:
            check_count(value, largest, key, least=-largest)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}; expected a finite number")


def _walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yields all texts and numbers in nested dicts and lists, with their dotted keys."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _walk(inner, f"{key}.{name}"[:100])
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(inner, key)
    else:
        yield key, value


def _check_model(model: Mapping[str, Any], params: Mapping[str, np.ndarray]) -> None:
    if not isinstance(model.get("name", ""), str):
        raise ValueError(f"model.name is {shorten(model['name'])}; expected a text")
    sections = {f"model.{s}.": model[s] for s in TOWERS.values() if isinstance(model.get(s), dict)}
    for prefix, section in ({"model.": model} | sections).items():
        _check_layers(section, prefix, len(params))
    if is_part(model.get("name")):
        return  # Its sizes may have any names.
    found = infer_model(params)
    _compare_sizes(model, found, "model")
    for section in TOWERS.values():
        if section in found:
            if not isinstance(stated := model.get(section, {}), Mapping):
                raise ValueError(f"model.{section} is {shorten(stated)}; expected keys and values")
            _compare_sizes(stated, found[section], f"model.{section}")


def _compare_sizes(model: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    if model.get("kernel_size"):  # The kernel is resized to `patch_size` in each call.
        model = {**model, "patch_size": model["kernel_size"]}
    for key in _SIZES:
        stated, real = (_as_pair(key, values.get(key)) for values in (model, found))
        if stated and real and stated != real:
            raise ValueError(f"{where}.{key} is {shorten(stated)}; its arrays are of {real}")


def _check_layers(section: Mapping[str, Any], prefix: str, most: int) -> None:
    for key, value in section.items():
        if "layers" in key or "depth" in key:  # Each has at least one array.
            for layers in value if isinstance(value, list | tuple) else (value,):
                if type(layers) is int:
                    check_count(layers, most, f"{prefix}{key}")


def _as_pair(key: str, value: Any) -> Any:
    if key == "patch_size" and isinstance(value, int):
        return (value, value)
    return tuple(value) if isinstance(value, list) else value


def _check_channels(weights: Weights) -> None:
    kernels = ("conv_root/kernel", "stem/kernel", "embedding/kernel")
    paths = [f"{prefix}{path}" for prefix in ("", "img/") for path in kernels]
    kernel = next((weights.params[path] for path in paths if path in weights.params), None)
    if kernel is None or kernel.ndim != 4:
        return
    # Models that read grey images may still state the three of the colours they started from.
    expected = sorted({1, 3, kernel.shape[2]})
    for key in ("mean", "std"):
        value = weights.preprocess.get(key)
        if isinstance(value, list | tuple) and len(value) not in expected:
            raise ValueError(
                f"{key} is {shorten(value)}; expected one number, or one for each of the "
                f"{kernel.shape[2]} channels"
            )


def _check_images(preprocess: Mapping[str, Any]) -> None:
    for key in ("mean", "std"):
        value = preprocess.get(key, 0.5)
        numbers = value if isinstance(value, list | tuple) else (value,)
        right = 1 <= len(numbers) <= _MAX_CHANNELS and all(
            type(x) in (int, float) and abs(x) < 1e6 and (key == "mean" or x > 0) for x in numbers
        )
        if not right:
            expected = "a number" if key == "mean" else "a number above 0"
            raise ValueError(f"{key} is {shorten(value)}; expected {expected}, or one a channel")
    size = preprocess.get("image_size")
    if size is not None:
        if not isinstance(size, list | tuple) or len(size) != 2:
            raise ValueError(f"image_size is {shorten(size)}; expected height and width")
        pixels = math.prod(check_count(n, _MAX_SIDE, "image_size", least=1) for n in size)
        check_count(pixels, _MAX_PIXELS, "the number of pixels by image_size")
    line = preprocess.get("eval", "")
    if line is not None and not isinstance(line, str):
        raise ValueError(f"eval is {shorten(line)}; expected a line of operations")
