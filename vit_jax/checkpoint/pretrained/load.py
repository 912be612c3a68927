# SPDX-License-Identifier: Apache-2.0
"""Parameters to start from, wherever they are and whatever they are."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from vit_jax.checkpoint.manager import load_params
from vit_jax.checkpoint.pretrained.download import fetch, resolve
from vit_jax.checkpoint.pretrained.npz import read_npz
from vit_jax.checkpoint.pretrained.safetensors import read_safetensors
from vit_jax.checkpoint.pretrained.weights import (
    OBJECTIVE_PARAMS,
    Weights,
    as_tuples,
    infer_model,
    unstack_blocks,
)
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

_SUBTREE = re.compile(r"(.+):(?!//)([^:]+)")

# What was taken of a run, by the part that was asked for.
_WHICH = {
    "": "the parameters as they are, not their average",
    "ema_params": "the average of the parameters (ema_decay)",
}


def load_pretrained(source: str) -> Weights:
    """Reads weights of any kind, told apart by what is in them.

    Args:
      source: a workdir or an Orbax checkpoint, a `.npz` or `.safetensors` file, the address of one,
        or a name of the catalogue such as "augreg:B/16". `:PART` at the end of a path selects a
        part: the model in a file of several (`siglip.npz:img`), or the average of the parameters
        of a run (`WORKDIR:ema_params`).

    Raises:
      UserError: it is none of these, or is damaged.
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
    path, part = _split(source)
    return _read_run(Path(path), part) if Path(path).is_dir() else _read_file(path, part)


def _split(source: str) -> tuple[str, str]:
    match = _SUBTREE.fullmatch(source)
    if match and not Path(source).exists():
        return match[1], match[2]
    return source, ""


def _read_file(path: str | Path, part: str) -> Weights:
    file = epath.Path(path)
    if not _is_safetensors(file):
        return read_npz(file, subtree=part)
    if part:
        raise UserError(f"{path}:{part}: a .safetensors file has no parts; leave out :{part}")
    return read_safetensors(file)


def _is_safetensors(file: epath.Path) -> bool:
    """Told by the bytes; by the name only where they are of neither kind, or can't be read."""
    try:
        with file.open("rb") as f:
            start = f.read(9)
    except Exception:  # The reader will say what is wrong, storage has errors of many types.
        start = b""
    if start.startswith(b"PK"):
        return False
    return start[8:] == b"{" or file.suffix == ".safetensors"


def _read_run(folder: Path, part: str) -> Weights:
    tree, described = load_params(folder, item=part or "params")
    flat: dict[str, Any] = flatten(tree)
    if not part and any(path.startswith("params/") for path in flat):  # A train state of others.
        flat = {p.removeprefix("params/"): x for p, x in flat.items() if p.startswith("params/")}
    own = {
        path: np.asarray(x)
        for path, x in flat.items()
        if path.partition("/")[0] in OBJECTIVE_PARAMS
    }
    params = unstack_blocks({path: np.asarray(x) for path, x in flat.items() if path not in own})
    model = infer_model(params)
    if not model:
        names = ", ".join(sorted({path.partition("/")[0] for path in params})[:8])
        raise UserError(f"{folder}: expected a model of this package, but it holds {names}")
    return Weights(
        params=params,
        layout="vit_jax checkpoint" if described else "Orbax checkpoint",
        model=model | as_tuples(described.get("model", {})),
        preprocess=as_tuples(described.get("preprocess", {})),
        objective_params=own,
        notes=(_WHICH[part],) if described and part in _WHICH else (),
    )
