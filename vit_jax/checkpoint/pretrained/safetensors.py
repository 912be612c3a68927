# SPDX-License-Identifier: Apache-2.0
"""Reads the `.safetensors` files of timm and Hugging Face, and writes files that timm loads.

The tensor names show the layout of a file. What they do not show is in the `config.json` and
`preprocessor_config.json` that are published with it, or in the metadata of a file written here.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from vit_jax.checkpoint.pretrained.huggingface import is_huggingface, read_huggingface
from vit_jax.checkpoint.pretrained.tensor_file import read_tensors, write_tensors
from vit_jax.checkpoint.pretrained.timm import read_timm
from vit_jax.checkpoint.pretrained.timm_tensors import to_linen, to_timm
from vit_jax.checkpoint.pretrained.weights import Weights, as_tuples, describe_model, find_grid
from vit_jax.models.positions import FIXED_POSITIONS
from vit_jax.utils.errors import UserError, first_line
from vit_jax.utils.registry import is_part

_METADATA = "vit_jax"
# Arguments of the model that change what it computes.
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


def read_safetensors(path: str | os.PathLike[str], *, num_heads: int | None = None) -> Weights:
    """Reads a Vision Transformer of timm, Hugging Face or this package.

    Args:
      path: local or `gs://`.
      num_heads: attention heads; None for the number that the files beside it state, or else the
        usual one for the width.

    Returns:
      Weights with the values and dtypes of the file. Tensors that have no place in a model of this
      package keep their names.

    Raises:
      UserError: the file is missing, damaged, or not of a known model.
    """
    file = epath.Path(path)
    try:
        tensors, metadata = read_tensors(file)
        if _METADATA in metadata:
            weights = _read_own(tensors, json.loads(metadata[_METADATA]), num_heads)
        elif is_huggingface(tensors):
            weights = read_huggingface(file, tensors, num_heads)
        elif "patch_embed.proj.weight" in tensors:
            weights = read_timm(file, tensors, num_heads)
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
    """Writes a file that timm loads with `load_state_dict(strict=True)`.

    The class in timm is `VisionTransformer`, or `Eva` with rotary embeddings. The arguments of the
    model and the preprocessing are JSON in the metadata, under `vit_jax`. Reading the file gives
    the same parameters, except those that `to_timm` merges.

    Args:
      path: of the file, in a folder that exists.
      weights: of a model of `make_vit`, any float dtype, which the file keeps.

    Raises:
      UserError: timm has no such model, or the file can't be written.
    """
    arrays, model, preprocess = weights.params, weights.model, weights.preprocess
    if is_part(model.get("name")):
        raise UserError(f"{path}: timm has no {model['name']}; expected a file that ends in .npz")
    stated = describe_model(arrays, rope_theta=None)
    stated |= {key: model[key] for key in _MODEL_KEYS if key in model}
    try:
        tensors = to_timm(arrays, model=stated, grid=find_grid(stated, preprocess))
        if stated.get("position_embedding") in FIXED_POSITIONS:
            stated["position_embedding"] = "learned"  # The file stores them as learned ones.
        text = json.dumps({"model": stated, "preprocess": dict(preprocess)})
        write_tensors(Path(path), tensors, metadata={"format": "pt", _METADATA: text})
    except KeyError as error:
        raise UserError(f"{os.fspath(path)}: can't be written without {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{os.fspath(path)}: can't be written: {error}") from error


def _read_own(
    tensors: dict[str, np.ndarray], stated: dict[str, Any], num_heads: int | None
) -> Weights:
    """Reads a file of `write_safetensors`, whose metadata describe the model."""
    model = {k: v for k, v in as_tuples(stated["model"]).items() if k in _MODEL_KEYS}
    params, notes = to_linen(
        tensors,
        num_heads=num_heads or model["num_heads"],
        num_slots=0 if "reg_token" in tensors else _count_class_tokens(tensors),
    )
    return Weights(
        params=params,
        layout="vit_jax safetensors",
        model=describe_model(params, rope_theta=None) | model,
        preprocess=as_tuples(stated["preprocess"]),
        notes=tuple(notes),
    )


def _count_class_tokens(tensors: Mapping[str, Any]) -> int:
    return int("cls_token" in tensors) + int("dist_token" in tensors)
