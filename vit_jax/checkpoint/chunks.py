# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint in a bucket that a process needs to restore what its devices hold.

A checkpoint of several processes has a file for each chunk of an array, `params/encoder.kernel/0.1`
(https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html), so only chunks are downloaded that
overlap with the shards of this process. Of one that a single process wrote, in few large files, all
are. Orbax refuses to read an array of which a chunk is missing.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vit_jax.checkpoint.manifest import find_fault_in, read_files
from vit_jax.utils.errors import UserError
from vit_jax.utils.mirrors import fetch_checkpoint


def fetch_needed(folder: Path, items: Mapping[str, Any]) -> None:
    """Downloads and verifies the files of a checkpoint that this process needs.

    Args:
      folder: of the checkpoint, in the local copy of a bucket.
      items: trees of `jax.ShapeDtypeStruct` with shardings, by the name of their part, such as
        `params`.

    Raises:
      UserError: the bucket can't be read, or a file is not as it was written.
    """
    files = read_files(folder)
    chunks = defaultdict[str, list[str]](list)
    for name in files:
        array, _, file = name.rpartition("/")
        if is_chunk(name):
            chunks[array].append(file)
    rest = [name for name in files if not is_chunk(name)]
    missing = {name for name in files if not (folder / name).exists()}
    fetch_checkpoint(folder, names=missing.intersection(rest))
    leaves = dict(_name_leaves(items))
    needed = set(rest)
    for array, names in chunks.items():
        own = _find_chunks(folder / array, leaves[array]) if array in leaves else None
        needed.update(f"{array}/{name}" for name in names if own is None or name in own)
    missing &= needed
    fetch_checkpoint(folder, names=missing)
    if (fault := find_fault_in(folder, {name: files[name] for name in missing})) is not None:
        raise UserError(
            f"--workdir: the checkpoint {folder} can't be restored: {fault}; expected what process "
            "0 has verified: the same command tries again"
        )


def is_chunk(name: str) -> bool:
    """Whether a file of a checkpoint without large files has a part of an array."""
    item, _, file = name.rpartition("/")
    return not file.startswith((".", "_")) and "/" in item


def _name_leaves(items: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of trees, by the names of the folders that Orbax writes them to."""
    for item, tree in items.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            yield f"{item}/{jax.tree_util.keystr(path, simple=True, separator='.')}", leaf


def _find_chunks(folder: Path, leaf: Any) -> set[str] | None:
    """The names of the chunks that this process needs of an array; None for all.

    Args:
      folder: of the array, which has its `.zarray`.
      leaf: shape and sharding.
    """
    try:
        layout = json.loads((folder / ".zarray").read_bytes())
        shape, sizes = tuple(layout["shape"]), tuple(layout["chunks"])
        separator = layout.get("dimension_separator", ".")
        indices = leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape)).values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # Whatever is wrong there, Orbax reports it.
    if shape != tuple(leaf.shape):
        return None
    return {
        separator.join(map(str, place)) or "0"
        for index in indices
        for place in find_places(shape, sizes, index)
    }


def find_places(
    shape: Sequence[int], sizes: Sequence[int], index: Collection[slice]
) -> Iterator[tuple[int, ...]]:
    """The places in the grid of chunks that a part of an array overlaps with.

    Args:
      shape: of the array.
      sizes: of a chunk.
      index: of the part, whose slices have no steps.
    """
    ranges = []
    for length, size, part in zip(shape, sizes, index, strict=True):
        start, stop, _ = part.indices(length)
        ranges.append(range(start // size, -(-stop // size)))
    return itertools.product(*ranges)
