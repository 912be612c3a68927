# SPDX-License-Identifier: Apache-2.0
"""Writes weights to a file of another layout, and compares what is read back."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.npz import write_npz
from vit_jax.checkpoint.pretrained.safetensors import write_safetensors
from vit_jax.checkpoint.pretrained.weights import POSEMB, Weights
from vit_jax.models.positions import FIXED_POSITIONS
from vit_jax.utils.errors import UserError

# By the ending of a path: the function that writes it, and the endings of all files it writes.
WRITERS: dict[str, tuple[Callable[[Path, Weights], None], tuple[str, ...]]] = {
    ".npz": (write_npz, (".npz", ".json")),
    ".safetensors": (write_safetensors, (".safetensors",)),
}


def convert(weights: Weights, destination: Path) -> list[str]:
    """Writes weights to a file and reads them back.

    Args:
      weights: any float dtype.
      destination: a path that ends in `.npz` or `.safetensors` and does not exist.

    Returns:
      Lines for the screen: the files written, and how they compare with the weights.

    Raises:
      UserError: the path has another ending, exists or can't be written, the layout can't hold this
        model, or the parameters that are read back differ.
    """
    if destination.suffix not in WRITERS:
        raise UserError(f"DST={destination}: expected a file that ends in {' or '.join(WRITERS)}")
    write, endings = WRITERS[destination.suffix]
    files = [destination.with_suffix(ending) for ending in endings]
    for path in files:
        if path.exists():
            raise UserError(f"DST={destination}: {path} exists; remove it, or choose another name")
    try:
        write(destination, weights)
    except OSError as e:
        raise UserError(f"DST={destination} can't be written: {e.strerror or e}") from e
    lines = [f"wrote {path} ({path.stat().st_size / 2**20:,.1f} MiB)" for path in files]
    return [*lines, _compare(weights, load_pretrained(str(destination)), destination)]


def _compare(weights: Weights, again: Weights, destination: Path) -> str:
    if not _list_differences(weights.params, again.params):
        return "read back: every parameter is the same"
    ours, theirs = (_fold_positions(w.params) for w in (weights, again))
    if weights.model.get("position_embedding") in FIXED_POSITIONS:
        theirs.pop(POSEMB, None)  # They are written as learned ones.
    if different := _list_differences(ours, theirs):
        raise UserError(
            f"DST={destination}: {len(different)} parameters are not the same when read back, "
            f"{different[0]} among them; this is a bug"
        )
    return "read back: the same function; positions are put where this layout has them"


def _list_differences(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> list[str]:
    return [
        path
        for path in sorted(ours.keys() | theirs.keys())
        if path not in ours or path not in theirs or not np.array_equal(ours[path], theirs[path])
    ]


def _fold_positions(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds the position embedding of the class token to the token; the function is the same."""
    folded = dict(params)
    if "cls" in folded and POSEMB in folded:
        first, rest = np.split(folded[POSEMB], [1], axis=1)
        folded |= {"cls": folded["cls"] + first, POSEMB: rest}
    return folded
