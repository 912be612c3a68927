# SPDX-License-Identifier: Apache-2.0
"""Reads models for images of any size (NaFlex): of timm, big_vision and Hugging Face.

Their patches go through a matrix, with channels last, and their position embeddings are a table.
Here both have the layout of any Vision Transformer, a convolution and a row of embeddings, so such
weights fit a model of a fixed size too, and the other way round.

Sources: timm 1.0.31, `models/naflexvit.py`; big_vision 0127fb6, `proj/image_text/naflex_vit.py`;
transformers 5.23, `models/siglip2`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint.pretrained.config_json import check_values, read_colors
from vit_jax.checkpoint.pretrained.timm_tensors import to_linen
from vit_jax.checkpoint.pretrained.weights import (
    POSEMB,
    Weights,
    describe_model,
)
from vit_jax.models.resampling import Method

# How position embeddings are resized in training: by all, and by default in timm.
TRAINED: Method = "bilinear_antialias"

_EMBEDS = "embeds."
# Rows and columns of patches of the published models.
_USUAL_GRID = (16, 16)
_TOKENS = ("cls_token", "reg_token")
_MODES: dict[str, Method] = {"bilinear": "bilinear_antialias", "bicubic": "bicubic"}
_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
# Arguments of the class that would make it another function than that of any model here.
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "pos_embed": ("", "none", "learned", "factorized"),
    "pos_embed_interp_mode": tuple(_MODES),
    "pos_embed_antialias": (True,),
    "pos_embed_align_corners": (False,),
    "pos_embed_use_grid_sample": (False,),
    "rope_type": ("", "none"),
    "pre_norm": (False,),
    "scale_mlp_norm": (False,),
    "scale_attn_inner_norm": (False,),
    "pool_include_prefix": (False,),
    "embed_proj_type": ("linear",),
    "attn_type": ("standard",),
    "attn_gated": (False,),
    "attn_layer": ("", "attn"),
    "attn_only_layer_scale": (False,),
    "swiglu_mlp": (False,),
    "global_pool": ("", "avg", "token", "map"),
    "act_layer": tuple(_ACTIVATIONS),
}


def to_patch_kernel(matrix: np.ndarray, *, channels: int = 3, first: bool = False) -> np.ndarray:
    """Returns the kernel of patches `[height, width, channels, features]` of a matrix.

    Args:
      matrix: `[height * width * channels, features]`, of square patches.
      channels: of the images.
      first: whether a channel has all its pixels in a row, in place of a pixel all its channels.

    Raises:
      ValueError: the patches are not square.
    """
    size, features = matrix.shape
    side = math.isqrt(size // channels)
    if side * side * channels != size or not side:
        raise ValueError(
            f"its patches have {size} values: expected those of a square of {channels} channels"
        )
    if first:
        return matrix.reshape(channels, side, side, features).transpose(1, 2, 0, 3)
    return matrix.reshape(side, side, channels, features)


def square_grid(length: int) -> tuple[int, int]:
    """Returns the rows and columns of a square table of position embeddings.

    Raises:
      ValueError: there is no square of so many.
    """
    side = math.isqrt(length)
    if side * side != length or not side:
        raise ValueError(f"its {length} position embeddings are no square table")
    return side, side


def describe_budget(
    size: int, grid: tuple[int, int] | None, method: str = "bilinear", *, budget: int | None = None
) -> dict[str, str]:
    """Returns how images are prepared for evaluation, for `Weights.preprocess`.

    Args:
      size: of a patch in pixels.
      grid: (rows, columns) of the position embeddings, whose number is the usual budget.
      method: of resizing, with antialiasing.
      budget: the number of patches, if it is stated.
    """
    budget = math.prod(grid or _USUAL_GRID) if budget is None else budget
    return {"eval": f"decode|patches({size}, {budget}, '{method}_antialias')"}


def move_big_vision(params: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gives the parameters of big_vision's NaFlex model the layout of its other models.

    Args:
      params: float32 arrays by path, of one tower or of two.

    Returns:
      `(params, model)`: arrays by path, and the arguments of the image tower that they imply; none
      if its images are of a fixed size.

    Raises:
      ValueError: the arrays are not those of such a model.
    """
    prefix = "img/" if "img/embedding/kernel" in params else ""
    path, table = f"{prefix}embedding/kernel", f"{prefix}pos_embedding"
    if path not in params or params[path].ndim != 2:
        return dict(params), {}
    shape = params[table].shape if table in params else ()
    if len(shape) != 3 or shape[0] == 1 != shape[1]:
        raise ValueError(
            f"{path} is a matrix, as for images of any resolution: expected a table of positions "
            f"too, {table} [rows, columns, width]"
        )
    moved = dict(params) | {path: to_patch_kernel(params[path])}
    *grid, width = params[table].shape
    moved[table] = params[table].reshape(1, -1, width)
    return moved, {"posemb_grid": tuple(grid), "posemb_resize": TRAINED}


def read_naflex(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], num_heads: int | None
) -> Weights:
    """Reads a model of timm's class `NaFlexVit`.

    Args:
      tensors: arrays of any float dtype by name.
      config: content of the `config.json` beside them; may be empty.
      num_heads: attention heads; None for what the file states, or is usual for the width.

    Returns:
      Weights with the dtypes of the file.

    Raises:
      ValueError: the model has a part that no model here has, or the files are damaged.
    """
    architecture = str(config.get("architecture") or "").partition(".")[0]
    if not {"norm.weight", "fc_norm.weight"} & tensors.keys():
        raise ValueError(
            f"NaFlexVit {architecture} without a norm behind the blocks (norm or fc_norm), which "
            "every model here has"
        )
    options = _read_options(config)
    rest = {name: x for name, x in tensors.items() if not name.startswith(_EMBEDS)}
    embeds = {n.removeprefix(_EMBEDS): x for n, x in tensors.items() if n.startswith(_EMBEDS)}
    positions, more, embeds = _read_positions(embeds)
    if not positions and options.get("pos_embed", "learned") not in ("", "none"):
        raise ValueError(f"{_EMBEDS}pos_embed is missing")
    matrix = embeds.pop("proj.weight").T
    channels = options.get("in_chans", 3)
    kernel = to_patch_kernel(
        matrix, channels=channels, first=options.get("patchify_channels_last") is False
    )
    rest["patch_embed.proj.weight"] = kernel.transpose(3, 2, 0, 1)
    if "proj.bias" in embeds:
        rest["patch_embed.proj.bias"] = embeds.pop("proj.bias")
    rest |= {name: embeds.pop(name) for name in _TOKENS if name in embeds}
    if embeds or any(".attn.gate" in n or n.startswith("rope") for n in rest):
        raise ValueError(f"NaFlexVit with {sorted(embeds or rest)[0]}, which no model here has")
    if "learned" in positions:
        rest["pos_embed"] = positions["learned"]
    if num_heads is None:
        num_heads = options.get("num_heads")
    average = "cls_token" in rest and options.get("global_pool") == "avg"
    params, notes = to_linen(
        rest,
        num_heads=num_heads,
        num_slots=0,
        average=average,
        spell=lambda name: name.replace("patch_embed.", _EMBEDS),
    )
    if unknown := [name for name in sorted(params) if "." in name]:
        raise ValueError(f"NaFlexVit with {unknown[0]}, which no model here has")
    params |= {path: x for path, x in positions.items() if path != "learned"}
    model = describe_model(params, rope_theta=None) | more
    if model["classifier"] == "map" and ("cls" in params or "num_registers" in model):
        raise ValueError("attention pooling that leaves out registers, which no model here has")
    model["norm_epsilon"] = 1e-6
    default = "gelu_tanh" if "siglip" in architecture else "gelu"
    model["activation"] = _ACTIVATIONS[options.get("act_layer") or default]
    if more:
        mode = options.get("pos_embed_interp_mode", "bicubic")
        model["posemb_resize"] = _MODES[mode]
        preserving = re.search(r"_par(fac)?_", architecture) is not None
        model["posemb_keep_aspect"] = options.get("pos_embed_ar_preserving", preserving)
    if not architecture and not options:
        notes.append("no config.json: positions are taken as resized by timm's default, bicubic")
    preprocess = _read_images(config)
    preprocess |= describe_budget(model["patch_size"][0], more.get("posemb_grid"), "bicubic")
    return Weights(
        params=params,
        layout="timm NaFlex safetensors",
        model=model,
        preprocess=preprocess,
        posemb_grid=more.get("posemb_grid"),
        posemb_resize=model.get("posemb_resize", "bicubic"),
        notes=tuple(notes),
    )


def _read_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `NaFlexVitCfg` that config.json states."""
    options = config.get("model_args") or {}
    if not isinstance(options, Mapping):
        raise ValueError("model_args in config.json: expected an object")
    inner = options.get("cfg") or {}
    options = {**options, **inner} if isinstance(inner, Mapping) else dict(options)
    stated = {key: value for key, value in options.items() if value is not None}
    check_values(stated, _EXPECTED, where="model_args.")
    return stated


def _read_positions(
    embeds: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, np.ndarray]]:
    """Takes the position embeddings out of tensors.

    Returns:
      Arrays by path, or as `learned` `[1, length, width]`; the arguments of the model that they
      imply; and the other tensors.
    """
    rest = dict(embeds)
    if "pos_embed" in rest:
        table = rest.pop("pos_embed")
        if table.ndim != 4 or table.shape[0] != 1:
            raise ValueError(
                f"pos_embed is {list(table.shape)}; expected [1, rows, columns, width]"
            )
        grid = {"posemb_grid": table.shape[1:3], "position_embedding": "learned"}
        return {"learned": table.reshape(1, -1, table.shape[-1])}, grid, rest
    if "pos_embed_y" not in rest or "pos_embed_x" not in rest:
        return {}, {}, rest
    tables = {axis: rest.pop(f"pos_embed_{axis}") for axis in "yx"}
    for axis, table in tables.items():
        if table.ndim != 3 or table.shape[0] != 1:
            raise ValueError(
                f"pos_embed_{axis} is {list(table.shape)}; expected [1, length, width]"
            )
    grid = tables["y"].shape[1], tables["x"].shape[1]
    found = {f"{POSEMB}_{axis}": table[0] for axis, table in tables.items()}
    return found, {"posemb_grid": grid, "position_embedding": "factorized"}, rest


def _read_images(config: Mapping[str, Any]) -> dict[str, Any]:
    images = config.get("pretrained_cfg") or config
    if not isinstance(images, Mapping) or "mean" not in images or "std" not in images:
        return {}
    return {key: read_colors(images[key]) for key in ("mean", "std")}
