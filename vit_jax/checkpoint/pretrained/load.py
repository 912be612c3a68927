# SPDX-License-Identifier: Apache-2.0
"""Loads pretrained weights from a name, a URL, a file or a run."""

import dataclasses
import re
from pathlib import Path

from etils import epath

from vit_jax.checkpoint.pretrained.download import fetch, resolve
from vit_jax.checkpoint.pretrained.npz import read_npz
from vit_jax.checkpoint.pretrained.run import read_run
from vit_jax.checkpoint.pretrained.safetensors import read_safetensors
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.utils.errors import UserError

_SUBTREE = re.compile(r"(.+):(?!//)([^:]+)")


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
    path, part = _split(source)
    return read_run(Path(path), part=part) if Path(path).is_dir() else _read_file(path, part)


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
    """Decides by the first bytes, and by the name if they are of neither kind or can't be read."""
    try:
        with file.open("rb") as f:
            start = f.read(9)
    except Exception:  # The reader reports the error; storage raises many types.
        start = b""
    if start.startswith(b"PK"):
        return False
    return start[8:] == b"{" or file.suffix == ".safetensors"
