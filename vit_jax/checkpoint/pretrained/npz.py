# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the `.npz` files in which Vision Transformers are published.

The files are untrusted: pickled data in them is refused, so reading one runs none of its code.
"""

import collections
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from flax import traverse_util

from vit_jax.checkpoint.pretrained.description import check_description
from vit_jax.checkpoint.pretrained.naflex import describe_budget, move_big_vision
from vit_jax.checkpoint.pretrained.towers import has_towers, put_part, take_part, take_tower
from vit_jax.checkpoint.pretrained.weights import (
    POSEMB,
    Weights,
    check_blocks,
    check_loss,
    check_tokenizer,
    describe_weights,
    infer_model,
    read_posemb,
    unstack_blocks,
)
from vit_jax.models.two_towers import TOWERS
from vit_jax.utils.bounds import MAX_WEIGHTS, open_npz, open_outside, read_json
from vit_jax.utils.class_names import check_names
from vit_jax.utils.errors import UserError, first_line
from vit_jax.utils.files import atomic_file, write_atomically
from vit_jax.utils.nested import as_tuples
from vit_jax.utils.registry import is_part

# What training code of several ages put around the parameters, outermost first.
_WRAPPERS = ("opt/target/", "params/")

# Flax numbers the submodules that have no name of their own; their names start with a class name.
_NUMBERED = re.compile(r"([A-Z]\w*)_(\d+)")

_GROUP_NORM = re.compile(r"(.*/)?gn(\d+|_root|_proj)/(scale|bias)")
_BLOCK = re.compile(r"(Transformer/encoderblock_\d+/)(.*)")
_PRE_LINEN = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}
_FLEXI = re.compile("flexi", re.IGNORECASE)
# Modules that older files with attention pooling have at the root.
_POOLING = re.compile(r"(probe$|(MultiHeadDotProductAttention|LayerNorm|MlpBlock)_0/)")


def read_npz(path: str | os.PathLike[str], *, subtree: str = "") -> Weights:
    """Reads a published `.npz` of a Vision Transformer, a hybrid, an MLP-Mixer or two towers.

    Two layouts are read: that of google-research/vision_transformer, with names from before Flax
    Linen and any wrapper, and that of big_vision, with position embeddings at the root, blocks
    stacked for scan, and bfloat16; SigLIP, SigLIP 2 (of any resolution, too) and LiT have this one
    for both towers. So are
    files of `write_npz` of a model from outside of this
    package, whose parameters keep their names.

    Args:
      path: local, or `gs://` (which needs the package `gcsfs`).
      subtree: path of the model within a file that holds several, such as "img".

    Returns:
      Weights in float32.

    Raises:
      UserError: the file is missing, damaged, or not a published checkpoint.
    """
    path = epath.Path(path)
    described = _read_description(path)
    if subtree in TOWERS and described.get("model", {}).get("name") == "two_towers":
        return take_tower(read_npz(path), subtree)  # What is described are both.
    params = read_arrays(path, subtree=subtree)
    try:
        check_blocks(params)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    try:
        posemb = read_posemb(described.get("posemb", {}))
    except ValueError as error:
        raise UserError(f"{path.with_suffix('.json')}: {error}") from error
    if is_part(described.get("model", {}).get("name")):
        weights = Weights(
            params=params,
            layout="npz",
            model=described["model"],
            preprocess=described.get("preprocess", {}),
            class_names=described.get("class_names"),
            loss=described.get("loss"),
        )
        return _check_described(weights, path)
    try:
        params, any_size = move_big_vision(params)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    is_big_vision = any(path.endswith("pos_embedding") for path in params) and not any(
        POSEMB in path for path in params
    )
    params = _move_towers(params)
    model = infer_model(params)
    if not model:
        raise UserError(
            f"{path}: expected a Vision Transformer or an MLP-Mixer, but it holds "
            f"{_list_names(params)}{_advise_subtree(params, path)}"
        )
    if model["name"] == "vit" and POSEMB not in params:
        model["position_embedding"] = "sincos2d"
    image, images = model.get("image", model), {}
    if any_size:
        image.update(any_size)
        images = describe_budget(image["patch_size"][0], any_size["posemb_grid"])
    functions = {"activation": "gelu_tanh", "norm_epsilon": 1e-6}
    for section in (model[s] for s in TOWERS.values() if s in model):
        section |= functions
    notes = []
    if "posemb" not in described and _FLEXI.search(path.name):
        posemb["posemb_resize"] = "bilinear_antialias"
        notes.append("FlexiViT, by the name of the file: posemb_resize is bilinear_antialias")
    if "text" in model and "model" not in described and "pooling" not in model["text"]:
        notes.append("txt: pooled at the last token, as in SigLIP; the file does not state it")
    weights = Weights(
        params=params,
        layout="big_vision npz" if is_big_vision else "published npz",
        model=({} if "image" in model else functions) | model | described.get("model", {}),
        notes=tuple(notes),
        preprocess=described.get("preprocess", {"mean": 0.5, "std": 0.5} | images),
        **posemb,
        class_names=described.get("class_names"),
        loss=described.get("loss"),
        tokenizer=described.get("tokenizer"),
    )
    return _check_described(weights, path)


def write_npz(path: str | os.PathLike[str], weights: Weights) -> None:
    """Writes a file with the layout and names of those published with vision_transformer.

    The arguments of the model, the preprocessing and the class names, for which the layout has no
    place, are written to a `.json` beside it, which `read_npz` reads.

    Args:
      path: of the `.npz` file, in a folder that exists.
      weights: any float dtype, which the file keeps.

    Raises:
      OSError: a file can't be written.
    """
    file, description = Path(path), Path(path).with_suffix(".json")
    arrays = dict(weights.params)
    if not is_part(weights.model.get("name")):
        arrays = {_published_name(name): value for name, value in arrays.items()}
        for name, value in arrays.items():
            if _GROUP_NORM.fullmatch(name):
                arrays[name] = value.reshape(1, 1, 1, -1)
    text = json.dumps({"vit_jax": describe_weights(weights)})
    with atomic_file(file) as temporary:
        with temporary.open("wb") as f:
            np.savez(f, **arrays)  # pyright: ignore[reportArgumentType]
        write_atomically(description, text + "\n")


def read_arrays(path: epath.Path, *, subtree: str = "") -> dict[str, np.ndarray]:
    """Returns the float32 parameters of a file by its own names, without the wrappers."""
    try:
        return _read_arrays(path, subtree)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; expected the .npz file of a published model"
        ) from error
    except UserError:
        raise
    except Exception as error:  # Storage, zip, zlib and numpy each have their own for a bad file.
        raise UserError(
            f"{path}: {first_line(error)}; expected the whole .npz file of a published model"
        ) from error


def rename_to_linen(tree: dict[str, Any]) -> dict[str, Any]:
    """Renames the submodules of a pre-Linen parameter tree; leaves a Linen tree as it is.

    Before Linen one counter ran over all submodules (`LayerNorm_0`, `MlpBlock_1`, `LayerNorm_2`);
    Linen counts each class by itself (`LayerNorm_0`, `MlpBlock_0`, `LayerNorm_1`). The order within
    a class is the same, so counting each class gives the new names. Given names (`encoderblock_3`)
    stay.

    Source: `flax.training.checkpoints.convert_pre_linen`.
    """
    renamed = {}
    counts: collections.Counter[str] = collections.Counter()
    for name, value in sorted(tree.items(), key=lambda item: _natural_key(item[0])):
        if match := _NUMBERED.fullmatch(name):
            module = match[1]
            name = f"{module}_{counts[module]}"
            counts[module] += 1
        renamed[name] = rename_to_linen(value) if isinstance(value, dict) else value
    return renamed


def _move_towers(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Moves the parameters of each tower, or of the only model, to our names."""
    if "Embed_0/embedding" in params:
        return _move_text(params)
    if not has_towers(params):
        return _move_to_our_names(params)
    towers = {"img": _move_to_our_names, "txt": _move_text}
    moved = {path: x for path, x in params.items() if path.partition("/")[0] not in towers}
    for part, move in towers.items():
        moved |= put_part(move(take_part(params, part)), part)
    return moved


def _move_text(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Moves the parameters of big_vision's text transformer to our names."""
    moved = {re.sub("^Encoder_0/", "Transformer/", path): x for path, x in params.items()}
    moved = unstack_blocks(moved)
    # Some old files have a second array, which is added too.
    parts = [moved.pop(n) for n in ("pos_embedding", "Transformer/pos_embedding") if n in moved]
    if parts:
        moved[POSEMB] = functools.reduce(np.add, parts)
    return moved


def _move_to_our_names(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    levels = {name[:i] for name in params for i, c in enumerate(name) if c == "/"}
    if levels & params.keys():  # Not a model, which `infer_model` finds.
        return dict(params)
    tree = traverse_util.unflatten_dict(dict(params), sep="/")
    params = unstack_blocks(traverse_util.flatten_dict(rename_to_linen(tree), sep="/"))
    for path, value in params.items():
        if _GROUP_NORM.fullmatch(path):
            params[path] = value.reshape(value.shape[-1])
    if "probe" in params:
        params = {f"MAPHead_0/{p}" if _POOLING.match(p) else p: x for p, x in params.items()}
    for root in ("pos_embedding", "Transformer/pos_embedding"):
        if root in params:
            posemb = params.pop(root)
            if "cls" in params:
                # In this layout the class token has no position embedding, or includes it.
                posemb = np.concatenate([np.zeros_like(posemb[:, :1]), posemb], axis=1)
            params[POSEMB] = posemb
    return params


def _published_name(path: str) -> str:
    if not (match := _BLOCK.fullmatch(path)):
        return path
    module, slash, rest = match[2].partition("/")
    return f"{match[1]}{_PRE_LINEN.get(module, module)}{slash}{rest}"


def _read_description(path: epath.Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    if not beside.exists():
        return {}
    try:
        described = dict(read_json(beside).get("vit_jax", {}))
        names = check_names(described.pop("class_names", None), str(beside))
        loss = check_loss(described.pop("loss", None), str(beside))
        tokenizer = check_tokenizer(described.pop("tokenizer", None), str(beside))
        sections = {section: as_tuples(dict(x)) for section, x in described.items()}
        return sections | {"class_names": names, "loss": loss, "tokenizer": tokenizer}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{beside}: {error}; expected what was written with {path.name}") from error


def _check_described(weights: Weights, path: epath.Path) -> Weights:
    try:
        return check_description(weights)
    except ValueError as error:
        raise UserError(
            f"{path.with_suffix('.json')}: {error}; expected what was written with {path.name}"
        ) from None


def _read_arrays(path: epath.Path, subtree: str) -> dict[str, np.ndarray]:
    # Files of a store are neither FIFOs nor sparse.
    remote = "://" in os.fspath(path)
    opened: Any = path.open("rb") if remote else open_outside(path, max_bytes=MAX_WEIGHTS)
    with opened as file, open_npz(file) as archive:
        names = _unwrap(archive.files)
        if subtree:
            names = _select(names, subtree.strip("/") + "/", path)
        return {name: _read_array(archive, key) for name, key in names.items()}


def _read_array(archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    array = np.asarray(archive[key])
    if array.dtype == np.dtype("V2"):  # numpy has no bfloat16 of its own, so its name is lost.
        array = array.view(ml_dtypes.bfloat16)
    elif not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{key} is of type {array.dtype}, not a float")
    with np.errstate(over="ignore"):  # Infinite values are refused by name.
        return array.astype(np.float32, copy=False)


def _unwrap(keys: list[str]) -> dict[str, str]:
    """Maps the name of each parameter to its key; keys outside a wrapper are not parameters."""
    names = {key: key for key in keys}
    for wrapper in _WRAPPERS:
        inside = {n.removeprefix(wrapper): key for n, key in names.items() if n.startswith(wrapper)}
        names = inside or names
    return names


def _select(names: Mapping[str, str], prefix: str, path: epath.Path) -> dict[str, str]:
    inside = {n.removeprefix(prefix): key for n, key in names.items() if n.startswith(prefix)}
    if not inside:
        raise UserError(
            f"{path}:{prefix.rstrip('/')}: there is nothing of that name in the file; expected one "
            f"of {_list_names(names)}"
        )
    return inside


def _list_names(names: Iterable[str]) -> str:
    first = sorted({name.partition("/")[0] for name in names})
    return ", ".join(first[:8]) + (", ..." if len(first) > 8 else "") if first else "nothing"


def _advise_subtree(names: Iterable[str], path: epath.Path) -> str:
    inside = sorted(n.removesuffix("/embedding/kernel") for n in names if "/embedding/kernel" in n)
    return f"; name the part to take: {path}:{inside[0]}" if inside else ""


def _natural_key(name: str) -> list[str | int]:
    """Sorts `Dense_10` after `Dense_9`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
