# SPDX-License-Identifier: Apache-2.0
"""Reads Vision Transformers of timm: their tensors, and the `config.json` published with them.

Source: timm 1.0.31.
"""

import math
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

_NORM_EPSILON = 1e-6
_CROP_PCT = 0.875  # timm's default
_ROPE_REFERENCE = (16, 16)  # of timm's vit_*_rope_reg*_gap_*
_EVA = re.compile(r"blocks\.\d+\.(gamma_1|attn\.(q_bias|q_proj\.weight))$")
_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_tanh": "gelu_tanh"}
# Models of timm with another number of heads than is usual for their width.
_NUM_HEADS = {
    f"vit_giantopt_patch16_siglip_{pool}{size}": 16 for pool in ("", "gap_") for size in (256, 384)
}
# Architectures of timm whose class token and registers have no position embedding.
_NO_EMBED_CLASS = re.compile(
    r"deit3_|flexivit_|vit_(?!so150m)\w+_reg\d+_(gap|dinov2)|vit_[a-z]+_patch\d+_rope_ape_"
)
# In timm these SigLIP models, and no others, approximate GELU by tanh.
_TANH_GELU = re.compile(
    r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip"
    r"|vit_large_patch16_siglip_(gap_)?512"
)


def read_timm(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], num_heads: int | None
) -> Weights:
    """Reads a model of timm's classes `VisionTransformer`, its hybrid and distilled ones, or `Eva`.

    Args:
      tensors: arrays of any float dtype by name.
      config: content of the `config.json` beside them; may be empty.
      num_heads: attention heads; None for what the files state, or is usual for the width.

    Returns:
      Weights with the dtypes of the file.

    Raises:
      ValueError: the model has a part that no model here has, or the files are damaged.
    """
    if not isinstance(config.get("architecture"), str):
        config = {}  # It was written by another program.
    architecture, options = config.get("architecture", ""), config.get("model_args", {})
    if any(name.startswith("norm_pre.") for name in tensors):
        raise ValueError("it has a norm in front of the blocks (norm_pre), which no model here has")
    if "_rpn_" in architecture:
        raise ValueError(f"{architecture} has norms behind its layers, which no model here has")
    theta, reference, swap_axes, notes = _find_rope(tensors, architecture, options)
    num_heads = num_heads or options.get("num_heads") or _NUM_HEADS.get(architecture.split(".")[0])
    classifier = _find_classifier(tensors, config)
    average = classifier == "gap" and "cls_token" in tensors
    slots, grid, more = _find_positions(tensors, config)
    notes += more
    params, more = to_linen(
        tensors, num_heads=num_heads, num_slots=slots, average=average, swap_axes=swap_axes
    )
    settings, settings_notes = _read_timm_settings(architecture, options)
    model = settings | describe_model(params, rope_theta=theta) | {"classifier": classifier}
    model["rope_reference_grid"] = reference
    if theta is None and classifier == "map" and ("cls" in params or "num_registers" in model):
        raise ValueError("attention pooling that leaves out registers, which no model here has")
    preprocess, image_notes = _read_timm_images(config.get("pretrained_cfg", config))
    kind = "timm hybrid" if "resnet_layers" in model else "timm"
    return Weights(
        params=params,
        layout=f"{kind} safetensors",
        model=model,
        preprocess=({"image_size": image_size_of(grid, model)} if grid else {}) | preprocess,
        posemb_grid=grid,
        # The published FlexiViTs were trained with another rule than timm's.
        posemb_resize="bilinear_half_pixel" if architecture.startswith("flexivit_") else "bicubic",
        notes=(*notes, *more, *settings_notes, *image_notes),
    )


def _find_rope(
    tensors: Mapping[str, np.ndarray], architecture: str, options: Mapping[str, Any]
) -> tuple[float | None, tuple[int, int] | None, bool, list[str]]:
    """Infers rotary embeddings, which have no tensors.

    Returns:
      `(theta or None, reference grid or None, swap_axes, notes)`.
    """
    if "rope.freqs" in tensors:
        raise ValueError("rotary embeddings with learned frequencies (rope.freqs) are unknown here")
    reference = options.get("ref_feat_shape", _ROPE_REFERENCE)
    if re.match(r"vit_\w+_rope_reg\d+_gap_", architecture):
        return 10_000.0, _pair(reference), False, []
    if re.match(r"vit_[a-z]+_patch\d+_rope_(ape_)?\d+", architecture):
        return 100.0, _pair(options.get("ref_feat_shape")), True, []
    if "pos_embed" in tensors and not any(map(_EVA.match, tensors)):
        return None, None, False, []
    if "pos_embed" in tensors or "cls_token" in tensors or architecture:
        raise ValueError(
            f"tensors of timm's class Eva, architecture {architecture or 'unknown'}: only "
            "vit_*_rope_reg*_gap_* and vit_*_rope_* are known here, from the config.json beside "
            "the file"
        )
    note = (
        "rope_theta, rope_reference_grid: no config.json states them; 10000 and "
        f"{_ROPE_REFERENCE}, as in timm's vit_*_rope_reg*_gap_256, taken"
    )
    return 10_000.0, _ROPE_REFERENCE, False, [note]


def _pair(size: Any) -> tuple[int, int] | None:
    """Returns (rows, columns) of a size in config.json: a number, two, or none."""
    if size is None:
        return None
    first, second = (size, size) if isinstance(size, int) else size
    return first, second


def _find_positions(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[int, tuple[int, int] | None, list[str]]:
    """Returns what `find_positions` does."""
    options, images = config.get("model_args") or {}, config.get("pretrained_cfg", config)
    tokens = [
        sum(tensors[name].shape[1] for name in names if name in tensors)
        for names in (("cls_token", "dist_token"), ("reg_token", "register_tokens"))
    ]
    candidates, usual = (sum(tokens), tokens[0], 0), None if tokens[1] else tokens[0]
    if "register_tokens" in tensors:  # The original DINOv2: only the class token has a position.
        candidates, usual = (tokens[0],), tokens[0]
    if _NO_EMBED_CLASS.match(config.get("architecture", "")):
        usual = 0
    if "no_embed_class" in options:
        usual = 0 if options["no_embed_class"] else sum(tokens)
        candidates = (usual,)
    size, key = images.get("input_size"), "pretrained_cfg.input_size"
    size = None if size is None else tuple(size[1:])
    if options.get("img_size") is not None:
        size, key = _pair(options["img_size"]), "model_args.img_size"
    if config.get("architecture"):
        key = f"{key} in config.json"
    else:
        key = f"architecture and {key} in a config.json beside the file"
    return find_positions(tensors, image_size=size, candidates=candidates, usual=usual, key=key)


def _find_classifier(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    pool = config.get("global_pool") or ""
    if pool not in ("", "avg", "token", "map"):
        raise ValueError(f"global_pool={pool!r} in config.json: expected avg, token or map")
    if "attn_pool.latent" in tensors:
        return "map"
    if "cls_token" not in tensors or pool == "avg":
        return "gap"
    # By default timm puts the norm behind the pooling where that is a mean.
    mean = not pool and "fc_norm.weight" in tensors and "norm.weight" not in tensors
    return "gap" if mean else "token"


def _read_timm_settings(
    architecture: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    act = options.get("act_layer", "gelu_tanh" if _TANH_GELU.match(architecture) else "gelu")
    if act not in _ACTIVATIONS:
        raise ValueError(f"act_layer={act!r} in config.json: expected gelu or gelu_tanh")
    model = {"activation": _ACTIVATIONS[act], "norm_epsilon": _NORM_EPSILON}
    if architecture:
        return model, []
    return model, [
        "no config.json names the model: activation='gelu_erf', norm_epsilon=1e-06, the defaults "
        "of timm, taken"
    ]


def _read_timm_images(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    found: dict[str, Any] = {}
    if "mean" in config and "std" in config:
        found |= {"mean": tuple(config["mean"]), "std": tuple(config["std"])}
    if "input_size" not in config:
        return found, []
    _, height, width = config["input_size"]
    found["image_size"] = (height, width)
    crop, mode = config.get("crop_pct") or _CROP_PCT, config.get("crop_mode") or "center"
    size = math.floor(height / crop), math.floor(width / crop)
    if mode not in ("center", "squash") or (mode == "center" and size[0] != size[1]):
        what = f"prepared in crop_mode={mode!r} for {height}x{width} pixels"
        return found, [describe_no_line(what)]
    line, notes = describe_evaluation(
        resize=size[:1] if mode == "center" else size,
        crop=(height, width),
        interpolation=config.get("interpolation") or "bicubic",
        rounding="nearest",
    )
    return found | line, notes
