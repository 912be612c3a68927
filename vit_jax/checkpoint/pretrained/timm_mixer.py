# SPDX-License-Identifier: Apache-2.0
"""Reads and writes Mixers with the tensors and the `config.json` of timm's class `MlpMixer`.

These are `mixer_*` and, with gated MLPs, `gmixer_*`. Source: timm 1.0.31, `models/mlp_mixer.py`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint.pretrained.config_json import (
    check_keys,
    check_sizes,
    check_values,
    is_number,
    read_pair,
)
from vit_jax.checkpoint.pretrained.names import TIMM_MIXER_PATCHES
from vit_jax.checkpoint.pretrained.timm import (
    read_input_size,
    read_timm_images,
    read_timm_names,
)
from vit_jax.checkpoint.pretrained.weights import Weights, infer_model
from vit_jax.utils.bounds import shorten

_Arrays = dict[str, np.ndarray]

# Tensors of other models of that class, and what they show. No model here has such parts.
_ABSENT = (
    (r"blocks\.\d+\.linear_tokens\.", "it is a ResMLP, with affine layers in place of norms"),
    (
        r"blocks\.\d+\.mlp_channels\.gate\.",
        "it is a gMLP, with gates over patches",
    ),
    (r"stem\.norm\.", "it has a norm of the patches in front of the blocks"),
    (r"blocks\.\d+\.mlp_(tokens|channels)\.norm\.", "it has norms within its MLPs"),
)
_SHOWN = {
    *("num_classes", "img_size", "in_chans", "patch_size", "num_blocks", "embed_dim", "mlp_ratio"),
    *("stem_norm", "drop_rate", "proj_drop_rate", "drop_path_rate", "nlhb", "device", "dtype"),
}
# Functions of timm by patch, width and blocks, which these fix. A gated one fixes its MLPs too.
_FUNCTIONS = {
    (32, 512, 8): "mixer_s32_224",
    (16, 512, 8): "mixer_s16_224",
    (32, 768, 12): "mixer_b32_224",
    (16, 768, 12): "mixer_b16_224",
    (32, 1024, 24): "mixer_l32_224",
    (16, 1024, 24): "mixer_l16_224",
}
_GATED_FUNCTIONS = {(16, 384, 12): "gmixer_12_224", (16, 384, 24): "gmixer_24_224"}


def read_timm_mixer(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Weights:
    """Reads a model of timm's class `MlpMixer` whose blocks are those of a Mixer.

    Args:
      tensors: arrays of any float dtype by name.
      config: content of the `config.json` beside them; may be empty.

    Returns:
      Weights with the dtypes of the file.

    Raises:
      ValueError: the model has a part that no model here has, or the files are damaged.
    """
    if not isinstance(config.get("architecture"), str):
        config = {}  # It was written by another program.
    config = {key: value for key, value in config.items() if value is not None}
    images = config.get("pretrained_cfg", {})
    if not isinstance(images, Mapping):
        raise ValueError(f"pretrained_cfg={shorten(images)} in config.json: expected an object")
    _check_parts(tensors, config.get("architecture", ""))
    options = config.get("model_args", {})
    if not isinstance(options, Mapping):
        raise ValueError(f"model_args={shorten(options)} in config.json: expected an object")
    check_keys(options, _SHOWN | {"global_pool", "act_layer"}, where="model_args.")
    check_values(options, {"global_pool": ("avg",)}, where="model_args.")
    pool = config.get("global_pool", images.get("global_pool"))
    check_values({"global_pool": pool}, {"global_pool": ("avg",)})
    params = mixer_to_linen(tensors)
    model = infer_model(params)
    if not model["channels_mlp_dim"]:
        raise ValueError("it has no block with all tensors (blocks.0.*)")
    gated = model.get("activation") == "swiglu"
    expected = ("silu", "swish") if gated else ("gelu",)
    check_values(options, {"act_layer": expected}, where="model_args.")
    model.setdefault("activation", "gelu_erf")
    check_sizes(options, _list_sizes(options, model, params), where="model_args.")
    shown = {"num_features": model["hidden_size"]}
    if "head/kernel" in params:
        shown["num_classes"] = params["head/kernel"].shape[-1]
    check_sizes(config, shown)
    size, notes = _find_image_size(params, model, options, images or config)
    preprocess, image_notes = read_timm_images(images or config)
    names, name_notes = read_timm_names(config, params)
    return Weights(
        params=params,
        layout="timm Mixer safetensors",
        model=model,
        preprocess=preprocess | ({} if size is None else {"image_size": size}),
        class_names=names,
        notes=(*notes, *image_notes, *name_notes),
    )


def mixer_to_linen(tensors: Mapping[str, np.ndarray]) -> _Arrays:
    """Converts tensors of timm's Mixers to parameters of `MlpMixer`, in their dtypes.

    Kernels are transposed. The first layer of a gated MLP is split: its second half is the gate.
    Tensors without a place in the model keep their names.
    """
    rest, params = dict(tensors), {}
    for theirs, ours in _modules(_count_blocks(rest)):
        for name in ("weight", "bias"):
            if f"{theirs}.{name}" in rest:
                x = rest.pop(f"{theirs}.{name}")
                params |= _read_tensor(ours, name, x)
    for mlp in [p.removesuffix("/Dense_1/kernel") for p in params if p.endswith("/Dense_1/kernel")]:
        hidden = params.get(f"{mlp}/Dense_0/kernel")
        if hidden is None or hidden.shape[-1] != 2 * params[f"{mlp}/Dense_1/kernel"].shape[0]:
            continue
        for name in ("kernel", "bias"):
            if f"{mlp}/Dense_0/{name}" in params:
                first, gate = np.split(params[f"{mlp}/Dense_0/{name}"], 2, axis=-1)
                params |= {f"{mlp}/Dense_0/{name}": first, f"{mlp}/gate/{name}": gate}
    return params | rest


def mixer_to_timm(params: Mapping[str, np.ndarray]) -> _Arrays:
    """Converts parameters of `MlpMixer` to timm's tensors; the inverse of `mixer_to_linen`.

    Raises:
      ValueError: timm has no place for a parameter.
    """
    rest, tensors = dict(params), {}
    for path in [p for p in rest if "/gate/" in p]:
        hidden = path.replace("/gate/", "/Dense_0/")
        if hidden in rest:
            rest[hidden] = np.concatenate([rest[hidden], rest.pop(path)], axis=-1)
    for theirs, ours in _modules(infer_model(params)["num_layers"]):
        for name in ("scale", "kernel"):
            if f"{ours}/{name}" in rest:
                x = rest.pop(f"{ours}/{name}")
                tensors[f"{theirs}.weight"] = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
        if f"{ours}/bias" in rest:
            tensors[f"{theirs}.bias"] = rest.pop(f"{ours}/bias")
    if rest:
        raise ValueError(f"timm has no place for {', '.join(sorted(rest)[:4])}")
    return tensors


def find_mixer_arguments(model: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the name of a function of timm, and the arguments that make this Mixer of it.

    Raises:
      ValueError: no function makes it from values of JSON.
    """
    activation = model.get("activation", "gelu_tanh")
    if activation not in ("gelu_erf", "swiglu"):
        raise ValueError(
            f"model.activation={activation!r}: timm's Mixers compute exact GELU, and take a class "
            "for another, which JSON has not"
        )
    (rows, columns), width = model["patch_size"], model["hidden_size"]
    functions = _GATED_FUNCTIONS if activation == "swiglu" else _FUNCTIONS
    function = functions.get((rows, width, model["num_layers"]))
    if rows != columns or function is None:
        raise ValueError(
            f"patches of {rows}x{columns}, width {width} and {model['num_layers']} blocks: timm "
            f"has Mixers of other sizes by name, {', '.join(functions.values())}"
        )
    hidden = [model["tokens_mlp_dim"], model["channels_mlp_dim"]]
    if activation == "swiglu":
        if hidden != [width // 2, width * 2]:
            raise ValueError(f"MLPs of {hidden[0]} and {hidden[1]}: timm's {function} has others")
        return function, {}
    ratios = [n / width for n in hidden]
    if [int(width * ratio) for ratio in ratios] != hidden:
        raise ValueError(f"MLPs of {hidden[0]} and {hidden[1]}: timm has ratios to the width")
    return function, {"mlp_ratio": ratios}


def _check_parts(tensors: Mapping[str, np.ndarray], architecture: str) -> None:
    named = f"architecture {architecture!r}" if architecture else "no config.json names the model"
    for pattern, what in _ABSENT:
        if name := next((name for name in sorted(tensors) if re.match(pattern, name)), None):
            raise ValueError(f"{named}: {what} ({name}), which no model here has")
    if tensors[TIMM_MIXER_PATCHES].ndim != 4:
        shape = list(tensors[TIMM_MIXER_PATCHES].shape)
        raise ValueError(f"{TIMM_MIXER_PATCHES} is {shape}: expected a convolution")
    if "blocks.0.mlp_tokens.fc1.weight" not in tensors:
        found = next((name for name in sorted(tensors) if name.startswith("blocks.0.")), "none")
        raise ValueError(
            f"{named}: it has {found}, and no blocks.0.mlp_tokens.fc1 as a Mixer, as no model here"
        )


def _list_sizes(
    options: Mapping[str, Any], model: Mapping[str, Any], params: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Returns the arguments of the class that the tensors show."""
    width = model["hidden_size"]
    found: dict[str, Any] = {
        "patch_size": model["patch_size"],
        "embed_dim": width,
        "num_blocks": model["num_layers"],
        "in_chans": params["stem/kernel"].shape[2],
        "stem_norm": False,
    }
    if "head/kernel" in params:
        found["num_classes"] = params["head/kernel"].shape[-1]
    ratio = options.get("mlp_ratio")
    ratios = ratio if isinstance(ratio, list | tuple) else (ratio, ratio)
    halves = 2 if model["activation"] == "swiglu" else 1
    hidden = [halves * model[f"{kind}_mlp_dim"] for kind in ("tokens", "channels")]
    if [int(width * x) if is_number(x) else None for x in ratios] != hidden:
        found["mlp_ratio"] = tuple(n / width for n in hidden)
    return found


def _find_image_size(
    params: Mapping[str, np.ndarray],
    model: Mapping[str, Any],
    options: Mapping[str, Any],
    images: Mapping[str, Any],
) -> tuple[tuple[int, int] | None, list[str]]:
    """Returns (height, width) of the images, for which the number of patches is fixed; notes."""
    patches = params["MixerBlock_0/token_mixing/Dense_0/kernel"].shape[0]
    size, key = read_input_size(images), "pretrained_cfg.input_size"
    if options.get("img_size") is not None:
        key = "model_args.img_size"
        size = read_pair(options["img_size"], f"{key} in config.json")
    if size is not None:
        rows, columns = (n // patch for n, patch in zip(size, model["patch_size"], strict=True))
        if rows * columns != patches:
            raise ValueError(
                f"{key} in config.json: {size[0]}x{size[1]} pixels are {rows}x{columns} patches, "
                f"and the tensors are of {patches}"
            )
        return size, []
    side = math.isqrt(patches)
    if side * side != patches:
        return None, [f"images: nothing states their size, of {patches} patches"]
    size = side * model["patch_size"][0], side * model["patch_size"][1]
    return size, [f"no config.json states the size of the images: assuming {size[0]}x{size[1]}"]


def _count_blocks(names: Mapping[str, Any]) -> int:
    numbers = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in names) if m]
    return max(numbers, default=-1) + 1


def _modules(blocks: int) -> Iterator[tuple[str, str]]:
    """Yields the names of layers there and here."""
    yield "stem.proj", "stem"
    for i in range(blocks):
        there, here = f"blocks.{i}", f"MixerBlock_{i}"
        yield f"{there}.norm1", f"{here}/LayerNorm_0"
        yield f"{there}.norm2", f"{here}/LayerNorm_1"
        for kind in ("token", "channel"):
            for number in (1, 2):
                yield (
                    f"{there}.mlp_{kind}s.fc{number}",
                    f"{here}/{kind}_mixing/Dense_{number - 1}",
                )
    yield "norm", "pre_head_layer_norm"
    yield "head", "head"


def _read_tensor(path: str, name: str, x: np.ndarray) -> _Arrays:
    if name == "bias":
        return {f"{path}/bias": x}
    if x.ndim == 1:
        return {f"{path}/scale": x}
    return {f"{path}/kernel": x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T}
