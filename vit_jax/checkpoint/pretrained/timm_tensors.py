# SPDX-License-Identifier: Apache-2.0
"""Converts tensors of timm's Vision Transformers to the parameters of this package and back.

Kernels are transposed and fused projections split, so values stay equal to the last bit; only a
token and its position embedding are added where they become one. Tensors without a place in the
models of this package keep their names.

Source: timm 1.0.31, `models/vision_transformer.py`, `vision_transformer_hybrid.py`, `eva.py` and
`deit.py`.
"""

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.checkpoint.pretrained.weights import (
    FREQUENCIES,
    POSEMB,
    REGISTERS,
    RELATIVE,
    infer_model,
)
from vit_jax.models.positions import FIXED_POSITIONS, fixed_positions
from vit_jax.models.resnet import total_stride
from vit_jax.models.variants import SIZES

_Arrays = dict[str, np.ndarray]

# Not of g-opt, whose width DINOv2's giant has too, with other heads.
_HEADS_BY_WIDTH = {width: heads for name, (width, _, _, heads) in SIZES.items() if name != "g-opt"}
_ATTENTION = ("query", "key", "value")
# Those of them that have a bias, by `model.qkv_bias`.
_BIASED = {"all": _ATTENTION, "query_value": ("query", "value"), "none": ()}
# Paths of kernels that join the heads, and of what rotary embeddings turn.
_OUTPUT = re.compile(r"MultiHeadDotProductAttention_0/out/kernel$")
_ROTATED = re.compile(
    r"Transformer/encoderblock_\d+/MultiHeadDotProductAttention_0/(query|key)(_norm)?/"
)
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_UNIT = re.compile(r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.")

# The arithmetic of its ResNets. That of the project that published the weights is the default of
# `VisionTransformer`; logits differ in the fourth digit.
TIMM_RESNET = {"resnet_epsilon": 1e-8, "resnet_norm_epsilon": 1e-5}

# Names that mean the same in other classes and releases.
_SYNONYMS = (
    (re.compile(r"^register_tokens$"), "reg_token"),
    (re.compile(r"^(blocks\.\d+)\.gamma_(\d)$"), r"\1.ls\2.gamma"),
    (re.compile(r"^(blocks\.\d+\.mlp)\.w12\."), r"\1.fc1."),
    (re.compile(r"^(blocks\.\d+\.mlp)\.w1\."), r"\1.fc1_g."),
    (re.compile(r"^(blocks\.\d+\.mlp)\.w2\."), r"\1.fc1_x."),
    (re.compile(r"^(blocks\.\d+\.mlp)\.w3\."), r"\1.fc2."),
    (re.compile(r"^patch_embed\.backbone\.(conv|norm)\."), r"patch_embed.backbone.stem.\1."),
)
# Parts that are one tensor in `VisionTransformer`: first the parts, then the whole.
_FUSED = (
    (("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"), "attn.qkv.weight"),
    (("attn.q_proj.bias", "attn.k_proj.bias", "attn.v_proj.bias"), "attn.qkv.bias"),
    (("attn.q_bias", "attn.k_bias", "attn.v_bias"), "attn.qkv.bias"),
    (("mlp.fc1_g.weight", "mlp.fc1_x.weight"), "mlp.fc1.weight"),
    (("mlp.fc1_g.bias", "mlp.fc1_x.bias"), "mlp.fc1.bias"),
)
# Linear layers of a block; those of a group are only found together.
_LINEAR = (
    ("attn.qkv",),
    ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    ("attn.proj",),
    ("mlp.fc1",),
    ("mlp.fc1_g", "mlp.fc1_x"),
    ("mlp.fc2",),
)
_SEPARATE_BIASES = _FUSED[2][0]
# Biases that no block of some models has: those of keys (`Eva`, `Beit`), those of queries, keys and
# values (`qkv_bias=False`), and those of all other layers (`proj_bias=False`).
_UNBIASED = (
    {"attn.k_proj.bias", "attn.k_bias"},
    {"attn.qkv.bias", *_FUSED[1][0], *_SEPARATE_BIASES},
    {"attn.proj.bias", "mlp.fc1.bias", "mlp.fc1_g.bias", "mlp.fc1_x.bias", "mlp.fc2.bias"},
)
# Layers outside of the blocks that have a bias wherever they have a weight.
_BIASED_LAYERS = (
    *("head", "head_dist", "pre_logits.fc", "attn_pool.q", "attn_pool.kv", "attn_pool.proj"),
    *("attn_pool.mlp.fc1", "attn_pool.mlp.fc2"),
)
# Tensors that no model of this package has, and why that does not matter.
_DROPPED = {
    "decoder_": "only for pre-training: dropped",
    "decoder.": "only for pre-training: dropped",
}


def _infer_num_heads(tensors: Mapping[str, np.ndarray]) -> int:
    """Returns the number of attention heads that tensors show, or that is usual for the width."""
    width = tensors["patch_embed.proj.weight"].shape[0]
    if "blocks.0.attn.q_norm.weight" in tensors:  # One for each channel of a head.
        return width // tensors["blocks.0.attn.q_norm.weight"].size
    if width in _HEADS_BY_WIDTH:
        return _HEADS_BY_WIDTH[width]
    if width % 64:
        raise ValueError(
            f"nothing states how many heads share the width of {width}; give model.num_heads"
        )
    return width // 64


def pop_mask_token(tensors: dict[str, np.ndarray]) -> _Arrays:
    """Removes the mask token of a backbone; returns it as a parameter of an objective, or nothing.

    It is `[1, 1, width]` there, and in files also `[1, width]`.
    """
    token = tensors.pop("mask_token", None)
    return {} if token is None else {"mask_token": token.reshape(1, 1, -1)}


def to_linen(
    tensors: Mapping[str, np.ndarray],
    *,
    num_heads: int | None,
    num_slots: int,
    pool_heads: int | None = None,
    average: bool = False,
    swap_axes: bool = False,
    halves: bool = False,
    fill_biases: bool = True,
    unbiased: Collection[str] | None = None,
    spell: Callable[[str], str] = str,
) -> tuple[_Arrays, list[str]]:
    """Converts the tensors of a `VisionTransformer` of timm, or of a class with synonyms.

    Args:
      tensors: arrays of any float dtype by name.
      num_heads: attention heads, which the shape of a fused projection does not show; None for
        the usual number for the width.
      pool_heads: heads of attention pooling; None for `num_heads`.
      num_slots: position embeddings in front of those of the patches, see `find_positions`.
      average: whether the mean over patches, or attention pooling, is classified instead of the
        class token, which then becomes a register.
      swap_axes: whether rotary embeddings turn the first half of a head's channels with the column
        instead of the row; the halves of queries and keys are then swapped.
      halves: whether rotary embeddings turn channel i with i + half, as those of DINOv3, instead
        of pairs of neighbours; the channels of queries and keys are then put in that order.
      fill_biases: whether projections of queries, keys and values that have no bias get one of
        zeros; else those whose biases are all zero in all blocks get none.
      unbiased: biases that the blocks do not have, such as `attn.proj.bias`; None for those that
        are absent in all blocks, if timm has models without these.
      spell: returns the name in the file of a tensor, which may be absent, for errors.

    Returns:
      `(params, notes)`: arrays in the dtypes of `tensors` by path, and one line for each difference
      from the file.

    Raises:
      ValueError: a tensor is missing or does not have the shape that its name implies, or there is
        no usual number of heads.
    """
    rest = _rename_synonyms(tensors)
    _check_whole(rest, unbiased, spell)
    rest = _join_parts(rest, spell)
    params: _Arrays = {}
    notes = []
    if num_heads is None:
        num_heads = _infer_num_heads(rest)
    width = rest["patch_embed.proj.weight"].shape[0]
    if type(num_heads) is not int or num_heads < 1 or width % num_heads:
        raise ValueError(
            f"{num_heads!r} attention heads do not divide the width of {width}: correct num_heads "
            "of timm, or num_attention_heads of Hugging Face, in config.json"
        )
    if average:
        notes.append("cls: kept as a register, since it is not what is classified")
    for prefix, reason in _DROPPED.items():
        names = [name for name in rest if name.startswith(prefix)]
        notes += [f"{prefix.rstrip('._')}: {reason}"] if names else []
        for name in names:
            del rest[name]
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        if name in rest and (rest[name].ndim != 3 or rest[name].shape[::2] != (1, width)):
            shape = list(rest[name].shape)
            raise ValueError(f"{spell(name)} is {shape}: expected [1, length, {width}]")
    _read_tokens(rest, params, num_slots=num_slots, average=average)
    layers = _count_layers(rest)
    _split_gates(rest, layers, spell)
    for theirs, ours, names in _projections(layers, pooled="attn_pool.latent" in rest):
        heads = num_heads if ours.startswith("Transformer/") else pool_heads or num_heads
        _read_heads(rest, theirs, params, ours, names, heads, spell)
        out = f"{theirs.rpartition('.')[0]}.proj.weight"
        if out in rest:
            _check_shape(out, rest[out], (width, width), spell)
    for theirs, ours in _modules(layers, _count_units(rest)):
        _read_module(rest, theirs, params, ours)
    for theirs, ours in _tensors(layers):
        if theirs in rest:
            params[ours] = rest.pop(theirs)
    mixed = any(path.endswith(f"/{FREQUENCIES}") for path in params)
    for path, x in params.items():
        if _OUTPUT.search(path):
            heads = num_heads if path.startswith("Transformer/") else pool_heads or num_heads
            params[path] = x.reshape(heads, -1, x.shape[1])
        elif swap_axes and path.endswith(f"/{FREQUENCIES}"):
            params[path] = x[::-1]
        elif swap_axes and not mixed and _ROTATED.match(path):
            params[path] = np.roll(x, x.shape[-1] // 2, axis=-1)
        elif halves and _ROTATED.match(path):
            params[path] = _interleave(x)
    if not fill_biases:
        _leave_out_biases(params)
    return params | rest, notes


def _interleave(x: np.ndarray) -> np.ndarray:
    """Puts channel i + half behind channel i; the inverse of `_separate`."""
    return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


def _separate(x: np.ndarray) -> np.ndarray:
    """Puts the second channels of all pairs of neighbours behind the first ones."""
    return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)


def _leave_out_biases(params: _Arrays) -> None:
    """Removes zero biases of keys in the blocks, and those of queries and values if all are."""
    for names in ("key", "query|value"):
        paths = [
            path for path in params if re.search(rf"encoderblock_\d+/.*/({names})/bias$", path)
        ]
        if any(params[path].any() for path in paths):
            return
        for path in paths:
            del params[path]


def to_timm(
    params: Mapping[str, np.ndarray], *, model: Mapping[str, Any], grid: tuple[int, int] | None
) -> _Arrays:
    """Converts parameters to tensors of timm's `VisionTransformer`, `Eva` or `Beit`.

    `Eva` has rotary embeddings, and `Beit` biases by distance.

    With registers, the position embedding of the class token is added to the token (timm's
    `no_embed_class`): the parameters change, the function is the same to the last bit. Fixed
    position embeddings are written as learned ones. `Eva` gets `q_bias` and `v_bias` if all biases
    of keys are zero or absent, else `qkv.bias` (its `attn_type="rope"`). With centred coordinates
    the channels of queries and keys are in the order of DINOv3. With `columns_first` they, or
    learned frequencies, are in the order of `rope_grid_indexing="xy"`; see `has_unused_token` too.

    Args:
      params: arrays of any float dtype by path; blocks are not stacked.
      model: arguments of the model; others are inferred from the parameters.
      grid: (rows, columns) of patches, needed for fixed position embeddings.

    Returns:
      Arrays in the dtypes of `params` by timm's names.

    Raises:
      ValueError: timm has no such model.
    """
    model = {**infer_model(params), **model}
    _check_expressible(model, grid)
    units = model.get("resnet_layers")
    is_centered = model.get("rope_coordinates") == "centered"
    is_beit, swap_axes = model.get("position_embedding") == "relative", columns_first(model)
    mixed = model.get("rope_frequencies") == "mixed"
    rest = dict(params)
    if has_unused_token(model):
        rest["cls"], rest[REGISTERS] = np.split(rest[REGISTERS], [1], axis=1)
        if not rest[REGISTERS].size:
            del rest[REGISTERS]
    tensors: _Arrays = {}
    _write_tokens(rest, tensors, model=model, grid=grid)
    layers = model["num_layers"]
    split_gates = is_centered or is_beit or bool(model.get("mlp_norm"))
    if not split_gates:
        _join_gates(rest, layers)
    for path, x in rest.items():
        if _OUTPUT.search(path):
            rest[path] = x.reshape(-1, x.shape[-1])
        elif is_centered and _ROTATED.match(path):
            rest[path] = _separate(x)
        elif swap_axes and path.endswith(f"/{FREQUENCIES}"):
            rest[path] = x[::-1]
        elif swap_axes and not mixed and _ROTATED.match(path):
            rest[path] = np.roll(x, x.shape[-1] // 2, axis=-1)
    biased_in_blocks = _BIASED[model.get("qkv_bias", "all")]
    for theirs, ours, names in _projections(layers, pooled="MAPHead_0/probe" in rest):
        biased = names if theirs.startswith("attn_pool") else biased_in_blocks
        _write_heads(rest, ours, tensors, theirs, names, biased=biased)
    for theirs, ours in _modules(layers, units or ()):
        _write_module(rest, ours, tensors, theirs)
    for theirs, ours in _tensors(layers):
        if ours in rest:
            tensors[theirs] = rest.pop(ours)
    if units is not None and not units:  # timm has no level "stem" then.
        tensors = {n.replace("backbone.stem.", "backbone."): x for n, x in tensors.items()}
    if is_beit or model.get("rope_theta") is not None:
        tensors = _rename_for_eva(tensors)
    if is_beit and "blocks.0.attn.qkv.bias" in tensors:
        raise ValueError(
            "timm's model with relative positions has no biases of keys, and these are not zero: "
            "train with model.qkv_bias='query_value', or write a .npz, which holds any model"
        )
    if mixed:
        names = [f"blocks.{i}.attn.freqs" for i in range(layers)]
        tensors["rope.freqs"] = np.stack([tensors.pop(name) for name in names], axis=1)
    if split_gates:
        gate = re.compile(r"\.mlp\.gate\.")
        gated = {n[: n.rindex(".gate.")] for n in tensors if gate.search(n)}
        tensors = {
            gate.sub(".mlp.fc1_g.", n).replace(".fc1.", ".fc1_x.")
            if n[: n.rfind(".mlp.") + 4] in gated
            else n: x
            for n, x in tensors.items()
        }
    if rest:
        raise ValueError(f"timm has no place for {', '.join(sorted(rest)[:4])}")
    return tensors


def columns_first(model: Mapping[str, Any]) -> bool:
    """Whether timm's rotary embeddings turn with the column first, as in models like this one."""
    return model.get("rope_frequencies") == "mixed" or bool(model.get("rope_offset"))


def has_unused_token(model: Mapping[str, Any]) -> bool:
    """Whether the first register is the class token of timm's model, which it does not classify."""
    like_timm = model.get("position_embedding") == "relative" or columns_first(model)
    pooled = model["classifier"] in ("gap", "map")
    return like_timm and pooled and bool(model.get("num_registers"))


def find_positions(
    tensors: Mapping[str, np.ndarray],
    *,
    image_size: tuple[int, int] | None,
    candidates: Sequence[int],
    usual: int | None,
    key: str,
) -> tuple[int, tuple[int, int] | None, list[str]]:
    """Finds which position embeddings belong to tokens, and the grid of those of the patches.

    Their number alone does not show it: 25 may be a class token and 4x6 patches, or 5x5 patches.

    Args:
      tensors: arrays by the names of timm.
      image_size: (height, width) in pixels for which the embeddings are, if anything states it.
      candidates: the numbers of embeddings in front of those of the patches that the model's class
        allows.
      usual: the one of these that is taken where the size is unknown, if it leaves a square grid;
        None for none.
      key: what states the size and where, for the error.

    Returns:
      `(num_slots, grid, notes)`: see `to_linen`; (rows, columns) of patches, None without position
      embeddings; and a line if the grid is an assumption.

    Raises:
      ValueError: it can't be known.
    """
    if "pos_embed" not in tensors:
        return 0, None, []
    posemb = tensors["pos_embed"]
    if posemb.ndim != 3:
        raise ValueError(f"pos_embed is {list(posemb.shape)}; expected [1, length, width]")
    length = posemb.shape[1]
    if image_size is not None:
        rows, columns = _find_stride(tensors)
        grid = image_size[0] // rows, image_size[1] // columns
        if (slots := length - math.prod(grid)) in candidates:
            return slots, grid, []
        why = f"{key} is {image_size[0]}x{image_size[1]}, which makes {grid[0]}x{grid[1]} patches"
    else:
        why = "nothing states the size of the images"
        side = 0 if usual is None else math.isqrt(max(length - usual, 0))
        if usual is not None and side and usual + side**2 == length:
            note = f"position embeddings: taken as those of a square, {side}x{side} patches; {why}"
            return usual, (side, side), [note]
    slots = " or ".join(map(str, dict.fromkeys(candidates)))
    raise ValueError(
        f"the grid of its {length} position embeddings, {slots} of them for tokens, is not known: "
        f"{why}; set {key} to the size that they are for"
    )


def _find_stride(tensors: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Returns (height, width) of a patch in pixels of the image."""
    height, width = tensors["patch_embed.proj.weight"].shape[2:]
    hybrid = any(name.startswith("patch_embed.backbone.") for name in tensors)
    shrink = total_stride(tuple(_count_units(tensors))) if hybrid else 1
    return height * shrink, width * shrink


def _check_expressible(model: Mapping[str, Any], grid: tuple[int, int] | None) -> None:
    rope = model.get("rope_theta") is not None
    if model.get("name") != "vit":
        raise ValueError("no Vision Transformer; only these have a layout of timm here")
    if model.get("representation_size") is not None:
        raise ValueError("timm has no pre_logits; fine-tune with model.representation_size=None")
    if model.get("distillation_token") and model.get("num_registers"):
        raise ValueError("timm has no model with both a distillation token and registers")
    if model["classifier"] == "token_gap":
        raise ValueError(
            "timm has no head on the class token and the mean over patches "
            "(model.classifier='token_gap'); a .npz holds it"
        )
    if model.get("head_bias") is False:
        raise ValueError("timm's head has a bias, and this one has none; a .npz holds it")
    if bool(model.get("pre_norm")) == model.get("embedding_bias", True):
        raise ValueError(
            "timm has either a bias of the patches (model.embedding_bias) or a norm in front of "
            "the blocks (model.pre_norm); a .npz holds any model"
        )
    is_beit = model.get("position_embedding") == "relative"
    activation = model.get("activation", "gelu_tanh")
    if (rope or is_beit) and activation not in ("gelu_erf", "swiglu"):
        what = "relative positions" if is_beit else "rotary embeddings"
        raise ValueError(
            f"timm's model with {what} computes exact GELU, and not {activation}; train with "
            "model.activation='gelu_erf' or 'swiglu'"
        )
    if is_beit:
        _check_beit(model)
    of_eva = ("rope_offset", "map_num_heads", "map_mlp_dim")
    for key in ("rope_register_theta", "untied_norm", *(() if rope else of_eva)):
        if model.get(key):
            raise ValueError(f"timm has no model with model.{key}={model[key]}; a .npz holds it")
    if rope and model.get("resnet_layers") is not None:
        raise ValueError("timm has no hybrid with rotary embeddings (model.rope_theta)")
    if model["classifier"] == "map" and model.get("activation") == "swiglu":
        raise ValueError("timm's attention pooling has no SwiGLU; set model.classifier='gap'")
    if model.get("position_embedding") in FIXED_POSITIONS and grid is None:
        raise ValueError("fixed position embeddings depend on preprocess.image_size: give it")


def _check_beit(model: Mapping[str, Any]) -> None:
    """Refuses what timm's class `Beit`, the one with biases by distance, does not have."""
    gap = model["classifier"] == "gap"
    wrong = {
        "classifier": not gap and model["classifier"] not in ("token", "token_unpooled"),
        "norm_after_pooling": bool(model.get("norm_after_pooling")) != gap,
        "num_registers": (model.get("num_registers") or 0) != int(gap),
        "norm": model.get("norm") == "rms_norm",
        "rope_theta": model.get("rope_theta") is not None,
    }
    keys = ("qk_norm", "attention_norm", "pre_norm", "distillation_token", "resnet_layers")
    wrong |= {key: model.get(key) not in (None, False) for key in keys}
    wrong["qkv_bias"] = model.get("qkv_bias") == "none"
    if key := next((key for key, value in wrong.items() if value), None):
        raise ValueError(
            "timm's model with relative positions (model.position_embedding='relative') has a "
            "class token that is classified, or one register and the mean over patches with the "
            f"norm behind it, and not model.{key}={model.get(key)}; a .npz holds it"
        )


def _rename_synonyms(tensors: Mapping[str, np.ndarray]) -> _Arrays:
    """Renames synonyms as in `VisionTransformer`."""
    renamed = {}
    for name, x in tensors.items():
        for pattern, replacement in _SYNONYMS:
            name = pattern.sub(replacement, name)
        renamed[name] = x
    return renamed


def _check_whole(
    tensors: Mapping[str, np.ndarray], unbiased: Collection[str] | None, spell: Callable[[str], str]
) -> None:
    """Refuses linear layers that lack a weight, or a bias that such a model has.

    Zeros would take the place of such a tensor, or a model without it that of the model.
    """
    layers = _count_layers(tensors)
    found = {name[match.end() :] for name in tensors if (match := _BLOCK.match(name))}
    kinds = ("weight", "bias")
    expected = [
        f"{layer}.{kind}"
        for group in _LINEAR
        if any(f"{layer}.{kind}" in found for layer in group for kind in kinds)
        for layer in group
        for kind in kinds
    ]
    if found & set(_SEPARATE_BIASES):
        expected = [x for x in expected if x != "attn.qkv.bias"] + list(_SEPARATE_BIASES)
    if unbiased is None:
        absent = set(expected) - found
        unbiased = {x for group in _UNBIASED if group & set(expected) <= absent for x in group}
    wanted = [f"blocks.{i}.{x}" for i in range(layers) for x in expected if x not in unbiased]
    wanted += [f"{layer}.bias" for layer in _BIASED_LAYERS if f"{layer}.weight" in tensors]
    if "norm_pre.weight" not in tensors:  # It has biases itself.
        wanted.append("patch_embed.proj.bias")
    require(tensors, wanted, spell)
    for name in (f"blocks.{i}.{x}" for i in range(layers) for x in expected):
        axes = 2 if name.endswith("weight") else 1
        if name in tensors and tensors[name].ndim != axes:
            shape = list(tensors[name].shape)
            raise ValueError(f"{spell(name)} is {shape}: expected {axes} axes")


def require(
    tensors: Collection[str], wanted: Collection[str], spell: Callable[[str], str] = str
) -> None:
    """Raises `ValueError` if one of the wanted names is not among those of the tensors."""
    missing = [spell(name) for name in wanted if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more tensors are" if missing[1:] else " is"
        raise ValueError(f"{missing[0]}{more} missing")


def _check_shape(
    name: str, x: np.ndarray, expected: tuple[int, ...], spell: Callable[[str], str]
) -> None:
    if x.shape != expected:
        raise ValueError(f"{spell(name)} is {list(x.shape)}: expected {list(expected)}")


def _join_parts(tensors: Mapping[str, np.ndarray], spell: Callable[[str], str]) -> _Arrays:
    """Fuses tensors that `VisionTransformer` has fused; a bias that is absent becomes zeros."""
    joined = dict(tensors)
    width = joined["patch_embed.proj.weight"].shape[0]
    for i in range(_count_layers(joined)):
        for parts, whole in _FUSED:
            names = [f"blocks.{i}.{part}" for part in parts]
            found = {name: joined.pop(name) for name in names if name in joined}
            if not found:
                continue
            like = next(iter(found.values()))
            square = (width,) * (2 if whole.endswith("weight") else 1)
            expected = square if whole.startswith("attn.") else like.shape
            for name, x in found.items():
                _check_shape(name, x, expected, spell)
            arrays = [found.get(name, np.zeros_like(like)) for name in names]
            joined[f"blocks.{i}.{whole}"] = np.concatenate(arrays)
        # An index that follows from the grid, in files of older releases.
        joined.pop(f"blocks.{i}.attn.relative_position_index", None)
    _split_frequencies(joined)
    return joined


def _split_frequencies(tensors: _Arrays) -> None:
    """Gives each block its frequencies of rotary embeddings, `[2, heads, pairs]`."""
    frequencies = tensors.pop("rope.freqs", None)
    if frequencies is None:
        return
    layers = _count_layers(tensors)
    if frequencies.ndim != 4 or frequencies.shape[:2] != (2, layers):
        raise ValueError(
            f"rope.freqs is {list(frequencies.shape)}: expected [2, {layers}, heads, pairs]"
        )
    for i in range(layers):
        tensors[f"blocks.{i}.attn.freqs"] = frequencies[:, i]


def _count_layers(tensors: Mapping[str, Any]) -> int:
    return 1 + max((int(m[1]) for m in map(_BLOCK.match, tensors) if m), default=-1)


def _count_units(tensors: Mapping[str, Any]) -> list[int]:
    """Returns the number of units in each stage of a ResNet in front of the patches."""
    found = [(int(m[1]), int(m[2])) for m in map(_UNIT.match, tensors) if m]
    stages = 1 + max((stage for stage, _ in found), default=-1)
    return [
        1 + max((unit for s, unit in found if s == stage), default=-1) for stage in range(stages)
    ]


def _projections(layers: int, *, pooled: bool) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Yields timm's module, our attention, and the projections of it that the module computes."""
    for i in range(layers):
        ours = f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0"
        yield f"blocks.{i}.attn.qkv", ours, _ATTENTION
    if pooled:
        yield "attn_pool.q", "MAPHead_0/MultiHeadDotProductAttention_0", _ATTENTION[:1]
        yield "attn_pool.kv", "MAPHead_0/MultiHeadDotProductAttention_0", _ATTENTION[1:]


def _tensors(layers: int) -> Iterator[tuple[str, str]]:
    """Yields (timm's, ours) of all tensors that differ in name only."""
    for i in range(layers):
        ours = f"Transformer/encoderblock_{i}"
        yield f"blocks.{i}.ls1.gamma", f"{ours}/LayerScale_0/scale"
        yield f"blocks.{i}.ls2.gamma", f"{ours}/LayerScale_1/scale"
        attention = f"{ours}/MultiHeadDotProductAttention_0"
        yield f"blocks.{i}.attn.relative_position_bias_table", f"{attention}/{RELATIVE}"
        yield f"blocks.{i}.attn.freqs", f"{attention}/{FREQUENCIES}"
    yield "attn_pool.latent", "MAPHead_0/probe"


def _modules(layers: int, units: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Yields (timm's, ours) of all modules whose parameters differ in name and layout only."""
    yield "patch_embed.proj", "embedding"
    for i in range(layers):
        theirs, ours = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{ours}/MultiHeadDotProductAttention_0"
        yield f"{theirs}.attn.proj", f"{attention}/out"
        yield f"{theirs}.attn.q_norm", f"{attention}/query_norm"
        yield f"{theirs}.attn.k_norm", f"{attention}/key_norm"
        yield f"{theirs}.attn.norm", f"{attention}/norm"
        yield f"{theirs}.mlp.norm", f"{ours}/MlpBlock_0/norm"
        yield f"{theirs}.mlp.gate", f"{ours}/MlpBlock_0/gate"
        yield f"{theirs}.norm1", f"{ours}/LayerNorm_0"
        yield f"{theirs}.norm2", f"{ours}/LayerNorm_1"
        yield f"{theirs}.mlp.fc1", f"{ours}/MlpBlock_0/Dense_0"
        yield f"{theirs}.mlp.fc2", f"{ours}/MlpBlock_0/Dense_1"
    yield "norm_pre", "Transformer/pre_norm"
    yield "norm", "Transformer/encoder_norm"
    yield "cls_norm", "Transformer/prefix_norm"
    yield "attn_pool.proj", "MAPHead_0/MultiHeadDotProductAttention_0/out"
    yield "attn_pool.norm", "MAPHead_0/LayerNorm_0"
    yield "attn_pool.mlp.fc1", "MAPHead_0/MlpBlock_0/Dense_0"
    yield "attn_pool.mlp.fc2", "MAPHead_0/MlpBlock_0/Dense_1"
    yield "fc_norm", "fc_norm"
    yield "pre_logits.fc", "pre_logits"
    yield "head", "head"
    yield "head_dist", "head_dist"
    backbone = "patch_embed.backbone"
    yield f"{backbone}.stem.conv", "conv_root"
    yield f"{backbone}.stem.norm", "gn_root"
    for stage, unit in ((i, j) for i, count in enumerate(units) for j in range(count)):
        theirs = f"{backbone}.stages.{stage}.blocks.{unit}"
        ours = f"block{stage + 1}/unit{unit + 1}"
        for j in (1, 2, 3):
            yield f"{theirs}.conv{j}", f"{ours}/conv{j}"
            yield f"{theirs}.norm{j}", f"{ours}/gn{j}"
        yield f"{theirs}.downsample.conv", f"{ours}/conv_proj"
        yield f"{theirs}.downsample.norm", f"{ours}/gn_proj"


def _read_tokens(rest: _Arrays, params: _Arrays, *, num_slots: int, average: bool) -> None:
    # A distillation token that no head reads becomes a register.
    distilled = "head_dist.weight" in rest and not average
    found = [rest.pop(name, None) for name in ("cls_token", "dist_token", "reg_token")]
    tokens = [x for x in found if x is not None]
    with_class = int(found[0] is not None and not average) + int(distilled)
    posemb = rest.pop("pos_embed", None)
    if posemb is not None:
        slots, patches = np.split(posemb, [num_slots], axis=1)
        no_slot = np.zeros_like(patches, shape=(1, with_class, patches.shape[-1]))
        first = slots[:, :with_class] if num_slots and with_class else no_slot
        params[POSEMB] = np.concatenate([first, patches], axis=1)
        if tokens:
            tokens = [_add_slots(np.concatenate(tokens, axis=1), slots, start=with_class)]
    if not tokens:
        return
    classes, registers = np.split(np.concatenate(tokens, axis=1), [with_class], axis=1)
    if with_class:
        params["cls"] = classes[:, :1]
    if distilled:
        params["dist"] = classes[:, 1:]
    if registers.shape[1]:
        params["Transformer/registers"] = registers


def _add_slots(tokens: np.ndarray, slots: np.ndarray, *, start: int) -> np.ndarray:
    """Adds position embeddings `[1, n, width]` to the tokens `[1, m, width]` from `start` on."""
    end = slots.shape[1]
    if end <= start:
        return tokens
    added = tokens[:, start:end].astype(np.float32) + slots[:, start:].astype(np.float32)
    return np.concatenate([tokens[:, :start], added, tokens[:, end:]], axis=1)


def _read_heads(
    rest: _Arrays,
    source: str,
    params: _Arrays,
    target: str,
    names: Sequence[str],
    heads: int,
    spell: Callable[[str], str],
) -> None:
    """Splits a projection into those of `names`, and each of these into heads."""
    weight = rest.pop(f"{source}.weight", None)
    if weight is None:
        return
    width = rest["patch_embed.proj.weight"].shape[0]
    _check_shape(f"{source}.weight", weight, (len(names) * width, width), spell)
    bias = rest.pop(f"{source}.bias", None)
    bias = np.zeros_like(weight[:, 0]) if bias is None else bias
    _check_shape(f"{source}.bias", bias, weight.shape[:1], spell)
    kernels = weight.reshape(len(names), heads, -1, weight.shape[1])
    biases = bias.reshape(len(names), heads, -1)
    for name, kernel, bias in zip(names, kernels, biases, strict=True):
        params[f"{target}/{name}/kernel"] = kernel.transpose(2, 0, 1)
        params[f"{target}/{name}/bias"] = bias


def _split_gates(rest: _Arrays, layers: int, spell: Callable[[str], str]) -> None:
    """Splits the layer of a packed SwiGLU into the gate and what the gate is applied to."""
    for i in range(layers):
        mlp = f"blocks.{i}.mlp"
        first, second = (rest.get(f"{mlp}.fc{j}.weight") for j in (1, 2))
        if first is None or second is None or first.shape[0] != 2 * second.shape[1]:
            continue
        for suffix in ("weight", "bias"):
            if f"{mlp}.fc1.{suffix}" in rest:
                if suffix == "bias":
                    _check_shape(f"{mlp}.fc1.bias", rest[f"{mlp}.fc1.bias"], first.shape[:1], spell)
                halves = np.split(rest[f"{mlp}.fc1.{suffix}"], 2)
                rest[f"{mlp}.gate.{suffix}"], rest[f"{mlp}.fc1.{suffix}"] = halves


def _read_module(rest: _Arrays, source: str, params: _Arrays, target: str) -> None:
    """Moves a norm, a linear layer or a convolution; a linear layer without bias gets zeros."""
    weight, bias = rest.pop(f"{source}.weight", None), rest.pop(f"{source}.bias", None)
    if weight is not None:
        name = "scale" if weight.ndim == 1 else "kernel"
        params[f"{target}/{name}"] = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        if bias is None and weight.ndim == 2:
            bias = np.zeros_like(weight[:, 0])
    if bias is not None:
        params[f"{target}/bias"] = bias


def _write_tokens(
    rest: _Arrays,
    tensors: _Arrays,
    *,
    model: Mapping[str, Any],
    grid: tuple[int, int] | None,
) -> None:
    cls, registers = rest.pop("cls", None), rest.pop("Transformer/registers", None)
    dist, posemb = rest.pop("dist", None), rest.pop(POSEMB, None)
    fixed = grid and fixed_positions(model.get("position_embedding"), grid, model["hidden_size"])
    if fixed is not None:
        num_class_tokens = sum(x is not None for x in (cls, dist))
        posemb = np.pad(fixed, ((0, 0), (num_class_tokens, 0), (0, 0)))
    unused = has_unused_token(model)
    if posemb is not None and cls is not None and registers is not None and not unused:
        slot, posemb = np.split(posemb, [1], axis=1)
        cls = _add_slots(cls, slot, start=0)
    found = {"cls_token": cls, "dist_token": dist, "reg_token": registers, "pos_embed": posemb}
    tensors |= {name: x for name, x in found.items() if x is not None}


def _write_heads(
    rest: _Arrays,
    source: str,
    tensors: _Arrays,
    target: str,
    names: Sequence[str],
    *,
    biased: Collection[str],
) -> None:
    """Joins the projections of `names`, of which those of `biased` have a bias, and their heads."""
    kernels = [rest.pop(f"{source}/{name}/kernel") for name in names]
    biases = [
        rest.pop(f"{source}/{name}/bias") if name in biased else np.zeros_like(kernel[0])
        for name, kernel in zip(names, kernels, strict=True)
    ]
    weights = [x.transpose(1, 2, 0).reshape(-1, x.shape[0]) for x in kernels]
    tensors[f"{target}.weight"] = np.concatenate(weights)
    if biased:
        tensors[f"{target}.bias"] = np.concatenate([x.reshape(-1) for x in biases])


def _join_gates(rest: _Arrays, layers: int) -> None:
    for i, name in itertools.product(range(layers), ("kernel", "bias")):
        mlp = f"Transformer/encoderblock_{i}/MlpBlock_0"
        gate = rest.pop(f"{mlp}/gate/{name}", None)
        if gate is not None:
            rest[f"{mlp}/Dense_0/{name}"] = np.concatenate(
                [gate, rest[f"{mlp}/Dense_0/{name}"]], axis=-1
            )


def _write_module(rest: _Arrays, source: str, tensors: _Arrays, target: str) -> None:
    for name in ("scale", "kernel"):
        if f"{source}/{name}" in rest:
            x = rest.pop(f"{source}/{name}")
            tensors[f"{target}.weight"] = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
    if f"{source}/bias" in rest:
        tensors[f"{target}.bias"] = rest.pop(f"{source}/bias")


def _rename_for_eva(tensors: _Arrays) -> _Arrays:
    renamed = {re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", n): x for n, x in tensors.items()}
    biases = {n: np.split(x, 3) for n, x in renamed.items() if n.endswith(".qkv.bias")}
    if any(key.any() for _, key, _ in biases.values()):
        return renamed
    for name, (query, _, value) in biases.items():
        del renamed[name]
        stem = name.removesuffix("qkv.bias")
        renamed |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
    return renamed
