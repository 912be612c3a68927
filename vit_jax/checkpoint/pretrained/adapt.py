# SPDX-License-Identifier: Apache-2.0
"""Makes the parameters of a file fit a model: a new head, another resolution, nothing else.

Whatever else differs is an error, since a model that is loaded in part trains without complaint.
"""

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from vit_jax.checkpoint.pretrained.embedding import change_channels, resize_patches
from vit_jax.checkpoint.pretrained.posemb import Method, resize_posemb
from vit_jax.checkpoint.pretrained.weights import (
    OBJECTIVE_PARAMS,
    POSEMB,
    REGISTERS,
    Weights,
    is_stacked,
    stack_blocks,
    unstack_blocks,
)
from vit_jax.models.positions import FIXED_POSITIONS, fixed_positions
from vit_jax.utils.errors import UserError

_MAX_LISTED = 4  # More parameters than this in one line and nobody reads it.

# The first convolution of a Vision Transformer, of a Mixer and of a hybrid; only the patches of the
# first two can be resized.
_EMBEDDINGS = ("embedding/kernel", "stem/kernel", "conv_root/kernel")

# Arguments of models that change the function and not the parameters' shapes.
_ARGUMENTS = ("activation", "norm_epsilon", "rope_theta", "position_embedding", "num_heads")

_Flat = dict[str, Any]  # Arrays by path, as in "head/kernel".


def adapt_params(
    weights: Weights,
    target: Mapping[str, Any],
    *,
    target_grid: tuple[int, int],
    num_class_tokens: int,
    dont_load: tuple[str, ...] = (),
    posemb_resize: Method = "bilinear",
) -> tuple[dict[str, Any], list[str]]:
    """Fills a model's parameters from those of a file.

    - The head is kept if it and `pre_logits`, its input, have the model's shapes, else it starts
      anew.
    - `pre_logits` is dropped if only the file has it, and starts anew if only the model has it.
    - A class or distillation token that the model has not becomes a register, if it has one more of
      these than the file; a distillation token that only the model has starts anew.
    - Position embeddings are resized if the grids differ. Fixed ones are where learned ones
      start. Without an image size in the weights'
      `preprocess`, the file's grid is taken to be square, as no published file says what it was.
    - The first convolution fits other patches and another number of channels (`embedding`).
    - Parameters that `dont_load` names start anew, or are dropped if the model has none.
    - Everything else must have the same path and shape on both sides.

    Args:
      weights: of the file.
      target: nested dict of the model's freshly initialised parameters.
      target_grid: (rows, columns) of patches in the model's input.
      num_class_tokens: tokens in front of the patches that have position embeddings.
      dont_load: regular expressions; each must match the whole path of a parameter.
      posemb_resize: how position embeddings are interpolated, see `resize_posemb`.

    Returns:
      `(params, notes)`: parameters with the paths, shapes and types of `target`, and one line for
      each thing that was decided.

    Raises:
      UserError: the parameters do not fit; the message lists the first few by path.
    """
    initial = traverse_util.flatten_dict(target, sep="/")
    stacked = is_stacked(initial)
    initial = unstack_blocks(initial)
    params, notes = _leave_out(weights.params, initial, dont_load)
    for fit in (_fit_tokens, _fit_channels, _fit_patches):
        params, more = fit(params, initial)
        notes += more
    params, more = _compute_posemb(
        weights, params, initial, target_grid=target_grid, num_class_tokens=num_class_tokens
    )
    notes += more
    params, more = _fit_posemb(
        params,
        initial,
        source_grid=_find_grid(weights),
        target_grid=target_grid,
        num_class_tokens=num_class_tokens,
        method=posemb_resize,
    )
    notes += more
    params, head_notes = _fit_head(params, initial)
    params, pre_logits_notes = _fit_pre_logits(params, initial)
    _check_fit(params, initial)
    fitted = {path: _cast(params[path], like=leaf) for path, leaf in initial.items()}
    if stacked:
        fitted = stack_blocks(fitted)
    notes += pre_logits_notes + head_notes
    return traverse_util.unflatten_dict(fitted, sep="/"), notes


def check_arguments(weights: Weights, model: Any) -> None:
    """Refuses weights of a model that computes something else from parameters of the same shapes.

    Args:
      weights: of the file.
      model: to be filled; its attributes are compared with `weights.model`.

    Raises:
      UserError: an argument differs; the message has the overrides that make it the file's.
    """
    theirs = {k: weights.model[k] for k in _ARGUMENTS if k in weights.model and hasattr(model, k)}
    different = {k: value for k, value in theirs.items() if value != getattr(model, k)}
    fixed = different.get("position_embedding") in FIXED_POSITIONS
    if fixed and model.position_embedding == "learned":  # Learned ones start from the fixed ones.
        del different["position_embedding"]
    if different:
        found = ", ".join(f"{k}={v!r} (here {getattr(model, k)!r})" for k, v in different.items())
        overrides = " ".join(f"--config.model.{k}={v}" for k, v in different.items())
        raise UserError(
            f"init_from: these weights ({weights.layout}) belong to a model with {found}: "
            f"add {overrides}"
        )


def fit_objective_params(
    weights: Weights, initial: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Parameters of an objective: taken over where the file has the same ones, else anew.

    Args:
      weights: of the file; what belongs to its objective is in `weights.own_params`.
      initial: nested dict of those of the objective here, freshly initialised.

    Returns:
      `(params, notes)`, as `adapt_params`.
    """
    params, notes = {}, []
    theirs = {path: tuple(x.shape) for path, x in weights.objective_params.items()}
    for name, part in initial.items():
        flat: _Flat = dict(traverse_util.flatten_dict({name: part}, sep="/"))
        if all(theirs.get(path) == tuple(x.shape) for path, x in flat.items()):
            flat = {path: _cast(weights.objective_params[path], like=x) for path, x in flat.items()}
            notes.append(f"{name}: kept")
        else:
            notes.append(f"{name}: none like it in the file: initialised")
        params |= traverse_util.unflatten_dict(flat, sep="/")
    return params, notes + [
        note for note in describe_objective_params(weights) if _name(note) not in initial
    ]


def describe_objective_params(weights: Weights) -> list[str]:
    """A line for each part that belongs to the objective of a run, and not to its model."""
    names = {path.partition("/")[0] for path in weights.objective_params}
    return [f"{name}: {OBJECTIVE_PARAMS[name]}: dropped" for name in sorted(names)]


def _name(note: str) -> str:
    return note.partition(":")[0]


def _leave_out(
    params: Mapping[str, Any], initial: _Flat, dont_load: Iterable[str]
) -> tuple[_Flat, list[str]]:
    kept, notes = dict(params), []
    for pattern in dont_load:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"adapt.dont_load: {pattern!r} is no regular expression: {error}"
            ) from None
        anew = [path for path in initial if regex.fullmatch(path)]
        dropped = [path for path in params if regex.fullmatch(path) and path not in initial]
        if not anew and not dropped:
            raise UserError(
                f"adapt.dont_load: {pattern!r} matches the whole path of no parameter; paths are "
                f"like {next(iter(initial))}"
            )
        kept = {path: x for path, x in kept.items() if path not in dropped}
        kept |= {path: initial[path] for path in anew}
        notes += [f"{path}: not loaded: initialised" for path in anew]
        notes += [f"{path}: not loaded: dropped" for path in dropped]
    return kept, notes


def _fit_tokens(params: _Flat, initial: _Flat) -> tuple[_Flat, list[str]]:
    params, notes = dict(params), []
    registers = initial[REGISTERS].shape[1] if REGISTERS in initial else 0
    for name in ("dist", "cls"):
        theirs = [x for x in ("cls", "dist") if x in params]
        found = params[REGISTERS].shape[1] if REGISTERS in params else 0
        if name not in params or name in initial or registers <= found:
            continue
        token, slot = params.pop(name), theirs.index(name)
        if POSEMB in params:
            token = token + params[POSEMB][:, slot : slot + 1]
            params[POSEMB] = np.delete(params[POSEMB], slot, axis=1)
        others = [params[REGISTERS]] if found else []
        params[REGISTERS] = np.concatenate([token, *others], axis=1)
        notes.append(f"{name}: a register here, with its position embedding added")
        if name == "dist" and "head_dist/kernel" in params:
            params = _replace(params, {}, "head_dist/")
            notes.append("head_dist: none here: dropped; the file is meant to average both heads")
    if "dist" in initial and "dist" not in params and "cls" in params:
        params["dist"] = initial["dist"]
        if POSEMB in params and POSEMB in initial:
            slot = np.asarray(initial[POSEMB])[:, 1:2]
            params[POSEMB] = np.insert(params[POSEMB], [1], slot, axis=1)
        notes.append("dist: none in the file: initialised")
    return params, notes


def _compute_posemb(
    weights: Weights,
    params: _Flat,
    initial: _Flat,
    *,
    target_grid: tuple[int, int],
    num_class_tokens: int,
) -> tuple[_Flat, list[str]]:
    if POSEMB in params or POSEMB not in initial:
        return params, []
    kind, width = weights.model.get("position_embedding"), initial[POSEMB].shape[-1]
    fixed = fixed_positions(kind, target_grid, width)
    if fixed is None:
        return params, []
    posemb = np.pad(fixed, ((0, 0), (num_class_tokens, 0), (0, 0)))
    return {**params, POSEMB: posemb}, [f"position embeddings: learned here, from {kind} on"]


def _fit_channels(params: _Flat, initial: _Flat) -> tuple[_Flat, list[str]]:
    path, theirs, ours = _find_embedding(params, initial)
    if len(theirs) != 4 or len(ours) != 4 or theirs[2] == ours[2] or theirs[3] != ours[3]:
        return params, []
    kernel = change_channels(np.asarray(params[path]), ours[2])
    how = "summed" if ours[2] == 1 else "repeated and scaled"
    note = f"{path}: {theirs[2]} input channels in the file, {ours[2]} here: {how}"
    return {**params, path: kernel}, [note]


def _fit_patches(params: _Flat, initial: _Flat) -> tuple[_Flat, list[str]]:
    path, theirs, ours = _find_embedding(params, initial)
    if len(theirs) != 4 or path == "conv_root/kernel" or theirs[:2] == ours[:2]:
        return params, []
    if theirs[2:] != ours[2:]:
        return params, []
    kernel = resize_patches(np.asarray(params[path]), (ours[0], ours[1]))
    note = f"{path}: patches resized from {_by(theirs)} to {_by(ours)} pixels (pseudo-inverse)"
    return {**params, path: kernel}, [note]


def _find_embedding(params: _Flat, initial: _Flat) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    for path in reversed(_EMBEDDINGS):  # Of a hybrid it is the root that sees the image.
        if path in params and path in initial:
            return path, tuple(params[path].shape), tuple(initial[path].shape)
    return "", (), ()


def _find_grid(weights: Weights) -> tuple[int, int] | None:
    """(rows, columns) of the file's position embeddings, if its metadata tell."""
    size, patch = weights.preprocess.get("image_size"), weights.model.get("patch_size")
    if not size or not patch or "resnet_layers" in weights.model:
        return None
    return size[0] // patch[0], size[1] // patch[1]


def _fit_posemb(
    params: _Flat,
    initial: _Flat,
    *,
    source_grid: tuple[int, int] | None,
    target_grid: tuple[int, int],
    num_class_tokens: int,
    method: Method,
) -> tuple[_Flat, list[str]]:
    theirs, ours = (_shapes(flat, POSEMB).get(POSEMB, ()) for flat in (params, initial))
    # Only a number of tokens can be mended; _check_fit reports the rest.
    if len(theirs) != 3 or theirs[::2] != ours[::2]:
        return params, []
    num_patches = theirs[1] - num_class_tokens
    side = math.isqrt(max(num_patches, 0))
    if source_grid is None or math.prod(source_grid) != num_patches:
        if theirs == ours and side**2 != num_patches:
            return params, []  # No square, but as many: they are taken to be of the same grid.
        source_grid = (side, side)
    if source_grid == target_grid and theirs == ours:
        return params, []
    if not num_patches or math.prod(source_grid) != num_patches:
        raise UserError(
            f"init_from: {theirs[1]} position embeddings in the file, less {num_class_tokens} "
            "for the class token, are not a square grid; set model.classifier as in the file"
        )
    resized = resize_posemb(
        params[POSEMB],
        source_grid=source_grid,
        target_grid=target_grid,
        num_prefix_tokens=num_class_tokens,
        method=method,
    )
    note = f"position embeddings: resized from {_by(source_grid)} to {_by(target_grid)}, {method}"
    return {**params, POSEMB: resized}, [note]


def _fit_head(params: _Flat, initial: _Flat) -> tuple[_Flat, list[str]]:
    params, notes = _fit_first_head(params, initial)
    if _shapes(params, "head_dist/") == _shapes(initial, "head_dist/"):
        return params, notes
    what = "another one here" if "head_dist/kernel" in params else "none in the file"
    what = f"{what}: initialised" if "head_dist/kernel" in initial else "none here: dropped"
    return _replace(params, initial, "head_dist/"), [*notes, f"head_dist: {what}"]


def _fit_first_head(params: _Flat, initial: _Flat) -> tuple[_Flat, list[str]]:
    same_input = _shapes(params, "pre_logits/") == _shapes(initial, "pre_logits/")
    if same_input and _shapes(params, "head/") == _shapes(initial, "head/"):
        if "head/kernel" not in params:
            return params, []
        if params["head/kernel"] is initial["head/kernel"]:
            return params, []  # Left out before.
        if not np.any(params["head/kernel"]):
            return params, ["head: the kernel in the file is all zero: it was published untrained"]
        return params, [f"head: kept, {params['head/kernel'].shape[-1]} classes"]
    return _replace(params, initial, "head/"), [_describe_new_head(params, initial)]


def _describe_new_head(params: _Flat, initial: _Flat) -> str:
    if "head/kernel" not in initial:
        return "head: none here: dropped"
    if "head/kernel" not in params:
        return "head: none in the file: initialised"
    theirs, ours = params["head/kernel"].shape, initial["head/kernel"].shape
    if theirs[-1] != ours[-1]:
        zero = "" if np.any(params["head/kernel"]) else " (all zero: published untrained)"
        return f"head: {theirs[-1]} classes in the file{zero}, {ours[-1]} here: re-initialised"
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
    if not theirs or params["pre_logits/kernel"] is initial["pre_logits/kernel"]:
        return params, []
    return params, [f"pre_logits: kept, width {theirs['pre_logits/kernel'][-1]}"]


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
            f"{f'; and {more} more' if more > 0 else ''}: set model to that of the file, or name "
            "in adapt.dont_load what shall start anew"
        )


def _shapes(flat: _Flat, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {path: tuple(x.shape) for path, x in flat.items() if path.startswith(prefix)}


def _replace(params: _Flat, initial: _Flat, prefix: str) -> _Flat:
    """Returns `params` with all that lies under `prefix` taken from `initial`."""
    rest = {path: x for path, x in params.items() if not path.startswith(prefix)}
    return rest | {path: x for path, x in initial.items() if path.startswith(prefix)}


def _cast(value: Any, *, like: Any) -> Any:
    return value if value is like else np.asarray(value).astype(like.dtype, copy=False)


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"


def compare_preprocess(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """A line for each way in which images are prepared otherwise than the weights expect.

    Args:
      theirs: what the weights state of it: any of `mean, std, eval`.
      ours: all of these.
    """
    keys = {"mean": "objective.pixel_mean", "std": "objective.pixel_std"}
    notes = [
        f"pixels: the weights expect {key.partition('.')[2]} {theirs[name]}, here it is "
        f"{ours[name]}: add --config.{key}={shlex.quote(str(theirs[name]))}"
        for name, key in keys.items()
        if name in theirs and not np.allclose(theirs[name], ours[name])
    ]
    if theirs.get("eval") not in (None, ours["eval"]):
        notes.append(f"evaluation images: {theirs['eval']} there, {ours['eval']} here")
    return notes
