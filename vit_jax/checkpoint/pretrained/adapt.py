# SPDX-License-Identifier: Apache-2.0
"""Makes the parameters of a file fit a model: a new head, another resolution, nothing else.

Whatever else differs is an error, since a model that is loaded in part trains without complaint.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from vit_jax.checkpoint.pretrained.posemb import resize_posemb
from vit_jax.utils.errors import UserError

_POSEMB = "Transformer/posembed_input/pos_embedding"
_MAX_LISTED = 4  # More parameters than this in one line and nobody reads it.

_Flat = dict[str, Any]  # Arrays by path, as in "head/kernel".


def adapt_params(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    *,
    target_grid: tuple[int, int],
    num_prefix_tokens: int,
) -> tuple[dict[str, Any], list[str]]:
    """Fills a model's parameters from those of a file.

    - The head is kept if it and `pre_logits`, its input, have the model's shapes, else it starts
      anew.
    - `pre_logits` is dropped if only the file has it, and starts anew if only the model has it.
    - Position embeddings are resized if their number differs. The file's are taken for a square
      grid, as no file says what its grid was.
    - Everything else must have the same path and shape on both sides.

    Args:
      source: nested dict of the file's parameters, as from `load_npz`.
      target: nested dict of the model's freshly initialised parameters.
      target_grid: (rows, columns) of patches in the model's input.
      num_prefix_tokens: tokens in front of the patches: 1 with a class token, else 0.

    Returns:
      `(params, notes)`: parameters with the paths, shapes and types of `target`, and one line for
      each thing that is not simply as in the file.

    Raises:
      UserError: the parameters do not fit; the message lists the first few by path.
    """
    params = traverse_util.flatten_dict(source, sep="/")
    initial = traverse_util.flatten_dict(target, sep="/")
    params, head_notes = _fit_head(params, initial)
    params, pre_logits_notes = _fit_pre_logits(params, initial)
    params, posemb_notes = _fit_posemb(
        params, initial, target_grid=target_grid, num_prefix_tokens=num_prefix_tokens
    )
    notes = posemb_notes + pre_logits_notes + head_notes
    _check_fit(params, initial)
    fitted = {path: _cast(params[path], like=leaf) for path, leaf in initial.items()}
    return traverse_util.unflatten_dict(fitted, sep="/"), notes


def _fit_head(params: _Flat, initial: _Flat) -> tuple[_Flat, list[str]]:
    same_input = _shapes(params, "pre_logits/") == _shapes(initial, "pre_logits/")
    if same_input and _shapes(params, "head/") == _shapes(initial, "head/"):
        if "head/kernel" in params and not np.any(params["head/kernel"]):
            return params, ["head: the kernel in the file is all zero: it was published untrained"]
        return params, []
    return _replace(params, initial, "head/"), [_describe_new_head(params, initial)]


def _describe_new_head(params: _Flat, initial: _Flat) -> str:
    if "head/kernel" not in initial:
        return "head: none here: dropped"
    if "head/kernel" not in params:
        return "head: none in the file: initialised"
    theirs, ours = params["head/kernel"].shape, initial["head/kernel"].shape
    if theirs[-1] != ours[-1]:
        return f"head: {theirs[-1]} classes in the file, {ours[-1]} here: re-initialised"
    if theirs == ours:
        return "head: in the file it follows another pre_logits than here: re-initialised"
    return f"head: kernel {theirs} in the file, {ours} here: re-initialised"


def _fit_pre_logits(params: _Flat, initial: _Flat) -> tuple[_Flat, list[str]]:
    theirs, ours = _shapes(params, "pre_logits/"), _shapes(initial, "pre_logits/")
    if theirs and not ours:
        return _replace(params, initial, "pre_logits/"), ["pre_logits: none here: dropped"]
    if ours and not theirs:
        note = "pre_logits: none in the file: initialised"
        return _replace(params, initial, "pre_logits/"), [note]
    return params, []


def _fit_posemb(
    params: _Flat, initial: _Flat, *, target_grid: tuple[int, int], num_prefix_tokens: int
) -> tuple[_Flat, list[str]]:
    theirs, ours = (_shapes(flat, _POSEMB).get(_POSEMB, ()) for flat in (params, initial))
    # Only a number of tokens can be mended; _check_fit reports the rest.
    if len(theirs) != 3 or theirs == ours or theirs[::2] != ours[::2]:
        return params, []
    num_patches = theirs[1] - num_prefix_tokens
    side = math.isqrt(max(num_patches, 0))
    if not side or side**2 != num_patches:
        raise UserError(
            f"init_from: {theirs[1]} position embeddings in the file, less {num_prefix_tokens} "
            "for the class token, are not a square grid; set model.classifier as in the file"
        )
    resized = resize_posemb(
        params[_POSEMB],
        source_grid=(side, side),
        target_grid=target_grid,
        num_prefix_tokens=num_prefix_tokens,
    )
    rows, columns = target_grid
    note = f"position embeddings resized from {side}x{side} to {rows}x{columns}"
    return {**params, _POSEMB: resized}, [note]


def _check_fit(params: _Flat, initial: _Flat) -> None:
    theirs, ours = _shapes(params), _shapes(initial)
    problems = [
        *(
            f"{path} is {theirs[path]} in the file, {ours[path]} in the model"
            for path in ours
            if path in theirs and theirs[path] != ours[path]
        ),
        *(f"{path} {ours[path]} is not in the file" for path in ours if path not in theirs),
        *(f"{path} {theirs[path]} is not in the model" for path in theirs if path not in ours),
    ]
    if problems:
        more = len(problems) - _MAX_LISTED
        raise UserError(
            f"init_from does not fit the model: {'; '.join(problems[:_MAX_LISTED])}"
            f"{f'; and {more} more' if more > 0 else ''}: set model to that of the file"
        )


def _shapes(flat: _Flat, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {path: tuple(x.shape) for path, x in flat.items() if path.startswith(prefix)}


def _replace(params: _Flat, initial: _Flat, prefix: str) -> _Flat:
    """Returns `params` with all that lies under `prefix` taken from `initial`."""
    rest = {path: x for path, x in params.items() if not path.startswith(prefix)}
    return rest | {path: x for path, x in initial.items() if path.startswith(prefix)}


def _cast(value: Any, *, like: Any) -> Any:
    return value if value is like else np.asarray(value).astype(like.dtype, copy=False)
