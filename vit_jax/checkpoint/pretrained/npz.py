# SPDX-License-Identifier: Apache-2.0
"""Reads the `.npz` files in which Vision Transformers are published.

The files are untrusted: pickled data in them is refused, so reading one runs none of its code.
"""

import collections
import os
import re
import zipfile
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from vit_jax.utils.errors import UserError

# What training code of several ages put around the parameters, outermost first.
_WRAPPERS = ("opt/target/", "params/")

# Flax numbers the submodules that have no name of their own; their names start with a class name.
_NUMBERED = re.compile(r"([A-Z]\w*)_(\d+)")


def load_npz(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the parameters of a published ViT.

    Args:
      path: of the file, local or `gs://` (which needs the package `gcsfs`).

    Returns:
      A nested dict of float32 numpy arrays with the names of `VisionTransformer`'s parameters.

    Raises:
      UserError: the file is missing, damaged or something else than a published checkpoint.
    """
    try:
        tree = traverse_util.unflatten_dict(_read_arrays(epath.Path(path)), sep="/")
    except FileNotFoundError as error:
        raise UserError(
            f"{os.fspath(path)}: no such file; set init_from to the .npz file of a published ViT"
        ) from error
    except Exception as error:  # Storage, zip, zlib and numpy each have their own for a bad file.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{os.fspath(path)}: {reason}; set init_from to the whole .npz file of a published ViT"
        ) from error
    return rename_to_linen(tree)


def rename_to_linen(tree: dict[str, Any]) -> dict[str, Any]:
    """Renames the submodules of a pre-Linen parameter tree; leaves a Linen tree as it is.

    Before Linen one counter ran over all submodules (`LayerNorm_0`, `MlpBlock_1`, `LayerNorm_2`);
    Linen counts each class by itself (`LayerNorm_0`, `MlpBlock_0`, `LayerNorm_1`). The order within
    a class is the same, so counting anew gives the new names. Given names (`encoderblock_3`) stay.

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


def _read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):  # np.load would take it for a pickle, and say so.
            file.seek(0)
            start = file.read(16)
            size = file.seek(0, os.SEEK_END)
            raise ValueError(f"not a whole zip archive but {size} bytes that start with {start!r}")
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            return {name: _read_array(archive, key) for name, key in _unwrap(archive.files).items()}


def _read_array(archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    array = np.asarray(archive[key])
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{key} is of type {array.dtype}, not a float")
    return array.astype(np.float32, copy=False)


def _unwrap(keys: list[str]) -> dict[str, str]:
    """Maps the name of each parameter to its key; what lies beside a wrapper is no parameter."""
    names = {key: key for key in keys}
    for wrapper in _WRAPPERS:
        inside = {n.removeprefix(wrapper): key for n, key in names.items() if n.startswith(wrapper)}
        names = inside or names
    return names


def _natural_key(name: str) -> list[str | int]:
    """Sorts `Dense_10` after `Dense_9`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
