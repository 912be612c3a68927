# SPDX-License-Identifier: Apache-2.0
"""Reads the `.safetensors` files of timm and Hugging Face, and writes files that timm loads.

The tensor names show the layout of a file. What they do not show is in the `config.json` and
`preprocessor_config.json` that are published with it, or in the metadata of a file written here.

The numpy interface of the `safetensors` package reads no bfloat16 and opens no remote files, so its
parser, which checks every number of the untrusted header, is called directly.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save

from vit_jax.checkpoint.pretrained.description import check_description
from vit_jax.checkpoint.pretrained.hub import INDEX, read_index, refuse_shard
from vit_jax.checkpoint.pretrained.huggingface import is_huggingface, read_huggingface
from vit_jax.checkpoint.pretrained.image_text import read_image_text, read_towers
from vit_jax.checkpoint.pretrained.image_text_config import to_huggingface_tensors
from vit_jax.checkpoint.pretrained.image_text_tensors import is_image_text
from vit_jax.checkpoint.pretrained.naflex import read_naflex
from vit_jax.checkpoint.pretrained.names import (
    TIMM_MIXER_PATCHES,
    TIMM_NAFLEX_PATCHES,
    TIMM_PATCHES,
    describe_family,
    unwrap,
)
from vit_jax.checkpoint.pretrained.peft import Adapters
from vit_jax.checkpoint.pretrained.timm import read_timm
from vit_jax.checkpoint.pretrained.timm_mixer import (
    mixer_to_linen,
    mixer_to_timm,
    read_timm_mixer,
)
from vit_jax.checkpoint.pretrained.timm_tensors import (
    columns_first,
    has_unused_token,
    to_linen,
    to_timm,
)
from vit_jax.checkpoint.pretrained.towers import TEXT, has_towers, take_tower
from vit_jax.checkpoint.pretrained.weights import (
    Weights,
    check_blocks,
    check_loss,
    check_tokenizer,
    describe_model,
    describe_weights,
    find_grid,
    infer_model,
    read_posemb,
)
from vit_jax.models.positions import FIXED_POSITIONS
from vit_jax.models.two_towers import TOWERS
from vit_jax.utils import bounds
from vit_jax.utils.class_names import check_names
from vit_jax.utils.errors import UserError, first_line
from vit_jax.utils.files import atomic_file
from vit_jax.utils.nested import as_tuples
from vit_jax.utils.registry import is_part

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

_METADATA = "vit_jax"
# Towers by their names in files.
_PARTS = {"visual": "img", "vision_model": "img", "text": "txt", "text_model": "txt"}
# Arguments of the model that change what it computes.
MODEL_KEYS = (
    "name",
    "patch_size",
    "kernel_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "mlp_dim",
    "classifier",
    "map_num_heads",
    "map_mlp_dim",
    "representation_size",
    "resnet_layers",
    "resnet_width",
    "resnet_epsilon",
    "resnet_norm_epsilon",
    "position_embedding",
    "posemb_grid",
    "posemb_resize",
    "posemb_keep_aspect",
    "rope_theta",
    "rope_frequencies",
    "rope_reference_grid",
    "rope_offset",
    "rope_coordinates",
    "rope_register_theta",
    "num_registers",
    "distillation_token",
    "activation",
    "qk_norm",
    "qkv_bias",
    "attention_norm",
    "mlp_norm",
    "norm",
    "layer_scale_init",
    "norm_epsilon",
    "norm_after_pooling",
    "untied_norm",
    "pre_norm",
    "embedding_bias",
    "drop_pixels",
    "head_bias",
    "vocab_size",
    "context_length",
    "pooling",
    "eot_id",
    "causal",
)


def read_safetensors(
    path: str | os.PathLike[str],
    *,
    num_heads: int | None = None,
    part: str = "",
    adapters: Adapters | None = None,
) -> Weights:
    """Reads a Vision Transformer of timm, Hugging Face or this package, CLIP or SigLIP.

    Args:
      path: of a file or of the index of its shards, local or `gs://`.
      num_heads: attention heads; None for the number that the files beside it state, or else the
        usual one for the width.
      part: takes only the tensors whose names start with this, of a file of several models; of
        two towers `img` or `txt`, or their names in the file.
      adapters: are added to the tensors.

    Returns:
      Weights with the values and dtypes of the file. Tensors that have no place in a model of this
      package keep their names.

    Raises:
      UserError: the file is missing, damaged, or not of a known model.
    """
    file = epath.Path(path)
    with _refusing(path):
        refuse_shard(file)
        read = _read_shards if file.name.endswith(INDEX) else read_tensors
        tensors, metadata = read(file)
        config = read_json(file.parent / "config.json")
    if adapters is not None:
        tensors, config = adapters.add_to(tensors), adapters.describe_base(config)
    with _refusing(path):
        of_texts = is_image_text(tensors)
        own, notes = _METADATA in metadata and not part and not of_texts, []
        if not own and not of_texts:
            tensors, notes = unwrap(tensors, part=part)
        check_blocks(tensors)
        if of_texts:
            stated = bounds.parse_json(metadata[_METADATA]) if _METADATA in metadata else None
            weights = _read_image_text(file, tensors, config, stated, num_heads, part)
        elif own:
            weights = _read_own(tensors, bounds.parse_json(metadata[_METADATA]), num_heads)
        elif is_huggingface(tensors):
            processor = read_json(file.parent / "preprocessor_config.json")
            weights = read_huggingface(tensors, config, processor, num_heads)
        elif TIMM_NAFLEX_PATCHES in tensors:
            weights = read_naflex(tensors, config, num_heads)
        elif TIMM_MIXER_PATCHES in tensors:
            weights = read_timm_mixer(tensors, config)
        elif TIMM_PATCHES in tensors:
            weights = read_timm(tensors, config, num_heads)
        else:
            raise ValueError(_describe_unknown(tensors, config))
        check_description(weights)
    if "mean" not in weights.preprocess and weights.model.get("name") != TEXT:
        notes.append("mean and std of the images: not stated")
    return dataclasses.replace(weights, notes=(*notes, *weights.notes))


@contextlib.contextmanager
def _refusing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever fails into one line: files are untrusted, shapes and settings anything."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{os.fspath(path)}: no such file; expected a .safetensors file") from error
    except Exception as error:
        raise UserError(
            f"{os.fspath(path)}: {first_line(error)}; expected the whole .safetensors file of a "
            "Vision Transformer of timm or Hugging Face, or of CLIP or SigLIP"
        ) from error


def _read_image_text(
    file: epath.Path,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any],
    stated: dict[str, Any] | None,
    num_heads: int | None,
    part: str,
) -> Weights:
    if stated is not None:
        weights = _read_own_towers(tensors, stated)
    else:
        files = ("preprocessor_config", "open_clip_config")
        processor, open_clip = (read_json(file.parent / f"{name}.json") for name in files)
        weights = read_image_text(
            tensors, config=config, processor=processor, open_clip=open_clip, num_heads=num_heads
        )
    if not part:
        return weights
    try:
        return take_tower(weights, _PARTS.get(part, part))
    except UserError as error:
        raise ValueError(str(error)) from None


def _read_own_towers(tensors: dict[str, np.ndarray], stated: dict[str, Any]) -> Weights:
    """Reads a file of `write_safetensors`, whose metadata describe both towers."""
    model = as_tuples(dict(stated["model"]))
    heads = {part: model[section]["num_heads"] for part, section in TOWERS.items()}
    params = read_towers(tensors, heads)
    return Weights(
        params=params,
        layout="vit_jax safetensors",
        model=model,
        preprocess=as_tuples(dict(stated["preprocess"])),
        **read_posemb(stated.get("posemb", {})),
        class_names=check_names(stated.get("class_names"), "its metadata"),
        loss=check_loss(stated.get("loss"), "its metadata"),
        tokenizer=check_tokenizer(stated.get("tokenizer"), "its metadata"),
    )


def write_safetensors(path: str | os.PathLike[str], weights: Weights) -> None:
    """Writes a file that timm or, for two towers, Hugging Face loads without a missing tensor.

    The latter reads two towers as `CLIPModel` or `SiglipModel`, by `make_huggingface_config`. The
    class in timm is `VisionTransformer`, or `Eva` with rotary embeddings. The arguments of the
    model, the preprocessing and the class names are JSON in the metadata, under `vit_jax`. Reading
    the file gives the same parameters, except those that `to_timm` merges.

    Args:
      path: of the file, in a folder that exists.
      weights: of a model of `make_vit`, any float dtype, which the file keeps.

    Raises:
      UserError: timm has no such model, or the file can't be written.
    """
    arrays, model, preprocess = weights.params, weights.model, weights.preprocess
    if has_towers(arrays):
        _write_towers(path, weights)
        return
    if is_part(model.get("name")):
        raise UserError(f"{path}: timm has no {model['name']}; expected a file that ends in .npz")
    is_mixer = infer_model(arrays).get("name") == "mixer"
    stated = infer_model(arrays) if is_mixer else describe_model(arrays, rope_theta=None)
    stated |= {key: model[key] for key in MODEL_KEYS if key in model}
    try:
        if is_mixer:
            tensors = mixer_to_timm(arrays)
        else:
            tensors = to_timm(arrays, model=stated, grid=find_grid(stated, preprocess))
        if stated.get("position_embedding") in FIXED_POSITIONS:
            stated["position_embedding"] = "learned"  # The file stores them as learned ones.
        text = json.dumps(describe_weights(weights) | {"model": stated})
        write_tensors(Path(path), tensors, metadata={"format": "pt", _METADATA: text})
    except KeyError as error:
        raise UserError(f"{os.fspath(path)}: can't be written without {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{os.fspath(path)}: can't be written: {error}") from error


def _write_towers(path: str | os.PathLike[str], weights: Weights) -> None:
    try:
        tensors = to_huggingface_tensors(weights)
        text = json.dumps(describe_weights(weights))
        write_tensors(Path(path), tensors, metadata={"format": "pt", _METADATA: text})
    except (OSError, ValueError) as error:
        raise UserError(f"{os.fspath(path)}: can't be written: {error}") from error


def _describe_unknown(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> str:
    stated = [f"{k}={config[k]!r}" for k in ("model_type", "architecture") if k in config]
    found = [
        f"{stated[0]} in config.json" if stated else "",
        describe_family(tensors) or "",
        f"{len(tensors)} tensors such as {', '.join(sorted(tensors)[:3])}",
    ]
    return f"no Vision Transformer that is known here: {', '.join(filter(None, found))}"


def _read_own(
    tensors: dict[str, np.ndarray], stated: dict[str, Any], num_heads: int | None
) -> Weights:
    """Reads a file of `write_safetensors`, whose metadata describe the model."""
    model = {k: v for k, v in as_tuples(stated["model"]).items() if k in MODEL_KEYS}
    if model["name"] == "mixer":
        params, notes = mixer_to_linen(tensors), []
        return _describe_own(params, infer_model(params) | model, stated, notes)
    unused = "cls_token" in tensors and has_unused_token(model)
    params, notes = to_linen(
        tensors,
        num_heads=model["num_heads"] if num_heads is None else num_heads,
        pool_heads=model.get("map_num_heads"),
        average=unused,
        swap_axes=columns_first(model),
        halves=model.get("rope_coordinates") == "centered",
        fill_biases=model.get("qkv_bias", "all") == "all",
        num_slots=0
        if unused or "reg_token" in tensors
        else sum(name in tensors for name in ("cls_token", "dist_token")),
    )
    model = describe_model(params, rope_theta=None) | model
    return _describe_own(params, model, stated, [] if unused else notes)


def _describe_own(
    params: dict[str, np.ndarray], model: dict[str, Any], stated: dict[str, Any], notes: list[str]
) -> Weights:
    return Weights(
        params=params,
        layout="vit_jax safetensors",
        model=model,
        preprocess=as_tuples(dict(stated["preprocess"])),
        **read_posemb(stated.get("posemb", {})),
        class_names=check_names(stated.get("class_names"), "its metadata"),
        loss=check_loss(stated.get("loss"), "its metadata"),
        notes=tuple(notes),
    )


def read_tensors(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns `(tensors, metadata)` of a local or `gs://` file.

    The tensors are read-only arrays with the shapes and dtypes of the file, by name.

    Raises:
      OSError: the file can't be read.
      ValueError: the file is damaged, or not a safetensors file.
    """
    content = bounds.read_bytes(path, max_bytes=bounds.MAX_WEIGHTS)
    length = int.from_bytes(content[:8], "little")
    if 8 + length <= len(content) and length > bounds.MAX_JSON:
        raise ValueError(f"its header has {length:,} bytes; expected {bounds.MAX_JSON:,} at most")
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"not a whole safetensors file: {len(content)} bytes, which start with "
            f"{content[:16]!r} ({error})"
        ) from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            expected = ", ".join(_DTYPES)
            raise ValueError(f"{name} is of type {entry['dtype']}; expected one of {expected}")
        array = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    return tensors, bounds.parse_json(content[8 : 8 + length]).get("__metadata__", {})


def _read_shards(index: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns what `read_tensors` does, of all shards that an index lists."""
    tensors: dict[str, np.ndarray] = {}
    for name, names in read_index(index).items():
        shard = index.parent / name
        if not shard.exists():
            raise ValueError(f"its shard {name} is not in the same folder")
        found, _ = read_tensors(shard)
        if missing := [tensor for tensor in names if tensor not in found]:
            raise ValueError(f"its shard {name} does not hold {missing[0]}")
        tensors |= {tensor: found[tensor] for tensor in names}
    return tensors, {}


def read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the JSON object in a file beside the weights; empty if there is no such file.

    Raises:
      ValueError: the file is not JSON, or can't be read.
    """
    try:
        content = bounds.read_json(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"{path.name} beside it: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path.name} beside it is not JSON") from error
    return content if isinstance(content, dict) else {}


def write_tensors(path: Path, tensors: dict[str, np.ndarray], *, metadata: dict[str, str]) -> None:
    """Writes a file, which is flushed to the disk before it gets its name.

    The tensors are arrays of any shape by name; the metadata are texts by key.

    Raises:
      OSError: the file can't be written.
      ValueError: an array is of a type that has no name in the format.
    """
    for name, array in tensors.items():
        if array.dtype.newbyteorder("<") not in _DTYPES.values():
            raise ValueError(f"{name} is of type {array.dtype}; expected one of {list(_DTYPES)}")
    content = save({k: np.ascontiguousarray(x) for k, x in tensors.items()}, metadata)
    with atomic_file(path, sync=True) as temporary:
        temporary.write_bytes(content)
