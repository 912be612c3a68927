# SPDX-License-Identifier: Apache-2.0
"""Describes two towers as CLIP or SigLIP of Hugging Face: `config.json` and tensors.

`CLIPModel.from_pretrained(FOLDER)` or `SiglipModel` reads `config.json` beside `model.safetensors`.
Source: transformers 5.23, `models/clip` and `models/siglip`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint.pretrained.huggingface import read_preprocess
from vit_jax.checkpoint.pretrained.image_text_tensors import to_huggingface
from vit_jax.checkpoint.pretrained.timm_config import CENTERED, METHOD, SQUASHED
from vit_jax.checkpoint.pretrained.towers import take_part
from vit_jax.checkpoint.pretrained.weights import POSEMB, Weights, infer_model
from vit_jax.models.two_towers import TOWERS

_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu_erf": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
}
# Filters by their numbers in Pillow.
_RESAMPLES = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
# What the towers of both kinds compute, beside what their parameters show.
_IMAGES: dict[str, Any] = {
    "position_embedding": "learned",
    "rope_theta": None,
    "norm_after_pooling": False,
    "resnet_layers": None,
    "num_registers": 0,
    "representation_size": None,
    "distillation_token": False,
    "qk_norm": False,
    "qkv_bias": "all",
    "attention_norm": False,
    "mlp_norm": False,
    "norm": "layer_norm",
    "untied_norm": False,
}
_FUNCTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "image": {
            "classifier": "token",
            "pre_norm": True,
            "embedding_bias": False,
            "head_bias": False,
        },
        "text": {"pooling": "eot", "causal": True, "head_bias": False},
    },
    "siglip": {
        "image": {"classifier": "map", "pre_norm": False, "embedding_bias": True},
        "text": {"pooling": "last", "causal": False, "head_bias": True},
    },
}
_DEFAULTS = {"pre_norm": False, "embedding_bias": True, "head_bias": True} | {
    "pooling": "last",
    "causal": False,
}


def to_huggingface_tensors(weights: Weights) -> dict[str, np.ndarray]:
    """Returns the tensors of `CLIPModel` or `SiglipModel`, equal to the last bit.

    Raises:
      ValueError: neither of them computes what the model does.
    """
    kind = _find_kind(weights)
    tensors: dict[str, np.ndarray] = {}
    for part in TOWERS:
        params = take_part(weights.params, part)
        tensors |= to_huggingface(params, part, is_clip=kind == "clip")
    t = weights.params["t"]
    if kind == "clip":
        return tensors | {"logit_scale": t.reshape(())}
    return tensors | {"logit_scale": t, "logit_bias": weights.params["b"]}


def make_huggingface_config(
    weights: Weights,
) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """Makes the content of `config.json` and `preprocessor_config.json`.

    Returns:
      Two JSON objects, of which the second is None if no processor prepares images as they were
      prepared here, and notes.

    Raises:
      ValueError: neither class computes what the model does.
    """
    kind = _find_kind(weights)
    model = _complete(weights)
    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    image, text = model["image"], model["text"]
    size = _find_image_size(weights, image)
    kernel = weights.params["img/embedding/kernel"]
    vision = _describe_tower(image) | {
        "model_type": f"{kind}_vision_model",
        "image_size": size,
        "patch_size": image["patch_size"][0],
        "num_channels": kernel.shape[2],
    }
    texts = _describe_tower(text) | {
        "model_type": f"{kind}_text_model",
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["context_length"],
    }
    config: dict[str, Any] = {
        "architectures": [f"{name}Model"],
        "model_type": kind,
        "dtype": "float32",
        "vision_config": vision,
        "text_config": texts,
    }
    width = weights.params["txt/head/kernel"].shape[-1]
    if kind == "clip":
        # The class reads 2 as: the greatest token.
        texts["eos_token_id"] = 2 if text.get("eot_id") is None else text["eot_id"]
        config["projection_dim"] = vision["projection_dim"] = texts["projection_dim"] = width
    else:
        texts["projection_size"] = width
    processor, notes = make_processor(weights, f"{name}ImageProcessor", size)
    return config, processor, notes


def _complete(weights: Weights) -> dict[str, Any]:
    """Returns the arguments of both towers, as stated or as the parameters show them."""
    inferred, stated = infer_model(weights.params), weights.model
    return {s: {**inferred[s], **_without_none(stated.get(s, {}))} for s in TOWERS.values()}


def _without_none(section: Mapping[str, Any]) -> dict[str, Any]:
    # A size that a variant decides is None in a config.
    return {key: value for key, value in section.items() if value is not None}


def _find_kind(weights: Weights) -> str:
    model = _complete(weights)
    kind = "siglip" if model["image"]["classifier"] == "map" else "clip"
    problems = []
    for section, functions in _FUNCTIONS[kind].items():
        expected = functions | (_IMAGES if section == "image" else {"qk_norm": False})
        for key, value in expected.items():
            default = _DEFAULTS.get(key, _IMAGES.get(key))
            if (found := model[section].get(key, default)) != value:
                problems.append(f"model.{section}.{key}={found!r} (there {value!r})")
        if model[section].get("activation", "gelu_tanh") not in _ACTIVATIONS:
            problems.append(f"model.{section}.activation={model[section]['activation']!r}")
    if "txt/head/kernel" not in weights.params:
        problems.append("no head of the text tower")
    has_bias = "b" in weights.params
    if has_bias != (kind == "siglip"):
        problems.append(f"{'a' if has_bias else 'no'} bias of the pairs (model.bias_init)")
    if problems:
        names = {"clip": "CLIP", "siglip": "SigLIP"}
        raise ValueError(
            f"{names[kind]} of Hugging Face computes something else: {'; '.join(problems)}; a "
            ".npz holds any model"
        )
    return kind


def _find_image_size(weights: Weights, image: Mapping[str, Any]) -> int:
    patch = image["patch_size"]
    length = weights.params[f"img/{POSEMB}"].shape[1] - ("img/cls" in weights.params)
    side = math.isqrt(length)
    grid = weights.posemb_grid or (side, side)
    size = weights.preprocess.get("image_size")
    if size is not None and math.prod(n // p for n, p in zip(size, patch, strict=True)) == length:
        grid = size[0] // patch[0], size[1] // patch[1]
    if grid[0] != grid[1] or patch[0] != patch[1] or math.prod(grid) != length:
        raise ValueError(
            f"its {length} patches of {patch[0]}x{patch[1]} pixels are not those of a square "
            "image, as CLIP and SigLIP of Hugging Face have it"
        )
    return grid[0] * patch[0]


def _describe_tower(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": model["hidden_size"],
        "intermediate_size": model["mlp_dim"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "hidden_act": _ACTIVATIONS[model.get("activation", "gelu_tanh")],
        "layer_norm_eps": model.get("norm_epsilon", 1e-6),
        "attention_dropout": 0.0,
    }


def make_processor(
    weights: Weights, name: str, size: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """Makes the content of `preprocessor_config.json`, for the class `name` and a square of `size`.

    Returns:
      A JSON object, or None and a note if no processor prepares images as they were prepared here.
    """
    line = weights.preprocess.get("eval") or ""
    method = METHOD.search(line)
    processor: dict[str, Any] = {
        "image_processor_type": name,
        "do_resize": True,
        "resample": _RESAMPLES.get(method[1] if method else "bilinear"),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(x) for x in np.broadcast_to(weights.preprocess.get("mean", 0.5), 3)],
        "image_std": [float(x) for x in np.broadcast_to(weights.preprocess.get("std", 0.5), 3)],
    }
    if match := CENTERED.fullmatch(line):
        side = int(match[2])
        processor |= {"size": {"shortest_edge": int(match[1])}, "do_center_crop": True}
        processor["crop_size"] = {"height": side, "width": side}
    elif match := SQUASHED.fullmatch(line):
        processor["size"] = {"height": int(match[1]), "width": int(match[2] or match[1])}
    found, _ = read_preprocess(processor, {}, kind=name)
    # Both are ways to write a square.
    square = found.get("eval", "").replace(f"({size}, {size}, ", f"({size}, ")
    if line and line in (found.get("eval"), square):
        return processor, []
    why = f"no processor prepares images by {line!r}" if line else "nothing states the images"
    return None, [f"preprocessor_config.json: not written: {why}"]
