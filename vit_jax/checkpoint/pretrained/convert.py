# SPDX-License-Identifier: Apache-2.0
"""Writes weights to a file of another layout, reads it back and rebuilds the model from it."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.checkpoint.pretrained.load import load_pretrained, read_adapted_run
from vit_jax.checkpoint.pretrained.npz import write_npz
from vit_jax.checkpoint.pretrained.peft import CONFIG, WEIGHTS, make_adapters, write_config
from vit_jax.checkpoint.pretrained.rebuild import check_complete
from vit_jax.checkpoint.pretrained.safetensors import (
    MODEL_KEYS,
    write_safetensors,
    write_tensors,
)
from vit_jax.checkpoint.pretrained.timm_config import leave_out_pre_logits
from vit_jax.checkpoint.pretrained.weights import POSEMB, Weights
from vit_jax.models.lora import merge_adapters
from vit_jax.models.positions import FIXED_POSITIONS
from vit_jax.utils.errors import UserError
from vit_jax.utils.nested import as_tuples
from vit_jax.utils.registry import is_part
from vit_jax.utils.text import describe_size

# By the ending of a path: the function that writes it, and the endings of all files it writes.
WRITERS: dict[str, tuple[Callable[[Path, Weights], None], tuple[str, ...]]] = {
    ".npz": (write_npz, (".npz", ".json")),
    ".safetensors": (write_safetensors, (".safetensors",)),
}


def check_destination(destination: Path, *, key: str = "DST") -> list[Path]:
    """Returns the files that `convert` will write; raises `UserError` if it can't."""
    if destination.suffix not in WRITERS:
        raise UserError(f"{key}={destination}: expected a file that ends in {' or '.join(WRITERS)}")
    if not destination.parent.is_dir():
        raise UserError(f"{key}={destination}: the folder {destination.parent} does not exist")
    files = [destination.with_suffix(ending) for ending in WRITERS[destination.suffix][1]]
    if there := [path for path in files if path.exists()]:
        raise UserError(
            f"{key}={destination}: {there[0]} exists; remove it, or choose another name"
        )
    return files


def convert(weights: Weights, destination: Path) -> list[str]:
    """Writes weights to a file, and rebuilds the model from what is read back.

    Args:
      weights: any float dtype.
      destination: a path that ends in `.npz` or `.safetensors` and does not exist.

    Returns:
      Lines for the screen: the files written, and how they compare with the weights.

    Raises:
      UserError: the path has another ending, exists or can't be written, the weights are not all
        parameters of the model that they describe and no others, the layout can't hold this model,
        or what is read back differs. No file is left then.
    """
    files = check_destination(destination)
    write, _ = WRITERS[destination.suffix]
    notes: list[str] = []
    if destination.suffix == ".safetensors":
        weights, notes = leave_out_pre_logits(weights)
    # A model from outside is built by code that is not imported here.
    model = None if is_part(weights.model.get("name")) else check_complete(weights)
    try:
        write(destination, weights)
    except OSError as e:
        raise UserError(f"DST={destination} can't be written: {e.strerror or e}") from e
    lines = [f"wrote {path} ({describe_size(path.stat().st_size)})" for path in files] + notes
    try:
        again = load_pretrained(str(destination))
        _compare_descriptions(weights, again)
        every = "every parameter that was written" if notes else "every parameter"
        line = _compare_params(weights, again, every)
        if model is not None:
            _compare_models(model, check_complete(again), weights)
            line += ", and so is the model that is rebuilt from the file"
        return [*lines, line]
    except UserError as e:
        for path in files:
            path.unlink()
        raise UserError(
            f"DST={destination}: what was read back is not what was written, so it was removed; "
            f"this is a bug: {e}"
        ) from e


def convert_adapters(source: Path, destination: Path) -> list[str]:
    """Writes the adapters of a run as PEFT loads them, and reads them back.

    Args:
      source: the workdir or a checkpoint of a run with adapters.
      destination: a folder that does not exist.

    Returns:
      Lines for the screen: the files written, and how they compare with the run.

    Raises:
      UserError: the folder exists or can't be written, the run has no adapters, or PEFT has no
        such adapters. No file is left then.
    """
    if destination.exists():
        raise UserError(f"DST={destination} exists; remove it, or choose another name")
    run = read_adapted_run(source)
    where, part = Path(run.source), run.source.rpartition(":")[2]
    name = run.source.removeprefix("hf:").replace("timm:", "timm/", 1)
    if where.exists():
        name = str(where.parent if where.name == "model.safetensors" else where)
    elif Path(run.source.removesuffix(f":{part}")).exists():
        raise UserError(f"{source}: its base is a part of a file, {run.source}; PEFT has no parts")
    tensors, config = make_adapters(
        run.trained, run.params, run.lora, layout=run.base.layout, name=name
    )
    try:
        destination.mkdir(parents=True)
        write_tensors(destination / WEIGHTS, tensors, metadata={"format": "pt"})
        write_config(destination / CONFIG, config)
        again, merged = load_pretrained(str(destination)), load_pretrained(str(source))
        # PEFT adds the adapters to the base as it is, which the run may have rounded.
        added = merged.params
        if run.lora.base != "float32":
            added = merge_adapters(run.params | run.trained, run.lora)
        if different := _list_far(added, again.params):
            raise UserError(f"this is a bug: {different[0]} is not read back")
    except (OSError, UserError) as e:
        shutil.rmtree(destination, ignore_errors=True)
        raise UserError(f"DST={destination} can't be written: {e}") from e
    files = [destination / name for name in (WEIGHTS, CONFIG)]
    ours, theirs = (w.params.get(POSEMB, np.zeros(())) for w in (merged, again))
    note = ""
    if ours.shape != theirs.shape:
        note = "; the position embeddings are those of the base, which the run has resized"
    if run.lora.base != "float32":
        note += f"; the run rounded kernels of the base to {run.lora.base}, and PEFT does not"
    return [
        *(f"wrote {path} ({describe_size(path.stat().st_size)})" for path in files),
        f"read back: added to {name}, every parameter is that of the run{note}",
    ]


def _list_far(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> list[str]:
    """The parameters that differ by more than rounding, but position embeddings."""
    return [
        path
        for path in sorted((ours.keys() | theirs.keys()) - {POSEMB})
        if path not in ours
        or path not in theirs
        or ours[path].shape != theirs[path].shape
        or not np.allclose(ours[path], theirs[path], rtol=1e-4, atol=1e-5)
    ]


def _compare_models(model: Any, again: Any, weights: Weights) -> None:
    skipped = {"name", "variant"}
    if weights.model.get("position_embedding") in FIXED_POSITIONS:
        skipped.add("position_embedding")  # It may be written as learned.
    if hasattr(model, "towers"):
        for part, tower in model.towers.items():
            _compare_models(tower, again.towers[part], weights)
    for key in MODEL_KEYS:
        ours, theirs = (getattr(m, key, None) for m in (model, again))
        if key not in skipped and ours != theirs:
            raise UserError(f"model.{key} was {ours!r} and is {theirs!r}")


def _compare_descriptions(weights: Weights, again: Weights) -> None:
    for key in ("preprocess", "posemb_grid", "posemb_resize", "class_names", "loss", "tokenizer"):
        ours, theirs = (as_tuples(getattr(w, key)) for w in (weights, again))
        if ours != theirs:
            raise UserError(f"{key} was {ours!r} and is {theirs!r}")


def _compare_params(weights: Weights, again: Weights, every: str) -> str:
    if not _list_differences(weights.params, again.params):
        return f"read back: {every} is the same"
    ours, theirs = (_fold_positions(w.params) for w in (weights, again))
    if weights.model.get("position_embedding") in FIXED_POSITIONS:
        theirs.pop(POSEMB, None)  # They are written as learned ones.
    if different := _list_differences(ours, theirs):
        raise UserError(f"{len(different)} parameters are not the same, {different[0]} among them")
    return f"read back: with positions where this layout has them, {every} is the same"


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
