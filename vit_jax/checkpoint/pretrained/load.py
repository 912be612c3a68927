# SPDX-License-Identifier: Apache-2.0
"""Loads pretrained weights from a name, a URL, a file or a run."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vit_jax.checkpoint.listing import find_checkpoint
from vit_jax.checkpoint.manager import DESCRIPTION, quiet_reads
from vit_jax.checkpoint.manifest import find_fault, has_manifest
from vit_jax.checkpoint.pretrained.description import check_description
from vit_jax.checkpoint.pretrained.download import fetch, resolve
from vit_jax.checkpoint.pretrained.npz import read_npz
from vit_jax.checkpoint.pretrained.safetensors import read_safetensors
from vit_jax.checkpoint.pretrained.weights import (
    OBJECTIVE_PARAMS,
    Weights,
    infer_model,
    unstack_blocks,
)
from vit_jax.checkpoint.workdir import read_labels
from vit_jax.utils.bounds import MAX_WEIGHTS, check_growth, check_tree, open_outside, read_json
from vit_jax.utils.class_names import check_names
from vit_jax.utils.errors import UserError, describe_error, first_line
from vit_jax.utils.layout import CHECKPOINTS
from vit_jax.utils.nested import as_tuples
from vit_jax.utils.registry import is_part
from vit_jax.utils.tree import flatten

_SUBTREE = re.compile(r"(.+):(?!//)([^:]+)")
# A note on which parameters were read, by the part that was asked for.
_WHICH = {
    "": "the parameters as they are, not their average",
    "ema_params": "the average of the parameters (ema_decay)",
}


def load_pretrained(source: str) -> Weights:
    """Reads pretrained weights; the content of a file decides which layout it has.

    Args:
      source: a workdir or an Orbax checkpoint, a `.npz` or `.safetensors` file, the URL of one, or
        a name of the catalogue such as "augreg:B/16". `:PART` at the end of a path selects a part:
        the model in a file of several (`siglip.npz:img`), or the average of the parameters of a
        run (`WORKDIR:ema_params`).

    Returns:
      Weights with the shapes of the source; float32 from a `.npz`, else the dtypes of the source.

    Raises:
      UserError: the source is none of these, or is damaged.
    """
    if resolved := resolve(source):
        path, published = resolved
        weights = _read_file(path, "")
        preprocess = {
            "mean": published.mean,
            "std": published.std,
            "image_size": (published.image_size, published.image_size),
            "eval": published.eval,
        }
        notes = (*weights.notes, *filter(None, [published.note]))
        return dataclasses.replace(weights, preprocess=preprocess, notes=notes)
    if source.startswith(("https://", "http://")):
        return _read_file(fetch(source), "")
    path, part = source, ""
    if (match := _SUBTREE.fullmatch(source)) and not Path(source).exists():
        path, part = match.groups()
    return read_run(Path(path), part=part) if Path(path).is_dir() else _read_file(path, part)


def _read_file(path: str | Path, part: str) -> Weights:
    file = epath.Path(path)
    try:
        remote = "://" in os.fspath(path)
        with file.open("rb") if remote else open_outside(path, max_bytes=MAX_WEIGHTS) as f:
            start = f.read(9)
    except Exception:  # The reader reports the error; storage raises many types.
        start = b""
    # The name decides if the first bytes are of neither kind or can't be read.
    if start.startswith(b"PK") or (start[8:] != b"{" and file.suffix != ".safetensors"):
        return read_npz(file, subtree=part)
    if part:
        raise UserError(f"{path}:{part}: a .safetensors file has no parts; leave out :{part}")
    return read_safetensors(file)


def read_run(folder: Path, *, part: str = "") -> Weights:
    """Reads the newest checkpoint of a workdir, or one checkpoint.

    Args:
      folder: see `load_params`.
      part: "" for the parameters, "ema_params" for their average.

    Returns:
      Weights with the dtypes of the checkpoint.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or it is of another kind of model.
    """
    tree, described = load_params(folder, item=part or "params")
    flat: dict[str, Any] = flatten(tree)
    # Another program's train state has them below `params`.
    if not part and any(path.startswith("params/") for path in flat):
        flat = {p.removeprefix("params/"): x for p, x in flat.items() if p.startswith("params/")}
    flat = {path: np.asarray(x) for path, x in flat.items()}
    try:
        return check_description(_describe(flat, described, folder, part))
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{folder}: its description: {first_line(e)}") from None


def _describe(
    flat: dict[str, np.ndarray], described: dict[str, Any], folder: Path, part: str
) -> Weights:
    names = described.get("objective_params", OBJECTIVE_PARAMS)
    own = {path: x for path, x in flat.items() if path.partition("/")[0] in names}
    params = unstack_blocks({path: x for path, x in flat.items() if path not in own})
    stated = as_tuples(described.get("model", {}))
    model = stated if is_part(stated.get("name")) else infer_model(params)
    if not model:
        names = ", ".join(sorted({path.partition("/")[0] for path in params})[:8])
        raise UserError(f"{folder}: expected a model of this package, but it holds {names}")
    return Weights(
        params=params,
        layout="vit_jax checkpoint" if described else "Orbax checkpoint",
        model=model | stated,
        preprocess=as_tuples(described.get("preprocess", {})),
        objective_params=own,
        class_names=_find_class_names(folder, described),
        notes=(_WHICH[part],) if described and part in _WHICH else (),
    )


def _find_class_names(folder: Path, described: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names in the run's `labels.txt`, or else those in the description of a checkpoint."""
    folder = folder.absolute()
    workdir = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder
    names = read_labels(workdir)
    return check_names(described.get("class_names"), str(folder)) if names is None else names


def load_params(folder: Path, *, item: str = "params") -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the parameters of a run, or of any Orbax checkpoint, onto one local device.

    Args:
      folder: a workdir (its newest checkpoint is read), one of its checkpoints, or a folder into
        which Orbax saved a tree of arrays.
      item: of a checkpoint: "params", or "ema_params" for their average.

    Returns:
      `(params, description)`: a nested dict of arrays with the shapes and dtypes of the checkpoint,
      and the `description` that `CheckpointManager` wrote; empty if another program wrote it.

    Raises:
      UserError: there is no complete checkpoint, or it can't be read.
    """
    items = (item, DESCRIPTION)
    checkpoint = find_checkpoint(folder, items=items)
    path = checkpoint if (checkpoint / "_METADATA").exists() else checkpoint / item
    if not path.is_dir():
        raise UserError(
            f"there is no {path}; expected a whole checkpoint with params, and with ema_params "
            "where ema_decay was set"
        )
    whole = path.parent
    if has_manifest(whole) and (fault := find_fault(whole, items)):
        raise UserError(f"the checkpoint {path} can't be read: {fault}")
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        size = check_tree(path)
        with ocp.StandardCheckpointer() as checkpointer, quiet_reads():
            stored = checkpointer.metadata(path).item_metadata.tree
            leaves = jax.tree.leaves(stored)
            claimed = sum(math.prod(m.shape) * np.dtype(m.dtype).itemsize for m in leaves)
            check_growth(size, claimed)
            abstract = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), stored
            )
            params = checkpointer.restore(path, abstract)
        description = checkpoint / DESCRIPTION / "metadata"
        described = read_json(description) if description.exists() else {}
        if not isinstance(described, dict):
            raise ValueError(f"{DESCRIPTION} holds no keys and values")
    except Exception as e:
        raise UserError(
            f"the checkpoint {path} can't be read ({describe_error(e)}); expected a whole one"
        ) from e
    return params, described
