# SPDX-License-Identifier: Apache-2.0
"""Reads the `.safetensors` files of timm and Hugging Face, and writes files that timm loads.

The tensor names alone say what a file is. What they leave open stands in the `config.json` and
`preprocessor_config.json` that are published beside it, or in the metadata of a file written here.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from vit_jax.checkpoint.pretrained import huggingface, timm
from vit_jax.checkpoint.pretrained.tensor_file import read_tensors, write_tensors
from vit_jax.checkpoint.pretrained.weights import POSEMB, Weights, as_tuples, infer_model
from vit_jax.models.positions import FIXED_POSITIONS
from vit_jax.models.resnet import total_stride
from vit_jax.utils.errors import UserError, first_line

_METADATA = "vit_jax"
# Arguments of the model that change what it computes; the rest is of no use to who loads a file.
_MODEL_KEYS = (
    "name",
    "patch_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "mlp_dim",
    "classifier",
    "representation_size",
    "resnet_layers",
    "resnet_width",
    "position_embedding",
    "rope_theta",
    "num_registers",
    "distillation_token",
    "activation",
    "qk_norm",
    "layer_scale_init",
    "norm_epsilon",
    "norm_after_pooling",
)
_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_tanh": "gelu_tanh"}
# Where timm has another number of heads than others of that width.
_NUM_HEADS = {
    f"vit_giantopt_patch16_siglip_{pool}{size}": 16 for pool in ("", "gap_") for size in (256, 384)
}
# In timm these SigLIP models, and no others, approximate GELU by tanh.
_TANH_GELU = re.compile(
    r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip"
    r"|vit_large_patch16_siglip_(gap_)?512"
)


def read_safetensors(path: str | os.PathLike[str], *, num_heads: int | None = None) -> Weights:
    """Reads a Vision Transformer of timm, Hugging Face or this package.

    Args:
      path: of the file, local or `gs://`.
      num_heads: attention heads; None to take what the files beside it state, or else what is
        usual for the width.

    Returns:
      Parameters with the values and types of the file. Tensors that have no place in a model here
      keep their names.

    Raises:
      UserError: the file is missing, damaged, something else, or of a model that is unknown here.
    """
    file = epath.Path(path)
    try:
        tensors, metadata = read_tensors(file)
        if _METADATA in metadata:
            weights = _read_own(tensors, json.loads(metadata[_METADATA]), num_heads)
        elif huggingface.is_huggingface(tensors):
            weights = _read_huggingface(file, tensors, num_heads)
        elif "patch_embed.proj.weight" in tensors:
            weights = _read_timm(file, tensors, num_heads)
        else:
            names = ", ".join(sorted(tensors)[:3])
            raise ValueError(f"no Vision Transformer: {len(tensors)} tensors such as {names}")
    except FileNotFoundError as error:
        raise UserError(f"{os.fspath(path)}: no such file; expected a .safetensors file") from error
    except Exception as error:  # Files are untrusted: shapes and settings can be anything.
        raise UserError(
            f"{os.fspath(path)}: {first_line(error)}; expected the whole .safetensors file of a "
            "Vision Transformer of timm or Hugging Face"
        ) from error
    if "mean" not in weights.preprocess:
        note = "mean and std of the images: stated nowhere"
        weights = dataclasses.replace(weights, notes=(*weights.notes, note))
    return weights


def write_safetensors(path: str | os.PathLike[str], weights: Weights) -> None:
    """Writes a file that timm loads with `load_state_dict(strict=True)`, whole or not at all.

    The class is `VisionTransformer`, with rotary embeddings `Eva`. What its arguments must be, and
    what else timm needs to know, stands in the metadata as JSON under `vit_jax`: the arguments of
    the model here and the preprocessing. Reading the file gives the same parameters, but for those
    that `timm.to_timm` merges.

    Args:
      path: of the file, in a folder that exists.
      weights: of a model of `make_vit`.

    Raises:
      UserError: timm has no such model, or the file can't be written.
    """
    arrays, model, preprocess = weights.params, weights.model, weights.preprocess
    stated = _describe(arrays, rope_theta=None)
    stated |= {key: model[key] for key in _MODEL_KEYS if key in model}
    try:
        tensors = timm.to_timm(arrays, model=stated, grid=_find_grid(stated, preprocess))
        if stated.get("position_embedding") in FIXED_POSITIONS:
            stated["position_embedding"] = "learned"  # As such they are in the file.
        text = json.dumps({"model": stated, "preprocess": dict(preprocess)})
        write_tensors(Path(path), tensors, metadata={"format": "pt", _METADATA: text})
    except KeyError as error:
        raise UserError(f"{os.fspath(path)}: can't be written without {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{os.fspath(path)}: can't be written: {error}") from error


def _read_own(
    tensors: dict[str, np.ndarray], stated: dict[str, Any], num_heads: int | None
) -> Weights:
    """Reads what `write_safetensors` wrote: the metadata leave nothing to guess."""
    model = {k: v for k, v in as_tuples(stated["model"]).items() if k in _MODEL_KEYS}
    params, notes = timm.to_linen(
        tensors,
        num_heads=num_heads or model["num_heads"],
        num_slots=0 if "reg_token" in tensors else _count_class_tokens(tensors),
    )
    return Weights(
        params=params,
        layout="vit_jax safetensors",
        model=_describe(params, rope_theta=None) | model,
        preprocess=as_tuples(stated["preprocess"]),
        notes=tuple(notes),
    )


def _read_timm(file: epath.Path, tensors: dict[str, np.ndarray], num_heads: int | None) -> Weights:
    config = _read_json(file.parent / "config.json")
    if not isinstance(config.get("architecture"), str):
        config = {}  # Another program's.
    architecture, options = config.get("architecture", ""), config.get("model_args", {})
    if any(name.startswith("norm_pre.") for name in tensors):
        raise ValueError("it has a norm in front of the blocks (norm_pre), which no model here has")
    if "_rpn_" in architecture:
        raise ValueError(f"{architecture} has norms behind its layers, which no model here has")
    theta, swap_axes, notes = timm.find_rope(tensors, architecture)
    num_heads = num_heads or options.get("num_heads") or _NUM_HEADS.get(architecture.split(".")[0])
    if num_heads is None:
        num_heads, more = timm.infer_num_heads(tensors)
        notes += more
    classifier = _find_classifier(tensors, config)
    average = classifier == "gap" and "cls_token" in tensors
    if average:
        notes.append("cls: kept as a register, since the mean over patches is classified")
    params, more = timm.to_linen(tensors, num_heads=num_heads, average=average, swap_axes=swap_axes)
    notes += more
    settings, more = _read_timm_settings(architecture, options)
    notes += more
    model = settings | _describe(params, rope_theta=theta) | {"classifier": classifier}
    if theta is None and classifier == "map" and ("cls" in params or "num_registers" in model):
        raise ValueError("attention pooling that leaves out registers, which no model here has")
    preprocess, more = _read_timm_images(config.get("pretrained_cfg", config))
    notes += more
    kind = "timm hybrid" if "resnet_layers" in model else "timm"
    return Weights(
        params=params,
        layout=f"{kind} safetensors",
        model=model,
        preprocess=_infer_image_size(params, model) | preprocess,
        notes=tuple(notes),
    )


def _read_huggingface(
    file: epath.Path, tensors: dict[str, np.ndarray], num_heads: int | None
) -> Weights:
    config = _read_json(file.parent / "config.json")
    processor = _read_json(file.parent / "preprocessor_config.json")
    if not isinstance(config.get("model_type"), str):
        config = {}  # Another program's.
    renamed, kind, notes = huggingface.to_timm_names(tensors)
    num_heads = num_heads or config.get("num_attention_heads")
    if num_heads is None:
        num_heads, more = timm.infer_num_heads(renamed)
        notes += more
    params, more = timm.to_linen(
        renamed, num_heads=num_heads, num_slots=1 + int("dist_token" in renamed)
    )
    settings, settings_notes = huggingface.read_settings(config, kind=kind)
    model = settings | _describe(params, rope_theta=None)
    preprocess, image_notes = huggingface.read_preprocess(processor, config)
    return Weights(
        params=params,
        layout=f"Hugging Face {kind} safetensors",
        model=model,
        preprocess=_infer_image_size(params, model) | preprocess,
        notes=(*notes, *more, *settings_notes, *image_notes),
    )


def _count_class_tokens(tensors: Mapping[str, Any]) -> int:
    return int("cls_token" in tensors) + int("dist_token" in tensors)


def _describe(params: Mapping[str, np.ndarray], *, rope_theta: float | None) -> dict[str, Any]:
    """Returns the arguments of the model that do not depend on who trained it."""
    positions = "learned" if POSEMB in params else "none"
    return infer_model(params) | {"position_embedding": positions, "rope_theta": rope_theta}


def _read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the object in a file beside the weights; nothing if there is no such file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path.name} beside it is no JSON") from error
    return content if isinstance(content, dict) else {}


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
    model = {"activation": _ACTIVATIONS[act], "norm_epsilon": timm.NORM_EPSILON}
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
    crop, mode = config.get("crop_pct"), config.get("crop_mode", "center")
    if height != width or crop is None or mode not in ("center", "squash"):
        return found, []
    size = math.floor(height / crop)
    resize = f"resize_small({size})" if mode == "center" else f"resize({size})"
    found["eval"] = f"decode|{resize}|central_crop({height})"
    return found, huggingface.describe_interpolation(config.get("interpolation", "bilinear"))


def _infer_image_size(params: Mapping[str, np.ndarray], model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the size that fits the position embeddings, if they are of a square."""
    posemb = params.get(POSEMB)
    if posemb is None:
        return {}
    patches = posemb.shape[1] - int("cls" in params) - int("dist" in params)
    side = math.isqrt(patches)
    rows, columns = _stride(model)
    return {"image_size": (side * rows, side * columns)} if side * side == patches else {}


def _stride(model: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels that a patch stands for."""
    patch = model["patch_size"]
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    layers = model.get("resnet_layers")
    shrink = 1 if layers is None else total_stride(tuple(layers))
    return rows * shrink, columns * shrink


def _find_grid(model: Mapping[str, Any], preprocess: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns (rows, columns) of patches in an image, if its size is known."""
    image_size = preprocess.get("image_size")
    if image_size is None:
        return None
    height, width = image_size
    rows, columns = _stride(model)
    return height // rows, width // columns
