# SPDX-License-Identifier: Apache-2.0
"""Reads Vision Transformers of timm: their tensors, and the `config.json` published with them.

The files of DINOv2, DINOv3 and ViT-5 from their own repositories are read too. Source: timm 1.0.31.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from vit_jax.checkpoint.pretrained.config_json import (
    check_keys,
    check_sizes,
    check_values,
    is_number,
    read_class_names,
    read_colors,
    read_pair,
)
from vit_jax.checkpoint.pretrained.names import TIMM_PATCHES, describe_family
from vit_jax.checkpoint.pretrained.originals import Original, read_original
from vit_jax.checkpoint.pretrained.timm_tensors import (
    TIMM_RESNET,
    find_positions,
    pop_mask_token,
    require,
    to_linen,
)
from vit_jax.checkpoint.pretrained.weights import (
    Weights,
    describe_evaluation,
    describe_model,
    describe_no_line,
    image_size_of,
)
from vit_jax.models.positions import RopeCoordinates
from vit_jax.utils.bounds import shorten

_NORM_EPSILON, _CLIP_EPSILON = 1e-6, 1e-5
_CROP_PCT = 0.875  # timm's default
_ROPE_REFERENCE = (16, 16)  # of timm's vit_*_rope_reg*_gap_*
_NO_CONFIG = "no config.json names the model"
_EVA = re.compile(r"blocks\.\d+\.(gamma_1|attn\.(q_bias|q_proj\.weight))$")
_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
# Attention heads by the name of an architecture: the first pattern that matches, and then the word
# after the kind of model. Verified for all architectures of timm that can be read here.
_NUM_HEADS = (
    (re.compile(r"vit_base_patch16_gap_224$"), 16),
    (re.compile(r"vit_base_patch\d+_plus_"), 14),
    (re.compile(r"vit_giant_patch14(_reg\d)?_(dinov2|tipsv2)$"), 24),
    (re.compile(r"vit_huge_plus_patch16_dinov3"), 20),
    (re.compile(r"vit_7b_patch16_dinov3"), 32),
    (re.compile(r"vit_giant_patch16_lingbot"), 24),
    (re.compile(r"test_vit2?$"), 2),
    (re.compile(r"test_vit[34]$"), 3),
)
_SIZED = re.compile(
    r"(?:vit(?:_pe_core)?|deit3?|flexivit|eva(?:02)?|beit(?:3|v2)?)_([a-z0-9]+)(?:_|$)"
)
_NUM_HEADS_BY_SIZE = {
    "tiny": 3,
    "wee": 4,
    "xsmall": 4,
    "little": 5,
    "small": 6,
    "medium": 8,
    "mediumd": 8,
    "betwixt": 10,
    "base": 12,
    "so150m2": 13,
    "so150m": 14,
    **dict.fromkeys(("large", "huge", "giant", "gigantic", "giantopt", "so400m"), 16),
}
# Architectures of timm whose class token and registers have no position embedding.
_NO_EMBED_CLASS = re.compile(
    r"deit3_|flexivit_|vit_(?!so150m)\w+_reg\d+_(gap|dinov2)|vit_[a-z]+_patch\d+_rope_(mixed_)?ape_"
)
# Backbones of DINOv3 and models like it, whose rotary embeddings have centred coordinates.
_CENTERED = re.compile(r"vit_\w+_patch\d+_(dinov3|lingbot)")
# Models with position embeddings beside or in place of rotary ones, and models with registers.
_EMBEDDED = re.compile(r"eva(02)?_|vit_pe_core_|vit_\w+_rope_(mixed_)?ape_")
_REGISTERED = re.compile(r"vit_\w+_(reg\d+_|dinov3|lingbot)")
# Models whose norms have the epsilon of PyTorch, which neither their tensors nor options show.
_BEIT3 = re.compile(r"beit3_")
# Models of the class `Eva` without rotary embeddings.
_EVA_V1 = re.compile(r"eva_")
# Perception Encoders, with the size of their patches and of the images they were trained on.
_PERCEPTION = re.compile(r"vit_pe_core_[a-z]+_patch(\d+)_(\d+)")
_PERCEPTION_POOL_HEADS = 8
# In timm these SigLIP models, and no others, approximate GELU by tanh.
_TANH_GELU = re.compile(
    r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip"
    r"|vit_large_patch16_siglip_(gap_)?512"
)
# Arguments of the classes: those that tensors show (see `_list_arguments`), or that matter in
# training alone.
_SHOWN = {
    *("patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio", "init_values"),
    *("qkv_bias", "qkv_fused", "proj_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm"),
    *("scale_mlp", "scale_attn_inner", "swiglu_mlp", "swiglu_align_to", "attn_pool_mlp_ratio"),
    *("class_token", "reg_tokens", "num_reg_tokens", "distilled", "use_abs_pos_emb", "pos_embed"),
    *("pre_norm", "final_norm", "fc_norm", "use_fc_norm", "attn_type", "embed_norm_layer"),
    *("use_pre_transformer_norm", "use_post_transformer_norm", "img_size", "no_embed_class"),
    *("use_rel_pos_bias", "use_shared_rel_pos_bias"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init", "fix_init", "head_init_scale"),
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "device", "dtype"),
}
# Parts of names of tensors that no model here has, and what they are of.
_ABSENT = {
    "patch_embed.norm.": "a norm of the patches in front of their position embeddings",
    ".attn.lambda_": "differential attention",
}
_RELATIVE = "blocks.0.attn.relative_position_bias_table"
_QUERY_BIASES = ("qkv.bias", "q_bias", "q_proj.bias")
_QUERY_NORM = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query_norm/scale"
# Arguments that are used, and values of others with which the function is that of a model here.
_USED = {"num_heads", "global_pool", "act_layer", "pool_include_prefix", "use_rot_pos_emb"} | {
    *("rope_temperature", "rope_grid_indexing", "ref_feat_shape", "rope_type", "rope_rotate_half"),
    *("norm_layer", "qkv_bias_separate", "rope_grid_offset", "attn_pool_num_heads"),
    *("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),  # in training alone
}
_LAYER_NORMS = ("", "layernorm", "LayerNorm", "layer_norm")
_RMS_NORMS = ("rmsnorm", "RmsNorm", "rms_norm")
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "attn_layer": ("", "attn"),
    "use_post_norm": (False,),
    "rope_type": ("", "cat", "dinov3", "mixed"),
    "gated_attn": (False,),
    "attn_only_layer_scale": (False,),
    "rope_grid_indexing": ("ij", "xy"),
    "rope_rotate_half": (False, True),
    "global_pool": ("", "avg", "token", "map"),
    "pos_embed": ("", "none", "learn"),
}


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
    config = {key: value for key, value in config.items() if value is not None}
    if not isinstance(images := config.get("pretrained_cfg", {}), Mapping):
        raise ValueError(f"pretrained_cfg={shorten(images)} in config.json: expected an object")
    # A name may have a tag of the weights, which does not change the model.
    architecture, options = config.get("architecture", "").partition(".")[0], _read_options(config)
    original = read_original(tensors)
    tensors = dict(tensors) if original is None else original.tensors
    objective_params = pop_mask_token(tensors)
    _check_architecture(tensors, architecture)
    require(tensors, _list_required(tensors, architecture, options))
    rope = _find_rope(tensors, architecture, options, original)
    classifier, notes = _find_classifier(tensors, config, options)
    notes += rope.notes
    average = classifier in ("gap", "map") and "cls_token" in tensors
    implied = _show_num_heads(tensors) or imply_num_heads(architecture)
    if original is not None:
        implied = implied or original.num_heads
        notes += original.notes
    pool_heads = options.get("attn_pool_num_heads")
    if pool_heads is None and _PERCEPTION.match(architecture):
        pool_heads = _PERCEPTION_POOL_HEADS
    if not isinstance(pool_heads, int | None) or (pool_heads or 1) < 1:
        raise ValueError(
            f"model_args.attn_pool_num_heads={shorten(pool_heads)} in config.json: expected an "
            "integer above 0"
        )
    if pool_heads and tensors[TIMM_PATCHES].shape[0] % pool_heads:
        raise ValueError(
            f"{pool_heads} heads of attention pooling do not divide the width of "
            f"{tensors[TIMM_PATCHES].shape[0]}: correct attn_pool_num_heads in config.json"
        )
    slots, grid, more = _find_positions(tensors, config, original)
    notes += more
    params, more = to_linen(
        tensors,
        num_heads=next(
            (n for n in (num_heads, options.get("num_heads")) if n is not None), implied
        ),
        num_slots=slots,
        pool_heads=pool_heads,
        average=average,
        swap_axes=rope.swap_axes,
        halves=rope.halves,
        fill_biases=original is None
        and rope.coordinates == "index"
        and _RELATIVE not in tensors,  # Timm's `Beit` never has biases of keys.
    )
    model = describe_model(params, rope_theta=rope.theta) | {"classifier": classifier}
    if rope.offset:
        model["rope_offset"] = rope.offset
    if rope.coordinates != "index":
        model["rope_coordinates"] = rope.coordinates
    check_sizes(options, _list_arguments(options, tensors, params, model), where="model_args.")
    check_sizes(config, _list_sizes(params, model))
    settings, settings_notes = _read_timm_settings(
        architecture, options, model, known=implied is not None
    )
    if original is not None:
        stated = {k: x for k, x in original.model.items() if k != "activation"}
        settings, settings_notes = settings | stated, []
    model = settings | model | {"rope_reference_grid": rope.reference}
    if "resnet_layers" in model:
        model |= TIMM_RESNET
    _check_pooling(architecture, options, model, params)
    preprocess, image_notes = read_timm_images(config.get("pretrained_cfg", config))
    names, name_notes = read_timm_names(config, params)
    if "image_size" in preprocess and "resnet_layers" not in model:
        more += _note_dropped_pixels(preprocess["image_size"], model)
    kind = "timm hybrid" if "resnet_layers" in model else "timm"
    kind = kind if original is None else original.name
    return Weights(
        params=params,
        objective_params=objective_params,
        layout=f"{kind} safetensors",
        model=model,
        preprocess=({"image_size": image_size_of(grid, model)} if grid else {}) | preprocess,
        posemb_grid=grid,
        # The published FlexiViTs were trained with another rule than timm's.
        posemb_resize="bilinear_half_pixel" if architecture.startswith("flexivit_") else "bicubic",
        class_names=names,
        notes=(*notes, *more, *settings_notes, *image_notes, *name_notes),
    )


def _read_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the model that config.json states."""
    options = config.get("model_args") or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"model_args={shorten(options)} in config.json: expected an object")
    check_keys(options, _SHOWN | _USED | _EXPECTED.keys(), where="model_args.")
    check_values(options, _EXPECTED, where="model_args.")
    return {key: value for key, value in options.items() if value is not None}


def _check_architecture(tensors: Mapping[str, np.ndarray], architecture: str) -> None:
    named = f"architecture {architecture!r}" if architecture else _NO_CONFIG
    if tensors[TIMM_PATCHES].ndim != 4:
        raise ValueError(f"{TIMM_PATCHES} is {tensors[TIMM_PATCHES].shape}: expected a convolution")
    pre_norm = {"norm_pre.weight", "norm_pre.bias"} & tensors.keys()
    if pre_norm and (len(pre_norm) == 1 or "patch_embed.proj.bias" in tensors):
        raise ValueError(
            f"{named}: it has a norm in front of the blocks (norm_pre), and either only one of its "
            "tensors or a bias of the patches too, as no model here"
        )
    without_norm = re.match(r"vit_pe_(lang|spatial)_", architecture)
    if without_norm or not {"norm.weight", "fc_norm.weight"} & tensors.keys():
        raise ValueError(
            f"{named}: it has no norm behind the blocks (norm or fc_norm), as every model here has"
        )
    for part, what in _ABSENT.items():
        if name := next((name for name in tensors if part in name), None):
            raise ValueError(f"{named}: it has {what} ({name}), as no model here")
    if _RELATIVE in tensors and "pos_embed" in tensors:
        raise ValueError(
            f"{named}: it has both position embeddings (pos_embed) and relative position biases, "
            "as no model here"
        )
    if "_sapiens2" in architecture:
        raise ValueError(f"{named}: several heads share keys and values, as in no model here")
    if "_rpn_" in architecture or architecture.startswith("eva02_enormous_"):
        raise ValueError(f"{named}: it has norms behind its layers, which no model here has")
    for name in ("cls_token", "dist_token", "reg_token", "register_tokens"):
        if name in tensors and tensors[name].ndim != 3:
            raise ValueError(f"{name} is {list(tensors[name].shape)}: expected [1, length, width]")
    if family := describe_family(tensors):
        raise ValueError(f"{named}: it is a {family}, which no model here computes")
    if not {"blocks.0.attn.qkv.weight", "blocks.0.attn.q_proj.weight"} & tensors.keys():
        found = next((name for name in sorted(tensors) if name.startswith("blocks.0.")), "none")
        raise ValueError(f"{named}: it has {found} in place of blocks.0.attn.qkv, as no model here")


def _list_required(
    tensors: Mapping[str, np.ndarray], architecture: str, options: Mapping[str, Any]
) -> list[str]:
    """Returns tensors beside layers without which the model would be taken for another."""
    required = []
    if _EMBEDDED.match(architecture) and options.get("use_abs_pos_emb") is not False:
        required.append("pos_embed")
    no_registers = 0 in [options.get(key) for key in ("reg_tokens", "num_reg_tokens")]
    if _REGISTERED.match(architecture) and not no_registers and "register_tokens" not in tensors:
        required.append("reg_token")
    if _RELATIVE in tensors:  # Timm's `Beit` always has one.
        required.append("cls_token")
    return required


def _show_num_heads(tensors: Mapping[str, np.ndarray]) -> int | None:
    """Returns the attention heads that parameters of positions are of; None without these."""
    if _RELATIVE in tensors:
        return tensors[_RELATIVE].shape[-1]
    frequencies = tensors.get("rope.freqs")
    return frequencies.shape[2] if frequencies is not None and frequencies.ndim == 4 else None


def imply_num_heads(architecture: str) -> int | None:
    """Returns the attention heads of an architecture of timm; None if its name does not show it."""
    for pattern, heads in _NUM_HEADS:
        if pattern.match(architecture):
            return heads
    size = _SIZED.match(architecture)
    return _NUM_HEADS_BY_SIZE.get(size[1]) if size else None


def _list_sizes(params: Mapping[str, np.ndarray], model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sizes that timm states beside the arguments of the model."""
    sizes = {} if "pre_logits/kernel" in params else {"num_features": model["hidden_size"]}
    if "head/kernel" in params:
        sizes["num_classes"] = params["head/kernel"].shape[-1]
    return sizes


def _list_arguments(
    options: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    params: Mapping[str, np.ndarray],
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the arguments of timm's classes as the tensors show them, for `check_sizes`."""
    width, gated = model["hidden_size"], model.get("activation") == "swiglu"
    registers = next((tensors[n] for n in ("reg_token", "register_tokens") if n in tensors), None)
    num_registers = 0 if registers is None else registers.shape[1]
    first = params.get("conv_root/kernel", params["embedding/kernel"])
    norm, fc_norm = ("norm.weight" in tensors), ("fc_norm.weight" in tensors)
    scaled_attention, scaled_mlp = (f"blocks.0.{x}.norm.weight" in tensors for x in ("attn", "mlp"))
    scaled = "layer_scale_init" in model
    positions = "pos_embed" in tensors
    rope_type = "dinov3" if model.get("rope_coordinates") == "centered" else "cat"
    rope_type = "mixed" if model.get("rope_frequencies") == "mixed" else rope_type
    found: dict[str, Any] = _list_sizes(params, model) | {
        "embed_dim": width,
        "depth": model["num_layers"],
        "patch_size": tuple(tensors[TIMM_PATCHES].shape[2:]),
        "in_chans": first.shape[2],
        "class_token": "cls_token" in tensors,
        "reg_tokens": num_registers,
        "num_reg_tokens": num_registers,
        "distilled": "dist_token" in tensors,
        "qk_norm": "qk_norm" in model,
        "qkv_bias": any(f"blocks.0.attn.{n}" in tensors for n in _QUERY_BIASES),
        "proj_bias": "blocks.0.attn.proj.bias" in tensors,
        "scale_attn_norm": scaled_attention,
        "scale_attn_inner": scaled_attention,
        "rope_type": rope_type,
        "use_rel_pos_bias": model["position_embedding"] == "relative",
        "use_shared_rel_pos_bias": False,
        "scale_mlp_norm": scaled_mlp,
        "scale_mlp": scaled_mlp,
        "swiglu_mlp": gated,
        "pre_norm": "pre_norm" in model,
        "use_pre_transformer_norm": "pre_norm" in model,
        "final_norm": norm or fc_norm,
        "use_post_transformer_norm": norm or fc_norm,
        "use_abs_pos_emb": positions,
    }
    if norm or fc_norm:
        found |= {"fc_norm": fc_norm, "use_fc_norm": fc_norm}
    if heads := _show_num_heads(tensors):
        found["num_heads"] = heads
    if "qk_norm" in model:
        found["num_heads"] = width // params[_QUERY_NORM].size
    if bool(options.get("init_values")) != scaled and options.get("init_values") != 0:
        found["init_values"] = "layer scale" if scaled else "no layer scale"
    if (options.get("pos_embed") == "learn") != positions:
        found["pos_embed"] = "position embeddings" if positions else "no position embeddings"
    if "patch_embed.norm.weight" not in tensors and options.get("embed_norm_layer"):
        found["embed_norm_layer"] = "no norm in patch_embed"
    ratio, align = options.get("mlp_ratio"), options.get("swiglu_align_to")
    # A gated layer of `VisionTransformer` halves its width, one of `Eva` does not.
    halved = gated and not options.get("swiglu_mlp")
    widths = {model["mlp_dim"]} | ({2 * model["mlp_dim"]} if halved else set())
    if not _makes_width(ratio, width, widths, align):
        found["mlp_ratio"] = model["mlp_dim"] / width
    pooling = params.get("MAPHead_0/MlpBlock_0/Dense_0/bias")
    if pooling is not None and not _makes_width(
        options.get("attn_pool_mlp_ratio"), width, {pooling.size}, None
    ):
        found["attn_pool_mlp_ratio"] = pooling.size / width
    return found


def _makes_width(ratio: Any, width: int, expected: Collection[int], align: Any) -> bool:
    """Whether a layer `ratio` times as wide as the model has one of the expected widths."""
    if not is_number(ratio):
        return False
    hidden = int(width * ratio)
    if type(align) is int and align > 0:
        hidden += -hidden % align
    return hidden in expected


def _check_pooling(
    architecture: str,
    options: Mapping[str, Any],
    model: Mapping[str, Any],
    params: Mapping[str, Any],
) -> None:
    """Refuses pooling over other tokens than those that are pooled here."""
    more = "cls" in params or "num_registers" in model
    implied = model["rope_theta"] is not None or architecture == "test_vit3"
    everything = options.get("pool_include_prefix", implied)
    if more and model["classifier"] == "map" and not everything:
        raise ValueError("attention pooling that leaves out registers, which no model here has")
    if more and model["classifier"] == "gap" and options.get("pool_include_prefix"):
        raise ValueError(
            "model_args.pool_include_prefix=True in config.json: a mean over patches and other "
            "tokens, which no model here has"
        )


def _note_dropped_pixels(image_size: tuple[int, int], model: dict[str, Any]) -> list[str]:
    """Lets the model take images that its patches do not fill, if the file states such; a note."""
    left = [size % patch for size, patch in zip(image_size, model["patch_size"], strict=True)]
    if not any(left):
        return []
    model["drop_pixels"] = True
    return [
        f"images: {image_size[0]}x{image_size[1]} pixels, of which the last {left[0]} rows and "
        f"{left[1]} columns make no whole patch: left out, as in timm (model.drop_pixels)"
    ]


def read_timm_names(
    config: Mapping[str, Any], params: Mapping[str, np.ndarray]
) -> tuple[tuple[str, ...] | None, list[str]]:
    """Returns the class names that config.json states, None without any, and notes."""
    images = config.get("pretrained_cfg") or {}
    found = [x.get(key) for x in (config, images) for key in ("label_names", "labels")]
    head = params.get("head/kernel")
    return read_class_names(
        next(filter(None, found), None),
        key="label_names",
        num_classes=None if head is None else head.shape[-1],
    )


class _Rope(NamedTuple):
    """A rotary embedding, or none; see `to_linen` for `swap_axes` and `halves`."""

    theta: float | None
    reference: tuple[int, int] | None = None
    offset: float = 0.0
    coordinates: RopeCoordinates = "index"
    swap_axes: bool = False
    halves: bool = False
    notes: tuple[str, ...] = ()


def _find_rope(
    tensors: Mapping[str, np.ndarray],
    architecture: str,
    options: Mapping[str, Any],
    original: Original | None,
) -> _Rope:
    """Infers the rotary embedding, which has no tensors."""
    if original is not None:
        coordinates = original.model.get("rope_coordinates", "index")
        theta = original.model["rope_theta"]
        return _Rope(theta, coordinates=coordinates, halves=original.halves)
    theta, reference, indexing, notes = None, None, "ij", []
    mixed, offset = "rope.freqs" in tensors, 0.0
    if _RELATIVE in tensors:
        return _Rope(None)
    if mixed:
        # What the frequencies started from; they are in the file.
        theta, indexing = 10.0, "xy"
        if not architecture and "rope_grid_indexing" not in options:
            notes = [f"{_NO_CONFIG}: assuming rope_grid_indexing='xy', as in timm's rope_mixed"]
    elif options.get("rope_type") == "mixed":
        raise ValueError("model_args.rope_type='mixed' in config.json: rope.freqs is missing")
    centered = options.get("rope_type") == "dinov3"
    if mixed:
        pass
    elif perception := _PERCEPTION.match(architecture):
        patch, size = map(int, perception.groups())
        theta, indexing, reference = 10_000.0, "xy", (size // patch, size // patch)
        offset = 1.0 if "cls_token" in tensors else 0.0
    elif _CENTERED.match(architecture):
        theta, centered = 100.0, options.get("rope_type", "dinov3") == "dinov3"
    elif re.match(r"vit_\w+_rope_reg\d+_gap_|eva02_", architecture):
        theta, reference = 10_000.0, _ROPE_REFERENCE
    elif re.match(r"vit_[a-z]+_patch\d+_rope_(ape_)?\d+", architecture):
        theta, indexing = 100.0, "xy"
    elif options.get("use_rot_pos_emb"):
        theta = 10_000.0  # The default of the class.
    elif _EVA_V1.match(architecture):
        return _Rope(None)
    elif "pos_embed" not in tensors or any(map(_EVA.match, tensors)):
        if "pos_embed" in tensors or "cls_token" in tensors or architecture:
            raise ValueError(
                f"tensors of timm's class Eva, architecture {architecture or 'unknown'}: only "
                "eva*, vit_*_dinov3, vit_*_rope_reg*_gap_*, vit_*_rope_* and vit_pe_core_* are "
                "known here, from the config.json beside the file"
            )
        theta, reference = 10_000.0, _ROPE_REFERENCE
        notes = [
            "rope_theta, rope_reference_grid: no config.json states them; 10000 and "
            f"{_ROPE_REFERENCE}, as in timm's vit_*_rope_reg*_gap_256, taken"
        ]
    if theta is None or options.get("use_rot_pos_emb") is False:
        return _Rope(None, notes=tuple(notes))
    temperature = options.get("rope_temperature", theta)
    if not is_number(temperature) or temperature <= 0:
        raise ValueError(
            f"model_args.rope_temperature={shorten(temperature)} in config.json: expected a number "
            "above 0"
        )
    theta = float(temperature)
    offset = options.get("rope_grid_offset", offset)
    if not is_number(offset) or (offset and (mixed or centered)):
        raise ValueError(
            f"model_args.rope_grid_offset={shorten(offset)} in config.json: expected a number, 0 "
            "with rope_type='mixed' or 'dinov3'"
        )
    if "ref_feat_shape" in options and not mixed:
        reference = read_pair(options["ref_feat_shape"], "model_args.ref_feat_shape in config.json")
    return _Rope(
        theta,
        None if centered else reference,
        float(offset),
        "centered" if centered else "index",
        swap_axes=options.get("rope_grid_indexing", indexing) == "xy",
        halves=options.get("rope_rotate_half", centered and "rope_type" not in options),
        notes=tuple(notes),
    )


def _find_positions(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], original: Original | None
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
    if original is not None or _NO_EMBED_CLASS.match(config.get("architecture", "")):
        usual = 0
    stated = options.get("no_embed_class")
    if stated is not None:
        usual = 0 if stated else sum(tokens)
    size, key = read_input_size(images), "pretrained_cfg.input_size"
    if options.get("img_size") is not None:
        key = "model_args.img_size"
        size = read_pair(options["img_size"], f"{key} in config.json")
    if usual is not None and stated is not None and size is None:
        candidates = (usual,)
    if config.get("architecture"):
        key = f"{key} in config.json"
    else:
        key = f"architecture and {key} in a config.json beside the file"
    slots, grid, notes = find_positions(
        tensors, image_size=size, candidates=candidates, usual=usual, key=key
    )
    if stated is not None and grid is not None and slots != usual:
        what = f"{slots} position embeddings in front of those of patches"
        check_sizes(options, {"no_embed_class": what}, where="model_args.")
    return slots, grid, notes


def read_input_size(images: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns (height, width) of the images, None if it is not stated."""
    size = images.get("input_size")
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 3:
        raise ValueError(
            f"input_size={shorten(size)} in config.json: expected channels, height and width"
        )
    return read_pair(size[1:], "input_size in config.json")


def _find_classifier(
    tensors: Mapping[str, Any], config: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """Returns what represents an image, and notes."""
    is_backbone = "head.weight" not in tensors and "global_pool" not in options
    if is_backbone and _CENTERED.match(config.get("architecture", "")) and "cls_token" in tensors:
        note = (
            "classifier: the class token, as in the project's own code; timm pools the patches "
            "(model.classifier='gap')"
        )
        return "token", [note]
    return _find_pooling(tensors, config, options), []


def _find_pooling(
    tensors: Mapping[str, Any], config: Mapping[str, Any], options: Mapping[str, Any]
) -> str:
    # As timm has it: what is stated of the model comes before what is stated of its images.
    images = config.get("pretrained_cfg") or {}
    pool = options.get("global_pool", config.get("global_pool") or images.get("global_pool"))
    check_values({"global_pool": pool}, _EXPECTED)
    has_token, has_pool = "cls_token" in tensors, "attn_pool.latent" in tensors
    if pool == "token" and not has_token:
        check_sizes({"global_pool": pool}, {"global_pool": "no class token"})
    if pool == "map" and not has_pool:
        check_sizes({"global_pool": pool}, {"global_pool": "no attention pooling"})
    if pool in ("token", "avg") and has_pool:
        check_sizes({"global_pool": pool}, {"global_pool": "attention pooling"})
    if pool == "":
        return "token_unpooled" if has_token else "unpooled"
    if has_pool:
        return "map"
    if not has_token or pool == "avg":
        return "gap"
    # By default timm puts the norm behind the pooling where that is a mean.
    mean = not pool and "fc_norm.weight" in tensors and "norm.weight" not in tensors
    return "gap" if mean else "token"


def _read_timm_settings(
    architecture: str, options: Mapping[str, Any], model: Mapping[str, Any], *, known: bool
) -> tuple[dict[str, Any], list[str]]:
    act = options.get("act_layer")
    gated = model.get("activation") == "swiglu"
    expected = ("silu", "swish") if gated else tuple(_ACTIVATIONS)
    check_values({"act_layer": act}, {"act_layer": expected}, where="model_args.")
    default = "gelu_tanh" if _TANH_GELU.match(architecture) else "gelu"
    default = "quick_gelu" if "_clip_quickgelu_" in architecture else default
    # Image towers of CLIP have the norms of PyTorch, and all of them one in front of the blocks.
    clip = "pre_norm" in model or model.get("rope_coordinates") == "centered"
    epsilon = _CLIP_EPSILON if clip or _BEIT3.match(architecture) else _NORM_EPSILON
    rms = model.get("norm") == "rms_norm"
    check_values(options, {"norm_layer": _RMS_NORMS if rms else _LAYER_NORMS}, where="model_args.")
    settings: dict[str, Any] = {"norm_epsilon": epsilon}
    if not gated:
        settings["activation"] = _ACTIVATIONS[act or default]
    if known:
        return settings, []
    stated = {"num_heads": model["num_heads"], "activation": model.get("activation"), **settings}
    if rms and "norm_layer" not in options:
        stated["norm"] = "rms_norm"
    taken = ", ".join(f"{key}={value!r}" for key, value in stated.items() if key not in options)
    who = f"architecture {architecture!r} is unknown here" if architecture else _NO_CONFIG
    return settings, [f"{who}: assuming {taken}, the defaults of timm"]


def read_timm_images(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns `Weights.preprocess` of what config.json states of the images, and notes."""
    found: dict[str, Any] = {}
    if "mean" in config and "std" in config:
        found |= {key: read_colors(config[key]) for key in ("mean", "std")}
    image_size = read_input_size(config)
    if image_size is None:
        return found, []
    height, width = found["image_size"] = image_size
    crop, mode = config.get("crop_pct"), config.get("crop_mode") or "center"
    crop = _CROP_PCT if crop is None else crop
    if not is_number(crop) or not 0.01 <= crop <= 100:
        raise ValueError(
            f"crop_pct={shorten(crop)} in config.json: expected a number such as {_CROP_PCT}, the "
            "part of a side that is kept"
        )
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
