# SPDX-License-Identifier: Apache-2.0
"""Writes the `config.json` from which timm, and transformers by way of timm, rebuild a model.

`timm.create_model("local-dir:FOLDER", pretrained=True)` reads it beside `model.safetensors`, and
`AutoModelForImageClassification.from_pretrained(FOLDER)` does. Source: timm 1.0.31.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint.pretrained.timm_mixer import find_mixer_arguments
from vit_jax.checkpoint.pretrained.timm_tensors import TIMM_RESNET, columns_first, has_unused_token
from vit_jax.checkpoint.pretrained.weights import (
    Weights,
    check_sizes_stay,
    describe_evaluation,
    find_grid,
    image_size_of,
    infer_model,
)
from vit_jax.models.mixer import MlpMixer
from vit_jax.utils.bounds import shorten

_NORM_EPSILON, _CLIP_EPSILON = 1e-6, 1e-5
_ACTIVATIONS = {
    **{"gelu_tanh": "gelu_tanh", "gelu_erf": "gelu", "quick_gelu": "quick_gelu"},
    "swiglu": "silu",
}
_POOLS = {"token": "token", "gap": "avg", "map": "map", "unpooled": "", "token_unpooled": ""}
# timm's functions for a model of any size, and for hybrids by the units in the stages. timm ignores
# arguments that are null, so none of these functions has layer scale, or a grid for positions.
_PLAIN, _DISTILLED = "vit_base_patch16_224", "deit_base_distilled_patch16_224"
_ROPE = "eva_giant_patch14_224"
_DINOV3 = "vit_small_patch16_dinov3"  # the function whose norms have the epsilon of CLIP
_PERCEPTION = "vit_pe_core_tiny_patch16_384"  # has a norm in front of the blocks too
_BEIT = "beit_base_patch16_224"
_CLIP = "vit_base_patch16_clip_224"
_HYBRIDS = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}
_KEY_BIAS = re.compile(r"Transformer/encoderblock_\d+/.*/key/bias$")
SQUASHED = re.compile(r"decode\|resize\((\d+)(?:, ?(\d+))?[^|]*\)")
CENTERED = re.compile(r"decode\|resize_small\((\d+)[^|]*\)\|central_crop\((\d+)[^|]*\)")
METHOD = re.compile(r"method='(\w+?)(_antialias)?'")


def leave_out_pre_logits(weights: Weights) -> tuple[Weights, list[str]]:
    """Leaves out the tanh layer `pre_logits` and the head behind it, for which timm has no place.

    The layer can't be folded into the head, since it is not linear.

    Returns:
      Weights of a model without a classifier, whose features are the input of that layer, with a
      note; the same weights and no note where there is no such layer.
    """
    if not any(path.startswith("pre_logits/") for path in weights.params):
        return weights, []
    params = {
        path: x
        for path, x in weights.params.items()
        if not path.startswith(("pre_logits/", "head/", "head_dist/"))
    }
    model = weights.model | {"representation_size": None, "num_classes": 0}
    note = (
        "pre_logits, head: left out, since timm has no tanh layer (pre_logits) before its head: "
        "the file gives features. A .npz has the classifier, and model.representation_size=None "
        "trains one that timm can hold"
    )
    return dataclasses.replace(weights, params=params, model=model, class_names=None), [note]


def make_timm_config(weights: Weights) -> tuple[dict[str, Any], list[str]]:
    """Makes the content of `config.json` for weights that `write_safetensors` writes.

    Returns:
      A JSON object, and a note if timm can't prepare images as they were prepared here.

    Raises:
      ValueError: no function of timm makes this model from values of JSON.
    """
    check_sizes_stay(weights.model, weights.preprocess.get("image_size"))
    inferred = infer_model(weights.params)
    model = inferred | dict(weights.model) | {"patch_size": inferred["patch_size"]}
    head = weights.params.get("head/kernel")
    num_classes = 0 if head is None else int(head.shape[-1])
    images, notes = _describe_images(weights.preprocess)
    ours = {key: model.get(key) for key in TIMM_RESNET}
    if model.get("resnet_layers") is not None and ours != TIMM_RESNET:
        notes.append(
            f"model.resnet_epsilon={ours['resnet_epsilon']}: timm's hybrids have "
            f"{TIMM_RESNET['resnet_epsilon']}, and compute slightly other logits"
        )
    size = weights.preprocess.get("image_size")
    if size is None and (grid := find_grid(model, weights.preprocess)):
        size = image_size_of(grid, model)
    if size is None:
        raise ValueError("nothing states the size of the images")
    keys_biased = any(x.any() for p, x in weights.params.items() if _KEY_BIAS.match(p))
    grid = find_grid(model, weights.preprocess | {"image_size": size})
    is_mixer = model["name"] == "mixer"
    if is_mixer:
        architecture, arguments = find_mixer_arguments(model)
    else:
        architecture, arguments = _find_arguments(model, grid, keys_biased=keys_biased)
    pool = _POOLS[MlpMixer.classifier if is_mixer else model["classifier"]]
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": model["hidden_size"],
        "global_pool": pool,
        "model_args": {"img_size": list(size), "global_pool": pool, **arguments},
        "pretrained_cfg": {
            "num_classes": num_classes,
            "input_size": [3, *size],
            "fixed_input_size": True,
            "pool_size": None,
            "custom_load": False,
            "first_conv": "stem.proj" if is_mixer else "patch_embed.proj",
            "classifier": ["head", "head_dist"] if model.get("distillation_token") else "head",
            **images,
        },
    }
    if weights.class_names is not None and num_classes:
        config["label_names"] = list(weights.class_names)
    return config, notes


def _find_arguments(
    model: Mapping[str, Any], grid: tuple[int, int] | None, *, keys_biased: bool
) -> tuple[str, dict[str, Any]]:
    """Returns the name of a function of timm, and the arguments that make this model of it.

    `grid` is (rows, columns) of patches in its images; `keys_biased` is whether any bias of keys
    is not zero, see `to_timm`.
    """
    epsilon, is_clip = model.get("norm_epsilon", _NORM_EPSILON), bool(model.get("pre_norm"))
    is_dinov3 = model.get("rope_coordinates") == "centered" and epsilon > 2 * _NORM_EPSILON
    expected = _CLIP_EPSILON if is_clip or is_dinov3 else _NORM_EPSILON
    if not math.isclose(epsilon, expected):
        raise ValueError(f"model.norm_epsilon={epsilon}: timm's models have {expected}")
    width, registers = model["hidden_size"], model.get("num_registers") or 0
    unused = has_unused_token(model)
    token = unused or model["classifier"] in ("token", "token_unpooled")
    registers -= int(unused)
    swiglu = model.get("activation") == "swiglu"
    after = bool(model.get("norm_after_pooling"))
    learned = model.get("position_embedding", "learned") != "none"
    arguments: dict[str, Any] = {
        "patch_size": list(model["patch_size"]),
        "embed_dim": width,
        "depth": model["num_layers"],
        "num_heads": model["num_heads"],
        "mlp_ratio": model["mlp_dim"] / width,
        "class_token": token,
        "no_embed_class": bool(registers) or unused or not token,
        "qk_norm": bool(model.get("qk_norm")),
    }
    if int(width * arguments["mlp_ratio"]) != model["mlp_dim"]:
        raise ValueError(f"model.mlp_dim={model['mlp_dim']}: timm has it as a ratio to the width")
    if model.get("layer_scale_init") is not None:
        arguments["init_values"] = model["layer_scale_init"]
    if model.get("position_embedding") == "relative":
        for key in ("class_token", "no_embed_class", "qk_norm"):
            del arguments[key]
        return _BEIT, arguments | {
            "init_values": model.get("layer_scale_init") or 0.0,
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": True,
            "swiglu_mlp": swiglu,
            "scale_mlp": bool(model.get("mlp_norm")),
        }
    if model.get("rope_theta") is not None:
        reference = model.get("rope_reference_grid") or (grid if is_clip else None)
        if reference is not None:
            arguments["ref_feat_shape"] = list(reference)
        if model.get("norm") == "rms_norm":
            raise ValueError(
                "model.norm='rms_norm' with model.rope_theta: timm takes a class for it, which "
                "JSON has not"
            )
        if is_dinov3 and "init_values" not in arguments:
            raise ValueError(
                f"model.layer_scale_init=None with model.norm_epsilon={epsilon} and centred "
                "coordinates: timm has no such model by name"
            )
        if model.get("rope_frequencies") == "mixed":
            arguments["rope_type"] = "mixed"
        if is_clip:
            arguments["use_pre_transformer_norm"] = True
        if model.get("rope_offset"):
            arguments["rope_grid_offset"] = model["rope_offset"]
        if model["classifier"] == "map":
            hidden = model.get("map_mlp_dim") or model["mlp_dim"]
            arguments["attn_pool_num_heads"] = model.get("map_num_heads") or model["num_heads"]
            arguments["attn_pool_mlp_ratio"] = hidden / width
            if int(width * (hidden / width)) != hidden:
                raise ValueError(f"model.map_mlp_dim={hidden}: timm has it as a ratio to the width")
        if model.get("rope_coordinates") == "centered":
            arguments |= {"rope_type": "dinov3", "rope_rotate_half": True}
            # timm then has the gate as a layer of its own, as the published files do.
            arguments["swiglu_align_to"] = 1 if model["mlp_dim"] % 8 else 8
        function = _DINOV3 if is_dinov3 else _PERCEPTION if is_clip else _ROPE
        return function, arguments | {
            "qkv_fused": True,
            "qkv_bias": model.get("qkv_bias") != "none",
            "scale_attn_inner": bool(model.get("attention_norm")),
            "scale_mlp": bool(model.get("mlp_norm")),
            "attn_type": "rope" if keys_biased else "eva",
            "swiglu_mlp": swiglu,
            "num_reg_tokens": registers,
            "use_rot_pos_emb": True,
            "use_abs_pos_emb": learned,
            "rope_grid_indexing": "xy" if columns_first(model) else "ij",
            "rope_temperature": float(model["rope_theta"]),
            "use_fc_norm": after,
        }
    if swiglu:
        raise ValueError("model.activation='swiglu': timm takes a class for it, which JSON has not")
    arguments |= {
        "act_layer": _ACTIVATIONS[model.get("activation", "gelu_tanh")],
        "reg_tokens": registers,
        "pos_embed": "learn" if learned else "none",
        "fc_norm": after,
    }
    if model.get("qkv_bias") == "none":
        arguments["qkv_bias"] = False
    if model.get("norm") == "rms_norm":
        arguments["norm_layer"] = "rmsnorm"
    for key, theirs in (("attention_norm", "scale_attn_norm"), ("mlp_norm", "scale_mlp_norm")):
        if model.get(key):
            arguments[theirs] = True
    if model["classifier"] == "map" and registers:
        arguments["pool_include_prefix"] = True
    if (units := model.get("resnet_layers")) is not None:
        if tuple(units) not in _HYBRIDS or model.get("resnet_width", 1.0) != 1.0:
            raise ValueError(f"model.resnet_layers={tuple(units)}: timm has no such hybrid by name")
        return _HYBRIDS[tuple(units)], arguments
    if model.get("distillation_token"):
        del arguments["class_token"], arguments["no_embed_class"], arguments["reg_tokens"]
        return _DISTILLED, arguments
    if is_clip:
        return _CLIP, arguments | {"pre_norm": True}
    return _PLAIN, arguments


def _describe_images(preprocess: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns how timm prepares images; a note if its way differs from the line of the weights."""
    colors = {
        key: [float(x) for x in np.broadcast_to(preprocess.get(key, 0.5), 3)]
        for key in ("mean", "std")
    }
    line = preprocess.get("eval") or ""
    method = match[1] if (match := METHOD.search(line)) else "bilinear"
    method = method if method in ("nearest", "bilinear", "bicubic", "lanczos") else "bilinear"
    images = colors | {"interpolation": method, "crop_pct": 1.0, "crop_mode": "squash"}
    resize: tuple[int, ...] = ()
    crop = 0, 0
    if match := CENTERED.fullmatch(line):
        resize, crop = (int(match[1]),), (int(match[2]), int(match[2]))
        images |= {"crop_mode": "center", "crop_pct": crop[0] / resize[0]}
    elif match := SQUASHED.fullmatch(line):
        resize = crop = int(match[1]), int(match[2] or match[1])
    if resize:
        same, _ = describe_evaluation(
            resize=resize, crop=crop, interpolation=method, rounding="nearest"
        )
        # Both are ways to write a square.
        square = same.get("eval", "").replace(f"({resize[0]}, {resize[0]}, ", f"({resize[0]}, ")
        if line in (same.get("eval"), square):
            return images, []
    return images, [
        f"config.json: timm has no line that equals {shorten(line)}: it prepares images by "
        f"crop_mode={images['crop_mode']}, crop_pct={images['crop_pct']:.4g} and {method} "
        "interpolation, which may give slightly other pixels"
    ]
