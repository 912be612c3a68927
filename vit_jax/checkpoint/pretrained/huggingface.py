# SPDX-License-Identifier: Apache-2.0
"""Reads Hugging Face's ViT, DeiT, DINOv2 and I-JEPA by the tensor names of timm.

Source: transformers 5.23, `models/vit`, `deit`, `dinov2`, `dinov2_with_registers` and `ijepa`; the
names are those that its files have.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint.pretrained.timm_tensors import find_positions, to_linen
from vit_jax.checkpoint.pretrained.weights import (
    Weights,
    describe_evaluation,
    describe_model,
    describe_no_line,
    image_size_of,
)

_PATCHES = "embeddings.patch_embeddings.projection.weight"
_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.mask_token$", "mask_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
        (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1_proj."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.w12."),
        (r"\.mlp\.weights_out\.", ".mlp.w3."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
        (r"^pooler\.dense\.", "pre_logits.fc."),
        (r"^(cls_)?classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    )
)
# By their numbers in Pillow.
_INTERPOLATIONS = dict(enumerate(("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")))
_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def is_huggingface(tensors: Mapping[str, Any]) -> bool:
    """Whether the names are those of a Vision Transformer of Hugging Face."""
    return any(name.endswith(_PATCHES) for name in tensors)


def read_huggingface(
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    num_heads: int | None,
) -> Weights:
    """Reads a ViT, DeiT, DINOv2 or I-JEPA of Hugging Face.

    Args:
      tensors: arrays of any float dtype by name.
      config: content of the `config.json` beside them; may be empty.
      processor: content of the `preprocessor_config.json` beside them; may be empty.
      num_heads: attention heads; None for what the files state, or is usual for the width.

    Returns:
      Weights with the dtypes of the file.

    Raises:
      ValueError: the model has a part that no model here has, or the files are damaged.
    """
    if not isinstance(config.get("model_type"), str):
        config = {}  # It was written by another program.
    renamed, kind, notes = _to_timm_names(tensors)
    slots = sum(name in renamed for name in ("cls_token", "dist_token"))
    size = config.get("image_size")
    _, grid, grid_notes = find_positions(
        renamed,
        image_size=None if size is None else _pair(size),
        candidates=(slots,),
        usual=slots,
        key="image_size in config.json" if config else "model_type and image_size in config.json",
    )
    params, more = to_linen(
        renamed, num_heads=num_heads or config.get("num_attention_heads"), num_slots=slots
    )
    settings, settings_notes = _read_settings(config, kind=kind)
    model = settings | describe_model(params, rope_theta=None)
    preprocess, image_notes = _read_preprocess(processor, config, kind=kind)
    return Weights(
        params=params,
        layout=f"Hugging Face {kind} safetensors",
        model=model,
        preprocess=({"image_size": image_size_of(grid, model)} if grid else {}) | preprocess,
        posemb_grid=grid,
        posemb_resize="bicubic" if kind == "DINOv2 with registers" else "bicubic_no_antialias",
        notes=(*notes, *grid_notes, *more, *settings_notes, *image_notes),
    )


def _to_timm_names(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], str, list[str]]:
    """Returns the tensors by timm's names, the name of the model ("DINOv2"), and notes."""
    prefix = next(name for name in tensors if name.endswith(_PATCHES)).removesuffix(_PATCHES)
    renamed = {}
    for name, x in tensors.items():
        if name.startswith(prefix) or "classifier." in name:
            name = name.removeprefix(prefix)
            for pattern, replacement in _NAMES:
                name = pattern.sub(replacement, name)
        renamed[name] = x
    kind = "ViT"
    if any(name.endswith(".ls1.gamma") for name in renamed):
        kind = "DINOv2 with registers" if "reg_token" in renamed else "DINOv2"
    elif "dist_token" in renamed:
        kind = "DeiT"
    elif "cls_token" not in renamed:
        kind = "I-JEPA"
    return renamed, kind, _drop_unused(renamed)


def _drop_unused(tensors: dict[str, np.ndarray]) -> list[str]:
    """Removes layers that the model's classes do not apply, or that no head here has."""
    notes = []
    width = tensors["patch_embed.proj.weight"].shape[0]
    head = tensors.get("head.weight")
    if head is not None and head.shape[1] == 2 * width:
        del tensors["head.weight"]
        tensors.pop("head.bias", None)
        notes.append(
            "head: it reads the class token beside the mean over patches, as no head here: dropped"
        )
    if head is not None and tensors.pop("pre_logits.fc.weight", None) is not None:
        tensors.pop("pre_logits.fc.bias", None)
        notes.append("pre_logits: the pooler is not in front of the classifier: dropped")
    if "cls_token" not in tensors and tensors.pop("pre_logits.fc.weight", None) is not None:
        tensors.pop("pre_logits.fc.bias", None)
        notes.append("pre_logits: the pooler reads the first patch, as no layer here: dropped")
    return notes


def _read_settings(config: Mapping[str, Any], *, kind: str) -> tuple[dict[str, Any], list[str]]:
    """Returns arguments of the model from config.json, or the defaults of the kind and a note."""
    epsilon = 1e-6 if kind.startswith("DINOv2") else 1e-12
    missing = [key for key in ("hidden_act", "layer_norm_eps") if key not in config]
    act = config.get("hidden_act", "gelu")
    if act not in _ACTIVATIONS:
        raise ValueError(
            f"hidden_act={act!r} in config.json: expected one of {', '.join(_ACTIVATIONS)}"
        )
    if config.get("pooler_act", "tanh") != "tanh":
        raise ValueError(f"pooler_act={config['pooler_act']!r} in config.json: expected 'tanh'")
    model = {
        "activation": _ACTIVATIONS[act],
        "norm_epsilon": float(config.get("layer_norm_eps", epsilon)),
    }
    if not missing:
        return model, []
    return model, [
        f"no config.json states {' and '.join(missing)}: activation={model['activation']!r}, "
        f"norm_epsilon={model['norm_epsilon']}, the defaults of Hugging Face's {kind}, taken"
    ]


def _read_preprocess(
    processor: Mapping[str, Any], config: Mapping[str, Any], *, kind: str
) -> tuple[dict[str, Any], list[str]]:
    """Returns `Weights.preprocess` from preprocessor_config.json or config.json, and notes."""
    found: dict[str, Any] = {}
    if processor.get("do_normalize", True) and "image_mean" in processor:
        found |= {"mean": tuple(processor["image_mean"]), "std": tuple(processor["image_std"])}
    elif processor.get("do_normalize") is False:
        found |= {"mean": 0.0, "std": 1.0}
    if abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        found = {}  # The mean is not that of pixels in [0, 1].
    more, notes = _describe_images(processor, kind=kind)
    found |= more
    if "image_size" not in found and "image_size" in config:
        found["image_size"] = _pair(config["image_size"])
    return found, notes


def _describe_images(
    processor: Mapping[str, Any], *, kind: str
) -> tuple[dict[str, Any], list[str]]:
    """Returns `image_size` and `eval` of `Weights.preprocess`, and notes."""
    size, crop = processor.get("size"), None
    if not processor.get("do_resize", True) or size is None:
        return {}, []
    if isinstance(size, Mapping):
        size = {name: value for name, value in size.items() if value is not None}
    dinov2 = kind.startswith("DINOv2")
    if isinstance(size, int) and dinov2:  # As BitImageProcessor reads it.
        size = {"shortest_edge": size}
    if processor.get("do_center_crop") and processor.get("crop_size") is not None:
        crop = _pair(processor["crop_size"])
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        resize = (size["shortest_edge"],)
    elif isinstance(size, Mapping) and set(size) != {"height", "width"}:
        return {}, [describe_no_line(f"resized to {size}")]
    else:
        resize = _pair(size)
    if crop is None and len(resize) == 1:
        return {}, [describe_no_line(f"resized to a shorter side of {resize[0]} and not cropped")]
    resample = processor.get("resample")
    if resample is None:
        resample = 3 if dinov2 or kind == "DeiT" else 2
    found, notes = describe_evaluation(
        resize=resize,
        crop=crop,
        interpolation=_INTERPOLATIONS.get(resample, resample),
        rounding="down",
    )
    return {"image_size": crop or resize} | found, notes


def _pair(size: Any) -> tuple[int, int]:
    """Returns (height, width) of a size in a config: a number, two, or a mapping."""
    if isinstance(size, Mapping):
        return size["height"], size["width"]
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
