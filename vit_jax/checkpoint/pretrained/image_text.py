# SPDX-License-Identifier: Apache-2.0
"""Reads CLIP and SigLIP of Hugging Face, open_clip and OpenAI: both towers, or one alone.

Sources: transformers 5.23, `models/clip` and `models/siglip`; open_clip 3.3, `model.py`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint.pretrained.config_json import (
    check_keys,
    check_sizes,
    check_values,
    is_number,
    read_colors,
    read_pair,
)
from vit_jax.checkpoint.pretrained.huggingface import HARMLESS, read_preprocess
from vit_jax.checkpoint.pretrained.image_text_tensors import (
    PATCHES,
    POSITIONS,
    PREFIXES,
    TOKENS,
    TRUNK,
    count_layers,
    drop_unused,
    rename_open_clip,
    to_linen,
)
from vit_jax.checkpoint.pretrained.naflex import (
    TRAINED,
    describe_budget,
    square_grid,
    to_patch_kernel,
)
from vit_jax.checkpoint.pretrained.timm import imply_num_heads
from vit_jax.checkpoint.pretrained.timm_tensors import require
from vit_jax.checkpoint.pretrained.timm_tensors import to_linen as timm_to_linen
from vit_jax.checkpoint.pretrained.towers import put_part, take_part, take_tower
from vit_jax.checkpoint.pretrained.weights import (
    POSEMB,
    Weights,
    describe_evaluation,
    image_size_of,
    infer_model,
)
from vit_jax.models.two_towers import TOWERS
from vit_jax.utils.bounds import shorten

_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# By `model_type`: the kind of model.
_KINDS = {
    "clip": "CLIP",
    "clip_vision_model": "CLIP",
    "clip_text_model": "CLIP",
    "siglip": "SigLIP",
    "siglip_vision_model": "SigLIP",
    "siglip_text_model": "SigLIP",
    "siglip2": "SigLIP",
    "siglip2_vision_model": "SigLIP",
    "siglip2_text_model": "SigLIP",
}
# Defaults of the classes of Hugging Face, and attention heads of both towers.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "heads": {"img": 12, "txt": 8}},
    "SigLIP": {
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "heads": {"img": 12, "txt": 12},
    },
}
_HEADS_BY_WIDTH = {1152: 16, 1536: 16}
# Pixels of CLIP, by the README of openai/CLIP.
_PIXELS = {
    "CLIP": {
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    },
    "SigLIP": {"mean": 0.5, "std": 0.5},
}
_SECTIONS = {"img": "vision_config", "txt": "text_config"}
_HF_KNOWN = HARMLESS | {
    *("vision_config", "text_config", "vision_config_dict", "text_config_dict"),
    *("projection_dim", "projection_size", "logit_scale_init_value", "initializer_factor"),
    *("attention_dropout", "dropout", "max_position_embeddings", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps", "image_size", "id2label", "vision_use_head"),
    "num_patches",  # of SigLIP 2 of any resolution
}
_HF_EXPECTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": tuple(_ACTIVATIONS),
    "vision_use_head": (True,),
    "add_cross_attention": (False,),
    "is_decoder": (False,),
}
# Keys of open_clip_config.json: those of the model, and of both towers.
_OC_KNOWN = {
    *("embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_bias"),
    *("init_logit_scale", "nonscalar_logit_scale", "cast_dtype", "output_dict"),
}
_OC_TOWER = {
    *("layers", "width", "head_width", "heads", "mlp_ratio", "patch_size", "image_size"),
    *("patch_dropout", "timm_model_name", "timm_model_pretrained", "timm_proj_bias", "timm_drop"),
    *("timm_drop_path", "act_kwargs", "norm_kwargs", "context_length", "vocab_size", "pool_type"),
    *("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "proj_bias", "no_causal_mask"),
    *("pad_id", "eos_id", "no_ln_pre", "output_tokens"),
}
_OC_EXPECTED: dict[str, tuple[Any, ...]] = {
    "attentional_pool": (False,),
    "final_ln_after_pool": (False,),
    "pos_embed_type": ("learnable",),
    "timm_pool": ("map",),
    "timm_proj": ("none",),
    "proj_type": ("linear",),
    "embed_cls": (False,),
}
_OC_POOLINGS = {"argmax": "eot", "eos": "eot", "last": "last", "first": "first"}


@dataclasses.dataclass(frozen=True)
class _Stated:
    """What files beside the tensors state of a tower.

    Attributes:
      num_heads: attention heads; None for the usual number for the width.
      model: arguments of the tower.
      image_size: (height, width) in pixels, of the image tower.
      assumed: what nothing states, such as "activation".
    """

    num_heads: int | None
    model: dict[str, Any]
    image_size: tuple[int, int] | None = None
    assumed: tuple[str, ...] = ()


def read_image_text(
    tensors: Mapping[str, np.ndarray],
    *,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    open_clip: Mapping[str, Any],
    num_heads: int | None,
) -> Weights:
    """Reads CLIP or SigLIP.

    Args:
      tensors: arrays of any float dtype by name; those of one tower alone too.
      config: content of the `config.json` beside them; may be empty, as the others.
      processor: content of the `preprocessor_config.json`.
      open_clip: content of the `open_clip_config.json`.
      num_heads: attention heads of both towers; None for what the files state, or is usual.

    Returns:
      Weights with the dtypes of the file, of two towers or, if there is only one, of that.

    Raises:
      ValueError: the model has a part that no model here has, or the files are damaged.
    """
    rest, notes = drop_unused(tensors)
    is_huggingface = PATCHES in rest or TOKENS in rest
    rest = rest if is_huggingface else rename_open_clip(rest)
    any_size = {}
    if PATCHES in rest and rest[PATCHES].ndim == 2:
        kernel = to_patch_kernel(rest[PATCHES].T)
        rest[PATCHES] = kernel.transpose(3, 2, 0, 1)
        any_size = {"posemb_grid": square_grid(len(rest[POSITIONS])), "posemb_resize": TRAINED}
    trunk = {n.removeprefix(TRUNK): rest.pop(n) for n in list(rest) if n.startswith(TRUNK)}
    kind = _find_kind(rest, trunk)
    parts = [p for p in PREFIXES if any(n.startswith(PREFIXES[p][0]) for n in rest)]
    parts = ["img", *parts] if trunk else parts
    if is_huggingface and kind == "SigLIP":  # A model without these would be read as another one.
        layers = (PATCHES.removesuffix(".weight"), "text_model.head")
        require(rest, [f"{layer}.bias" for layer in layers if f"{layer}.weight" in rest])
    if is_huggingface:
        stated = {part: _read_huggingface(config, part, kind, rest) for part in parts}
    else:
        stated = {part: _read_open_clip(open_clip, part, kind, rest, trunk) for part in parts}
    heads = {p: stated[p].num_heads if num_heads is None else num_heads for p in parts}
    params: dict[str, np.ndarray] = {}
    if trunk:
        own, more = _read_trunk(trunk, heads.pop("img"))
        params, notes = put_part(own, "img"), [*notes, *more]
    params |= read_towers(rest, heads, is_pair=len(parts) == 2)
    for part in parts:
        where = "config.json" if is_huggingface else "open_clip_config.json"
        if assumed := stated[part].assumed:
            notes.append(f"{part}: no {where} states {', '.join(assumed)}, as usual for {kind}")
    layout = f"{'Hugging Face' if is_huggingface else 'open_clip'} {kind} safetensors"
    weights = _describe(params, parts, stated, layout)
    if any_size:
        weights.model["image"].update(any_size)
    if "img" in parts:
        images = processor if is_huggingface else open_clip.get("preprocess_cfg") or {}
        weights, more = _add_images(weights, stated["img"], images, kind, is_huggingface)
        notes += more
    weights = dataclasses.replace(weights, notes=tuple(notes))
    return weights if len(parts) == 2 else take_tower(weights, parts[0])


def read_towers(
    tensors: Mapping[str, np.ndarray], heads: Mapping[str, int | None], *, is_pair: bool = True
) -> dict[str, np.ndarray]:
    """Converts tensors of towers by the names of Hugging Face.

    Args:
      tensors: arrays of any float dtype by name.
      heads: attention heads of each tower to convert, `img` or `txt`; None for the usual number.
      is_pair: whether there are two towers, which have a scale in common.

    Returns:
      Arrays by path.

    Raises:
      ValueError: a tensor is missing, left over or of another shape than its name implies.
    """
    rest, params = dict(tensors), {}
    for part, number in heads.items():
        number = _usual_heads(rest, part) if number is None else number
        own, rest = _read_tower(rest, part, number)
        params |= put_part(own, part)
    for ours, theirs in (("t", "logit_scale"), ("b", "logit_bias")):
        if theirs in rest and rest[theirs].size != 1:
            raise ValueError(f"{theirs} is {rest[theirs].shape}; expected one number")
        value = rest.pop(theirs, None)
        if is_pair and value is not None:
            params[ours] = value.reshape(1)
    if is_pair and "t" not in params:
        raise ValueError("it has no logit_scale; expected a whole model of two towers")
    if rest:
        raise ValueError(
            f"{len(rest)} tensors have no place in CLIP or SigLIP here, {sorted(rest)[0]} among "
            "them"
        )
    return params


def _find_kind(tensors: Mapping[str, np.ndarray], trunk: Mapping[str, Any]) -> str:
    if trunk and ("attn_pool.latent" not in trunk or "cls_token" in trunk):
        raise ValueError("its images go through a model of timm that is not SigLIP's")
    of_siglip = ("vision_model.head.probe", "text_model.head.weight")
    if trunk or any(name in tensors for name in of_siglip):
        return "SigLIP"
    if "vision_model.embeddings.class_embedding" in tensors or TOKENS in tensors:
        return "CLIP"
    raise ValueError("it has neither a class token nor attention pooling (vision_model.head)")


def _usual_heads(tensors: Mapping[str, np.ndarray], part: str) -> int:
    width = _find_width(tensors, part)
    if width not in _HEADS_BY_WIDTH and width % 64:
        raise ValueError(
            f"nothing states how many attention heads share the width of {width} in {part}; "
            "expected its config.json or open_clip_config.json beside it"
        )
    return _HEADS_BY_WIDTH.get(width) or width // 64


def _find_width(tensors: Mapping[str, np.ndarray], part: str) -> int:
    name = f"{PREFIXES[part][0]}embeddings.position_embedding.weight"
    if name not in tensors:
        raise ValueError(f"it has no {name}")
    return tensors[name].shape[-1]


def _read_tower(
    tensors: Mapping[str, np.ndarray], part: str, heads: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    width = _find_width(tensors, part)
    if type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(f"{heads!r} attention heads do not divide the width of {width} in {part}")
    return to_linen(tensors, part, num_heads=heads)


def _read_trunk(
    trunk: Mapping[str, np.ndarray], heads: int | None
) -> tuple[dict[str, np.ndarray], list[str]]:
    params, notes = timm_to_linen(
        trunk, num_heads=heads, num_slots=0, spell=lambda name: f"{TRUNK}{name}"
    )
    if unknown := [name for name in sorted(params) if "." in name]:
        raise ValueError(f"{TRUNK}{unknown[0]} has no place in a SigLIP here")
    return params, [f"img: {note}" for note in notes]


def _read_huggingface(
    config: Mapping[str, Any], part: str, kind: str, tensors: Mapping[str, np.ndarray]
) -> _Stated:
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        if _KINDS.get(model_type) != kind:
            raise ValueError(
                f"model_type={model_type!r} in config.json, but the tensors are those of a {kind}"
            )
        whole = model_type in ("clip", "siglip", "siglip2")
        where = f"{_SECTIONS[part]}." if whole else ""
        section = config.get(_SECTIONS[part]) if whole else config
        section = {} if section is None else section
        if not isinstance(section, Mapping):
            raise ValueError(f"{where[:-1]}={shorten(section)} in config.json: expected an object")
        check_keys(config, _HF_KNOWN)
        check_keys(section, _HF_KNOWN, where=where)
        check_values(section, _HF_EXPECTED, where=where)
        check_sizes(section, _list_sizes(tensors, part), where=where)
    else:
        section, where = {}, ""
    known = isinstance(model_type, str)
    stated = {key: value for key, value in section.items() if value is not None}
    defaults = _DEFAULTS[kind]
    epsilon = stated.get("layer_norm_eps", defaults["layer_norm_eps"])
    if not is_number(epsilon) or epsilon < 0:
        raise ValueError(
            f"{where}layer_norm_eps={shorten(epsilon)} in config.json: expected 0 or more"
        )
    model: dict[str, Any] = {
        "activation": _ACTIVATIONS[stated.get("hidden_act", defaults["hidden_act"])],
        "norm_epsilon": float(epsilon),
    }
    heads = stated.get("num_attention_heads", defaults["heads"][part] if known else None)
    assumed = () if known else _describe_assumed(model)
    if part == "img":
        # SigLIP 2 of any resolution has no size, but a number of position embeddings.
        usual = 224 if known and "siglip2" not in str(model_type) else None
        size = stated.get("image_size", usual)
        pixels = None if size is None else read_pair(size, f"{where}image_size in config.json")
        return _Stated(heads, model, pixels, assumed)
    # The class reads 2 as: the greatest token. Its own default is the vocabulary's.
    eos = stated.get("eos_token_id", 49407 if known else 2)
    return _Stated(heads, model | _text_options(kind, None if eos == 2 else eos), None, assumed)


def _describe_assumed(model: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={value!r}" for key, value in model.items())


def _text_options(kind: str, eot_id: Any) -> dict[str, Any]:
    if kind == "SigLIP":
        return {"causal": False, "pooling": "last", "eot_id": None}
    if eot_id is not None and (type(eot_id) is not int or eot_id < 0):
        raise ValueError(f"text_config.eos_token_id={shorten(eot_id)} in config.json: no token")
    return {"causal": True, "pooling": "eot", "eot_id": eot_id}


def _list_sizes(tensors: Mapping[str, np.ndarray], part: str) -> dict[str, Any]:
    """Returns what config.json states as the tensors of a tower show it."""
    prefix, projection = PREFIXES[part]
    sizes: dict[str, Any] = {"num_hidden_layers": count_layers(tensors, part)}
    first = tensors.get(f"{prefix}encoder.layers.0.mlp.fc1.weight")
    if first is not None and first.ndim == 2:
        sizes |= {"intermediate_size": first.shape[0], "hidden_size": first.shape[1]}
    if part == "img":
        _, channels, *patch = tensors[PATCHES].shape
        sizes |= {"num_channels": channels, "patch_size": tuple(patch)}
    else:
        positions = tensors[f"{prefix}embeddings.position_embedding.weight"]
        sizes |= {
            "vocab_size": tensors[TOKENS].shape[0],
            "max_position_embeddings": positions.shape[0],
        }
    if f"{projection}.weight" in tensors:
        sizes["projection_dim"] = tensors[f"{projection}.weight"].shape[0]
    return sizes


def _read_open_clip(
    config: Mapping[str, Any],
    part: str,
    kind: str,
    tensors: Mapping[str, np.ndarray],
    trunk: Mapping[str, np.ndarray],
) -> _Stated:
    whole = config.get("model_cfg")
    known = isinstance(whole, Mapping)
    whole = whole if isinstance(whole, Mapping) else {}
    name = "vision_cfg" if part == "img" else "text_cfg"
    section = {k: x for k, x in (whole.get(name) or {}).items() if x is not None}
    if known:
        check_keys(whole, _OC_KNOWN, where="model_cfg.", file="open_clip_config.json")
        more = {"ls_init_value", *_OC_EXPECTED}
        check_keys(section, _OC_TOWER | more, where=f"{name}.", file="open_clip_config.json")
        check_values(section, _OC_EXPECTED, where=f"{name}.", file="open_clip_config.json")
    is_trunk = part == "img" and bool(trunk)
    if not is_trunk:
        sizes = _list_sizes(tensors, part)
        found = {"layers": sizes["num_hidden_layers"], "width": sizes.get("hidden_size")}
        if part == "txt":
            found["vocab_size"] = sizes["vocab_size"]
            found["context_length"] = sizes["max_position_embeddings"]
        check_sizes(section, found, where=f"{name}.", file="open_clip_config.json")
    activation, notes = _find_activation(whole, section, kind, known=known)
    epsilon = (section.get("norm_kwargs") or {}).get("eps", 1e-5 if known else None)
    if epsilon is None or is_trunk:
        epsilon = _DEFAULTS[kind]["layer_norm_eps"]
    if not is_number(epsilon) or epsilon < 0:
        raise ValueError(f"{name}.norm_kwargs={shorten(section['norm_kwargs'])}: no number as eps")
    model = {"activation": activation, "norm_epsilon": float(epsilon)}
    assumed = notes if known else _describe_assumed(model)
    if part == "img":
        heads = section.get("num_heads")
        if is_trunk:
            heads = imply_num_heads(str(section.get("timm_model_name", "")))
        elif known:
            heads = section.get("width", 768) // section.get("head_width", 64)
        size = section.get("image_size")
        pixels = None if size is None else read_pair(size, f"{name}.image_size")
        return _Stated(heads, model, pixels, assumed)
    options = _text_options(kind, None)
    if known:
        pool = section.get("pool_type", "argmax")
        check_values({"pool_type": pool}, {"pool_type": tuple(_OC_POOLINGS)}, where="text_cfg.")
        options = {
            "causal": not section.get("no_causal_mask", False),
            "pooling": _OC_POOLINGS[pool],
            "eot_id": section.get("eos_id", 2) if pool == "eos" else None,
        }
    return _Stated(section.get("heads", 8 if known else None), model | options, None, assumed)


def _find_activation(
    whole: Mapping[str, Any], section: Mapping[str, Any], kind: str, *, known: bool
) -> tuple[str, tuple[str, ...]]:
    if not known:
        return _ACTIVATIONS[_DEFAULTS[kind]["hidden_act"]], ()
    if whole.get("quick_gelu"):
        return "quick_gelu", ()
    kwargs = section.get("act_kwargs") or {}
    if kwargs not in ({}, {"approximate": "tanh"}, {"approximate": "none"}):
        raise ValueError(f"act_kwargs={shorten(kwargs)} in open_clip_config.json is unknown here")
    if kwargs.get("approximate") == "tanh":
        return "gelu_tanh", ()
    if kind == "SigLIP":  # Its weights were trained with this one; open_clip computes exact GELU.
        return "gelu_tanh", ("activation='gelu_tanh', of the training",)
    return "gelu_erf", ()


def _describe(
    params: dict[str, np.ndarray], parts: list[str], stated: Mapping[str, _Stated], layout: str
) -> Weights:
    if len(parts) == 2:
        model = infer_model(params)
    else:
        own = infer_model(take_part(params, parts[0]))
        own.pop("name", None)
        model = {TOWERS[parts[0]]: own}
    for part in parts:
        section = model[TOWERS[part]]
        section |= stated[part].model
        if part == "img":
            section |= {"position_embedding": "learned", "rope_theta": None}
    return Weights(params=params, layout=layout, model=model)


def _add_images(
    weights: Weights,
    stated: _Stated,
    images: Mapping[str, Any],
    kind: str,
    is_huggingface: bool,
) -> tuple[Weights, list[str]]:
    """Adds the grid of the patches and how images are prepared, and returns notes."""
    model = weights.model["image"]
    length = weights.params[f"img/{POSEMB}"].shape[1] - ("img/cls" in weights.params)
    rows, columns = model["patch_size"]
    side = math.isqrt(length)
    grid, size = (side, side), stated.image_size
    if size is not None:
        grid = size[0] // rows, size[1] // columns
    if math.prod(grid) != length:
        raise ValueError(
            f"its {length} position embeddings are not those of {grid[0]}x{grid[1]} patches, which "
            f"images of {size or 'equal sides'} have"
        )
    covered, stated_budget = image_size_of(grid, model), images.get("max_num_patches")
    preprocess: dict[str, Any] = dict(_PIXELS[kind])
    if is_huggingface:
        keys = ("image_mean", "image_std") if "posemb_grid" in model else tuple(images)
        images = {key: images[key] for key in keys if key in images}
        found, notes = read_preprocess(images, {}, kind=kind)
    else:
        found, notes = _read_open_clip_images(images, size or covered)
    if "mean" not in found:
        notes.append(f"images: mean and std are not stated; those of {kind} are taken")
    if "posemb_grid" in model:
        preprocess |= found | describe_budget(rows, grid, budget=_read_budget(stated_budget))
        return dataclasses.replace(
            weights, preprocess=preprocess, posemb_grid=grid, posemb_resize=model["posemb_resize"]
        ), notes
    preprocess |= {"image_size": size or covered} | found
    if (prepared := preprocess["image_size"]) != covered and grid == tuple(
        n // p for n, p in zip(prepared, (rows, columns), strict=True)
    ):
        # Their convolution leaves out the last pixels.
        preprocess["image_size"] = covered
        if "eval" in preprocess:
            preprocess["eval"] += f"|central_crop({covered[0]}, {covered[1]})"
        notes.append(
            f"images: patches cover {covered[0]}x{covered[1]} of {prepared[0]}x{prepared[1]} "
            "pixels: here the middle, there the upper left"
        )
    return (
        dataclasses.replace(
            weights,
            preprocess=preprocess,
            posemb_grid=grid,
            posemb_resize="bicubic_no_antialias" if is_huggingface else "bicubic",
        ),
        notes,
    )


def _read_budget(stated: Any) -> int | None:
    """Returns the number of patches in preprocessor_config.json; None if it is not stated."""
    if stated is not None and (type(stated) is not int or not 0 < stated < 2**16):
        raise ValueError(
            f"max_num_patches={shorten(stated)} in preprocessor_config.json: expected a number of "
            "patches"
        )
    return stated


def _read_open_clip_images(
    images: Mapping[str, Any], size: tuple[int, int]
) -> tuple[dict[str, Any], list[str]]:
    """Returns `Weights.preprocess` from `preprocess_cfg` in open_clip_config.json, and notes."""
    found: dict[str, Any] = {}
    if images.get("mean") is not None and images.get("std") is not None:
        found |= {key: read_colors(images[key]) for key in ("mean", "std")}
    if not images:
        return found, []
    mode = images.get("resize_mode") or "shortest"
    stated = images.get("size")
    size = size if stated is None else read_pair(stated, "preprocess_cfg.size")
    if mode not in ("shortest", "squash") or (mode == "shortest" and size[0] != size[1]):
        return found, [f"images: resize_mode={shorten(mode)}, which no operation here does"]
    line, notes = describe_evaluation(
        resize=size[:1] if mode == "shortest" else size,
        crop=size,
        interpolation=images.get("interpolation") or "bicubic",
        rounding="nearest",
    )
    return found | {"image_size": size} | line, notes
