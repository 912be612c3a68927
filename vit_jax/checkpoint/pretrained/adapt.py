# SPDX-License-Identifier: Apache-2.0
"""Fits pretrained weights to a model with another head, resolution, patch size or channels.

Any other difference is an error, since a model that is loaded in part would train all the same.
"""

import dataclasses
import functools
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vit_jax.checkpoint.pretrained.embedding import change_channels, resize_patches
from vit_jax.checkpoint.pretrained.towers import TEXT, has_towers, put_part, take_part, take_tower
from vit_jax.checkpoint.pretrained.weights import (
    OBJECTIVE_PARAMS,
    POSEMB,
    REGISTERS,
    RELATIVE,
    Weights,
    find_grid,
    stack_blocks,
    unstack_blocks,
)
from vit_jax.models.positions import FIXED_POSITIONS, fixed_positions, resize_biases, resize_posemb
from vit_jax.models.resampling import Method
from vit_jax.models.two_towers import TOWERS
from vit_jax.utils.errors import UserError
from vit_jax.utils.nested import as_tuples
from vit_jax.utils.registry import is_part
from vit_jax.utils.tree import flatten

_MAX_LISTED = 4  # parameters in one line of an error

_QKV_BIAS = re.compile(r"encoderblock_\d+/.*/(query|key|value)/bias$")

# Tokens whose position embeddings are in front of those of the patches.
_TOKENS = {"cls": "a class token", "dist": "a distillation token"}

# First convolution of a Vision Transformer, a Mixer and a hybrid; the last can't be resized.
_EMBEDDINGS = ("embedding/kernel", "stem/kernel", "conv_root/kernel")

# Arguments of models that change the function but not the shapes of parameters.
_ARGUMENTS = (
    "activation",
    "norm_epsilon",
    "resnet_epsilon",
    "resnet_norm_epsilon",
    "rope_theta",
    "rope_reference_grid",
    "rope_offset",
    "map_num_heads",
    "rope_coordinates",
    "rope_register_theta",
    "position_embedding",
    "posemb_resize",
    "posemb_keep_aspect",
    "num_heads",
    "pre_norm",
    "embedding_bias",
    "causal",
    "pooling",
    "eot_id",
)

# Arguments of models whose differences are adapted, or do not matter for the parameters.
_OTHERWISE_ADAPTED = ("num_classes", "dtype")

_Flat = dict[str, Any]  # Arrays by path, as in "head/kernel".


def adapt_params(
    weights: Weights,
    target: Mapping[str, Any],
    *,
    target_grid: tuple[int, int] | None,
    num_class_tokens: int,
    dont_load: tuple[str, ...] = (),
    posemb_resize: Method | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Fills the parameters of a model from pretrained weights.

    - The head is kept if it and `pre_logits`, its input, have the model's shapes; otherwise it is
      re-initialised.
    - `pre_logits` is dropped if only the weights have it, and initialised if only the model has it.
    - A class or distillation token that the model lacks becomes a register if the model has more
      registers than the weights; a distillation token that only the model has is initialised.
    - Position embeddings are resized if the grids differ. Learned ones start from fixed ones.
      Where neither `weights.posemb_grid` nor an image size in `weights.preprocess` fits their
      number, their grid is assumed to be square.
    - The position embedding of a class token is loaded, dropped or initialised with the token.
    - The first convolution is changed to another patch size and number of channels (`embedding`).
    - Parameters that `dont_load` names are initialised, or dropped if the model lacks them.
    - Of a model of two towers, each tower is fitted in this way. Weights of one tower alone, such
      as those of any Vision Transformer, fill that tower; everything else is initialised.
    - All other parameters must have the same path and shape on both sides.

    Args:
      weights: any float dtype.
      target: nested dict of the model's initialised parameters, arrays of any dtype.
      target_grid: (rows, columns) of patches in the model's input; None for a model without
        patches, whose position embeddings are never resized.
      num_class_tokens: tokens in front of the patches that have position embeddings.
      dont_load: regular expressions; each must match the whole path of a parameter.
      posemb_resize: how position embeddings are interpolated, see `resize_posemb`; None for the
        rule of the weights' own project.

    Returns:
      `(params, notes)`: nested dict of arrays with the paths, shapes and dtypes of `target`, and
      one line for each decision.

    Raises:
      UserError: the parameters do not fit; the message lists the first few by path.
    """
    like: _Flat = dict(traverse_util.flatten_dict(target, sep="/"))
    initial = unstack_blocks(like)
    weights, notes = _match_towers(weights, initial)
    params = dict(weights.params)
    # Each step changes `params` and returns one line for each decision.
    notes += _leave_out(params, initial, dont_load)
    fit = functools.partial(
        _fit_tower,
        target_grid=target_grid,
        num_class_tokens=num_class_tokens,
        posemb_resize=posemb_resize,
    )
    notes += (
        _fit_towers(weights, params, initial, fit)
        if has_towers(initial)
        else fit(weights, params, initial)
    )
    _check_fit(params, initial)
    fitted = {path: _cast(params[path], like=leaf) for path, leaf in initial.items()}
    fitted = stack_blocks(fitted, like=like)
    return traverse_util.unflatten_dict(fitted, sep="/"), notes


def make_blanks(shapes: Any) -> Any:
    """Returns a target for `adapt_params` that shows which parameters weights do not fill.

    Args:
      shapes: tree of arrays or shapes of any dtype.

    Returns:
      The same tree of arrays of NaN that can't be written to, float32 in place of integer types.
    """

    def blank(x: Any) -> np.ndarray:
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else np.float32
        return np.broadcast_to(np.full((), np.nan, dtype), x.shape)

    return jax.tree.map(blank, shapes)


def find_initialised(params: Any) -> list[str]:
    """Returns the paths of parameters that are, at least in part, those of `make_blanks`."""
    return [path for path, x in flatten(params).items() if np.isnan(x).any()]


def _fit_tower(
    weights: Weights,
    params: _Flat,
    initial: _Flat,
    *,
    target_grid: tuple[int, int] | None,
    num_class_tokens: int,
    posemb_resize: Method | None,
) -> list[str]:
    """Fits the parameters of a model of images; see `adapt_params`."""
    notes = [
        *_fit_slots(params, initial, weights.params),
        *_fit_tokens(params, initial),
        *_fit_biases(params, initial),
        *_fit_channels(params, initial),
        *_fit_patches(params, initial, weights.posemb_resize),
    ]
    if target_grid is not None:
        notes += _compute_posemb(weights, params, initial, target_grid, num_class_tokens)
        notes += _fit_posemb(
            params,
            initial,
            source_grids=(
                weights.posemb_grid,
                weights.model.get("posemb_grid"),
                find_grid(weights.model, weights.preprocess),
            ),
            target_grid=target_grid,
            num_class_tokens=num_class_tokens,
            method=posemb_resize or _find_rule(weights),
        )
        notes += _fit_distances(
            params,
            initial,
            source_grid=find_grid(weights.model, weights.preprocess),
            target_grid=target_grid,
        )
    head_notes = _fit_head(params, initial)
    return notes + _fit_pre_logits(params, initial) + head_notes


def _fit_biases(params: _Flat, initial: _Flat) -> list[str]:
    """Adds or removes zero biases of queries, keys and values; the function stays the same."""
    theirs, ours = (
        {match[1] for match in map(_QKV_BIAS.search, flat) if match} for flat in (params, initial)
    )
    # A file that lacks only some of them is damaged.
    missing = [p for p in initial if (m := _QKV_BIAS.search(p)) and m[1] not in theirs]
    extra = [p for p in params if (m := _QKV_BIAS.search(p)) and m[1] not in ours]
    extra = [path for path in extra if not np.any(params[path])]
    for path in missing:
        params[path] = np.zeros_like(initial[path])
    for path in extra:
        del params[path]
    found = {"none in the file: zeros": missing, "zeros in the file, none here: dropped": extra}
    return [
        f"{' and '.join(sorted({path.split('/')[-2] for path in paths}))} biases: {what}"
        for what, paths in found.items()
        if paths
    ]


def _find_rule(weights: Weights) -> Method:
    """The rule for position embeddings: that of the model, if it resizes its own in each call."""
    if weights.model.get("posemb_grid"):
        return weights.model.get("posemb_resize", weights.posemb_resize)
    return weights.posemb_resize


def _match_towers(weights: Weights, initial: _Flat) -> tuple[Weights, list[str]]:
    """Returns weights with the towers of the model, and a note where they have only one."""
    if has_towers(weights.params):
        if not has_towers(initial):
            raise UserError(
                "init_from: these weights are of an image and a text tower: name the one to take, "
                "as in FILE:img"
            )
        return weights, []
    if not has_towers(initial):
        if weights.model.get("name") == TEXT:
            raise UserError(
                "init_from: these weights are of a text tower, which only model.name='two_towers' "
                "has"
            )
        return weights, []
    part = "txt" if weights.model.get("name") == TEXT else "img"
    own = put_part(weights.params, part)
    rest = {path: x for path, x in initial.items() if not path.startswith(f"{part}/")}
    others = ", ".join(sorted({path.partition("/")[0] for path in rest}))
    model = {"name": "two_towers", TOWERS[part]: weights.model}
    weights = dataclasses.replace(weights, params=own | rest, model=model)
    return weights, [f"{part}: from the file; {others}: initialised"]


def _fit_towers(
    weights: Weights, params: _Flat, initial: _Flat, fit: Callable[..., list[str]]
) -> list[str]:
    notes = []
    for part, section in TOWERS.items():
        theirs, ours = take_part(params, part), take_part(initial, part)
        if part == "img":
            found = fit(take_tower(weights, part), theirs, ours) if section in weights.model else []
        else:
            found = _fit_head(theirs, ours)
        # Their heads project to the width of the embeddings.
        notes += [f"{part}: {note.replace(' classes', ' channels')}" for note in found]
        for path in take_part(params, part):
            del params[f"{part}/{path}"]
        params |= put_part(theirs, part)
    # The bias on the products is a part of some losses only.
    if "b" in params and "b" not in initial:
        del params["b"]
        notes.append("b: none here: dropped")
    for name in ("t", "b"):
        if name in initial and name not in params:
            params[name] = initial[name]
            notes.append(f"{name}: none in the file: initialised")
    return notes


def check_arguments(weights: Weights, model: Any) -> None:
    """Checks that a Flax module computes what the model of the weights does (`weights.model`).

    Raises:
      UserError: an argument differs; the message has the overrides that set it as in the weights.
    """
    pairs = {"": (weights.model, model)}
    if hasattr(model, "towers"):
        single = {"text" if weights.model.get("name") == TEXT else "image": weights.model}
        theirs = weights.model if weights.model.get("name") == "two_towers" else single
        pairs = {
            f"{section}.": (theirs.get(section, {}), model.towers[part])
            for part, section in TOWERS.items()
        }
    found = {
        f"{prefix}{key}": values
        for prefix, pair in pairs.items()
        for key, values in _compare_arguments(*pair).items()
    }
    if found:
        shown = ", ".join(f"{k}={theirs!r} (here {ours!r})" for k, (theirs, ours) in found.items())
        overrides = " ".join(
            f"--config.model.{k}={shlex.quote(str(theirs))}" for k, (theirs, _) in found.items()
        )
        raise UserError(
            f"init_from: these weights ({weights.layout}) belong to a model with {shown}: "
            f"add {overrides}"
        )


def _compare_arguments(theirs: Mapping[str, Any], model: Any) -> dict[str, tuple[Any, Any]]:
    """Returns their value and ours of each argument that differs."""
    both = {k: theirs[k] for k in _ARGUMENTS if k in theirs and hasattr(model, k)}
    different = {
        k: (value, getattr(model, k)) for k, value in both.items() if value != getattr(model, k)
    }
    if not (theirs.get("posemb_grid") and getattr(model, "posemb_grid", None)):
        different.pop("posemb_resize", None)  # It matters where a model resizes its own.
    fixed = theirs.get("position_embedding") in FIXED_POSITIONS
    if fixed and getattr(model, "position_embedding", None) == "learned":
        different.pop("position_embedding", None)  # Learned ones start from the fixed ones.
    return different


def compare_models(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Compares the model of weights with that of a run, if one of them is a part from outside.

    What such a model computes is known to its own code only, so no difference is an error.

    Args:
      theirs: see `Weights.model`.
      ours: the same of the run.

    Returns:
      One line for each difference in the name and in the arguments that both have.
    """
    theirs, ours = as_tuples(dict(theirs)), as_tuples(dict(ours))
    if not is_part(theirs.get("name")) and not is_part(ours["name"]):
        return []
    return [
        f"model.{key}: {theirs[key]!r} in the file, {value!r} here"
        for key, value in ours.items()
        if key not in _OTHERWISE_ADAPTED and theirs.get(key, value) != value
    ]


def fit_objective_params(
    weights: Weights, initial: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Fills the parameters of an objective from `weights.objective_params`.

    A part of which any path or shape differs stays as it was initialised.

    Args:
      weights: any float dtype.
      initial: nested dict of the objective's initialised parameters, arrays of any dtype.

    Returns:
      `(params, notes)`: nested dict with the paths, shapes and dtypes of `initial`, and one line
      for each part.
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
        note for note in describe_objective_params(weights) if note.partition(":")[0] not in initial
    ]


def describe_objective_params(weights: Weights) -> list[str]:
    """Returns one line for each part of the weights that belongs to an objective."""
    names = {path.partition("/")[0] for path in weights.objective_params}
    reasons = {name: OBJECTIVE_PARAMS.get(name, "of the objective") for name in sorted(names)}
    return [f"{name}: {reason}: dropped" for name, reason in reasons.items()]


def _leave_out(params: _Flat, initial: _Flat, dont_load: Iterable[str]) -> list[str]:
    loaded, notes = dict(params), []
    for pattern in dont_load:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"adapt.dont_load: {pattern!r} is not a regular expression: {error}"
            ) from None
        fresh = [path for path in initial if regex.fullmatch(path)]
        dropped = [path for path in loaded if regex.fullmatch(path) and path not in initial]
        if not fresh and not dropped:
            raise UserError(
                f"adapt.dont_load: {pattern!r} matches the whole path of no parameter; paths are "
                f"like {next(iter(initial))}"
            )
        for path in dropped:
            params.pop(path, None)
        params |= {path: initial[path] for path in fresh}
        notes += [f"{path}: not loaded: initialised" for path in fresh]
        notes += [f"{path}: not loaded: dropped" for path in dropped]
    return notes


def _fit_slots(params: _Flat, initial: _Flat, source: Mapping[str, Any]) -> list[str]:
    """Leaves out the position embeddings of the class tokens that `_leave_out` has left out."""
    posemb, notes = params.get(POSEMB), []
    if posemb is None or POSEMB not in initial or posemb is initial[POSEMB] or posemb.ndim != 3:
        return []
    theirs = [name for name in _TOKENS if name in source]
    for name in [name for name in theirs if name not in params]:
        posemb = np.delete(posemb, theirs.index(name), axis=1)
        theirs.remove(name)
        notes.append(f"{name}: its position embedding is dropped too")
    ours = [name for name in _TOKENS if name in initial]
    for name in [name for name in ours if name in params and name not in theirs]:
        slot = ours.index(name)
        posemb = np.insert(posemb, [slot], np.asarray(initial[POSEMB])[:, slot : slot + 1], axis=1)
        theirs.insert(slot, name)
        notes.append(f"{name}: its position embedding is initialised too")
    params[POSEMB] = posemb
    return notes


def _fit_tokens(params: _Flat, initial: _Flat) -> list[str]:
    notes = []
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
            _replace(params, {}, "head_dist/")
            notes.append("head_dist: none here: dropped; the file is meant to average both heads")
    if "dist" in initial and "dist" not in params and "cls" in params:
        params["dist"] = initial["dist"]
        if POSEMB in params and POSEMB in initial:
            slot = np.asarray(initial[POSEMB])[:, 1:2]
            params[POSEMB] = np.insert(params[POSEMB], [1], slot, axis=1)
        notes.append("dist: none in the file: initialised")
    return notes


def _compute_posemb(
    weights: Weights,
    params: _Flat,
    initial: _Flat,
    target_grid: tuple[int, int],
    num_class_tokens: int,
) -> list[str]:
    if POSEMB in params or POSEMB not in initial:
        return []
    kind, width = weights.model.get("position_embedding"), initial[POSEMB].shape[-1]
    fixed = fixed_positions(kind, target_grid, width)
    if fixed is None:
        return []
    params[POSEMB] = np.pad(fixed, ((0, 0), (num_class_tokens, 0), (0, 0)))
    return [f"position embeddings: learned here, from {kind} on"]


def _fit_channels(params: _Flat, initial: _Flat) -> list[str]:
    path, theirs, ours = _find_embedding(params, initial)
    if len(theirs) != 4 or len(ours) != 4 or theirs[2] == ours[2] or theirs[3] != ours[3]:
        return []
    params[path] = change_channels(np.asarray(params[path]), ours[2])
    how = "summed" if ours[2] == 1 else "repeated and scaled"
    return [f"{path}: {theirs[2]} input channels in the file, {ours[2]} here: {how}"]


def _fit_patches(params: _Flat, initial: _Flat, posemb_resize: Method) -> list[str]:
    path, theirs, ours = _find_embedding(params, initial)
    if len(theirs) != 4 or path == "conv_root/kernel" or theirs[:2] == ours[:2]:
        return []
    if theirs[2:] != ours[2:]:
        return []
    # timm resizes kernels by the rule that it has for position embeddings.
    method: Method = "bicubic" if posemb_resize == "bicubic" else "bilinear_half_pixel"
    params[path] = resize_patches(np.asarray(params[path]), (ours[0], ours[1]), method=method)
    how = f"pseudo-inverse{', bicubic' if method == 'bicubic' else ''}"
    return [f"{path}: patches resized from {_by(theirs)} to {_by(ours)} pixels ({how})"]


def _find_embedding(params: _Flat, initial: _Flat) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    for path in reversed(_EMBEDDINGS):  # In a hybrid, the root convolution reads the image.
        if path in params and path in initial:
            return path, tuple(params[path].shape), tuple(initial[path].shape)
    return "", (), ()


def _fit_posemb(
    params: _Flat,
    initial: _Flat,
    *,
    source_grids: Iterable[tuple[int, int] | None],
    target_grid: tuple[int, int],
    num_class_tokens: int,
    method: Method,
) -> list[str]:
    theirs, ours = (_shapes(flat, POSEMB).get(POSEMB, ()) for flat in (params, initial))
    # Only the number of tokens can be changed; _check_fit reports other differences.
    if len(theirs) != 3 or theirs[::2] != ours[::2]:
        return []
    tokens = [[name for name in _TOKENS if name in flat] for flat in (params, initial)]
    if len(tokens[0]) != len(tokens[1]):
        given, own = (" and ".join(_TOKENS[name] for name in names) for names in tokens)
        key = "distillation_token" if "dist" in tokens[0] + tokens[1] else "classifier"
        raise UserError(
            f"init_from: the file has {given or 'no class token'}, and the model "
            f"{own or 'none'}: set model.{key} as in the file"
        )
    num_patches = theirs[1] - num_class_tokens
    stated = [grid for grid in source_grids if grid and math.prod(grid) == num_patches]
    side = math.isqrt(max(num_patches, 0))
    if not stated and theirs == ours and side**2 != num_patches:
        return [
            f"position embeddings: nothing states their grid; {_by(target_grid)}, as here, is "
            "assumed"
        ]
    source_grid = stated[0] if stated else (side, side)
    if source_grid == target_grid and theirs == ours:
        return []
    if not num_patches or math.prod(source_grid) != num_patches:
        raise UserError(
            f"init_from: {theirs[1]} position embeddings in the file, less {num_class_tokens} "
            "for class tokens, are not a square grid, and nothing states another one; set "
            "model.classifier as in the file, or posemb.grid in the .json beside a .npz"
        )
    params[POSEMB] = resize_posemb(
        _cast(params[POSEMB], like=initial[POSEMB]),  # bfloat16 in the file would be rounded again.
        source_grid=source_grid,
        target_grid=target_grid,
        num_prefix_tokens=num_class_tokens,
        method=method,
    )
    return [f"position embeddings: resized from {_by(source_grid)} to {_by(target_grid)}, {method}"]


def _fit_distances(
    params: _Flat,
    initial: _Flat,
    *,
    source_grid: tuple[int, int] | None,
    target_grid: tuple[int, int],
) -> list[str]:
    """Resizes biases by distance; `source_grid` is that of the images of the file, if known."""
    paths = [p for p in params if p.endswith(f"/{RELATIVE}") and p in initial]
    paths = [p for p in paths if params[p] is not initial[p]]
    if not paths:
        return []
    length = len(params[paths[0]])
    if source_grid is None or _count_distances(source_grid) != length:
        # An odd number of distances in each direction, and three more.
        side = math.isqrt(max(length - 3, 0))
        source_grid = (side + 1) // 2, (side + 1) // 2
        if _count_distances(source_grid) != length:
            raise UserError(
                f"init_from: {paths[0]} has {length} biases by distance, which are those of no "
                "square of patches, and nothing states another: give the size of the images in "
                "pretrained_cfg.input_size of the config.json beside it, or in the .json of a .npz"
            )
    if source_grid == target_grid:
        return []
    for path in paths:
        params[path] = resize_biases(
            _cast(params[path], like=initial[path]),
            source_grid=source_grid,
            target_grid=target_grid,
        )
    return [f"relative positions: resized from {_by(source_grid)} to {_by(target_grid)} patches"]


def _count_distances(grid: tuple[int, int]) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def _fit_head(params: _Flat, initial: _Flat) -> list[str]:
    notes = _fit_first_head(params, initial)
    if _shapes(params, "head_dist/") == _shapes(initial, "head_dist/"):
        return notes
    what = "another one here" if "head_dist/kernel" in params else "none in the file"
    what = f"{what}: initialised" if "head_dist/kernel" in initial else "none here: dropped"
    _replace(params, initial, "head_dist/")
    return [*notes, f"head_dist: {what}"]


def _fit_first_head(params: _Flat, initial: _Flat) -> list[str]:
    same_input = _shapes(params, "pre_logits/") == _shapes(initial, "pre_logits/")
    if same_input and _shapes(params, "head/") == _shapes(initial, "head/"):
        if "head/kernel" not in params:
            return []
        if params["head/kernel"] is initial["head/kernel"]:
            return []  # It was left out by `dont_load`.
        if not np.any(params["head/kernel"]):
            return ["head: the kernel in the file is all zero: it was published untrained"]
        return [f"head: kept, {params['head/kernel'].shape[-1]} classes"]
    note = _describe_new_head(params, initial)
    _replace(params, initial, "head/")
    return [note]


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


def _fit_pre_logits(params: _Flat, initial: _Flat) -> list[str]:
    theirs, ours = _shapes(params, "pre_logits/"), _shapes(initial, "pre_logits/")
    if bool(theirs) != bool(ours):
        _replace(params, initial, "pre_logits/")
        what = "none here: dropped" if theirs else "none in the file: initialised"
        return [f"pre_logits: {what}"]
    if not theirs or params["pre_logits/kernel"] is initial["pre_logits/kernel"]:
        return []
    return [f"pre_logits: kept, width {theirs['pre_logits/kernel'][-1]}"]


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
            f"{f'; and {more} more' if more > 0 else ''}: set model to that of the file, or list "
            "in adapt.dont_load the parameters to initialise"
        )


def _shapes(flat: _Flat, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {path: tuple(x.shape) for path, x in flat.items() if path.startswith(prefix)}


def _replace(params: _Flat, initial: _Flat, prefix: str) -> None:
    """Takes all paths of `params` under `prefix` from `initial`."""
    for path in _shapes(params, prefix):
        del params[path]
    params |= {path: initial[path] for path in _shapes(initial, prefix)}


def _cast(value: Any, *, like: Any) -> Any:
    return value if value is like else np.asarray(value).astype(like.dtype, copy=False)


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"


def compare_preprocess(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Returns one line for each difference between the preprocessing of weights and of a run.

    `ours` has `mean`, `std` and `eval`, which may be None, and `theirs` those that are known; see
    `Weights.preprocess`.
    """
    keys = {"mean": "objective.pixel_mean", "std": "objective.pixel_std"}
    notes = [
        f"pixels: the weights expect {key.partition('.')[2]} {theirs[name]}, here it is "
        f"{ours[name]}: add --config.{key}={shlex.quote(str(theirs[name]))}"
        for name, key in keys.items()
        if name in theirs and not np.allclose(theirs[name], ours[name])
    ]
    if None not in (theirs.get("eval"), ours["eval"]) and theirs["eval"] != ours["eval"]:
        notes.append(f"evaluation images: {theirs['eval']} there, {ours['eval']} here")
    return notes
