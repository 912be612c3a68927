# SPDX-License-Identifier: Apache-2.0
"""Converts tensors of CLIP and SigLIP to the parameters of this package and back.

The names here are those of Hugging Face; `rename_open_clip` gives tensors of open_clip and OpenAI
these names. Kernels are transposed and fused projections split, so values stay equal to the last
bit in both directions.

Sources: transformers 5.23, `models/clip` and `models/siglip`; open_clip 3.3, `model.py` and
`transformer.py`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from vit_jax.checkpoint.pretrained.weights import POSEMB

_Arrays = dict[str, np.ndarray]

PATCHES = "vision_model.embeddings.patch_embedding.weight"
POSITIONS = "vision_model.embeddings.position_embedding.weight"
TOKENS = "text_model.embeddings.token_embedding.weight"
# The names of both towers' tensors, and of a projection beside each of them.
PREFIXES = {
    "img": ("vision_model.", "visual_projection"),
    "txt": ("text_model.", "text_projection"),
}
# The patches of image towers, and the embedding of tokens, in all layouts.
OPEN_CLIP_PATCHES = "visual.conv1.weight"
TRUNK = "visual.trunk."
_OPEN_CLIP_TOKENS = ("token_embedding.weight", "text.token_embedding.weight")
_KNOWN = (PATCHES, TOKENS, OPEN_CLIP_PATCHES, f"{TRUNK}patch_embed.proj.weight", *_OPEN_CLIP_TOKENS)

_ATTENTION = "MultiHeadDotProductAttention_0"
# Buffers and constants that no model computes with.
_UNUSED = re.compile(
    r"(.*\.)?position_ids|attn_mask|text\.attn_mask|input_resolution|context_length|vocab_size"
)
_OPEN_CLIP_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
        (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
        (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
        (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
        (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
        (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
        (r"^visual\.proj$", "visual_projection"),
        (r"^text\.(?=token_|positional_|transformer|ln_final|text_projection)", ""),
        (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
        (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
        (r"^ln_final\.", "text_model.final_layer_norm."),
        (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
        (r"\.ln_(\d)\.", r".layer_norm\1."),
        (r"\.attn\.", ".self_attn."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    )
)
_FUSED = re.compile(r"(.*\.self_attn\.)in_proj_(weight|bias)")


def is_image_text(names: Iterable[str]) -> bool:
    """Whether names of tensors are those of an image or a text tower, or of both."""
    return any(name in _KNOWN for name in names)


def rename_open_clip(tensors: Mapping[str, np.ndarray]) -> _Arrays:
    """Returns tensors of open_clip or OpenAI by the names, and in the layout, of Hugging Face.

    A tower of timm (`visual.trunk.*`) keeps its names.
    """
    renamed: _Arrays = {}
    for name, x in tensors.items():
        if not name.startswith(TRUNK):
            for pattern, replacement in _OPEN_CLIP_NAMES:
                name = pattern.sub(replacement, name)
        if match := _FUSED.fullmatch(name):
            for part, array in zip("qkv", np.split(x, 3), strict=True):
                renamed[f"{match[1]}{part}_proj.{match[2]}"] = array
        elif name in ("visual_projection", "text_projection"):  # [in, out]
            renamed[f"{name}.weight"] = x.T
        else:
            renamed[name] = x
    if "text_projection.bias" in renamed:  # As in SigLIP.
        for kind in ("weight", "bias"):
            renamed[f"text_model.head.{kind}"] = renamed.pop(f"text_projection.{kind}")
    return renamed


def drop_unused(tensors: Mapping[str, np.ndarray]) -> tuple[_Arrays, list[str]]:
    """Returns tensors without buffers and constants, and a note on these."""
    kept = {name: x for name, x in tensors.items() if not _UNUSED.fullmatch(name)}
    dropped = sorted(tensors.keys() - kept.keys())
    return kept, [f"{', '.join(dropped)}: constants: dropped"] if dropped else []


class _Layout(NamedTuple):
    """How an array here is stored there: `read` takes it from there, `write` back."""

    read: Callable[[np.ndarray, int], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


_SAME = _Layout(lambda x, _: x, lambda x: x)
_ROWS = _Layout(lambda x, _: x[None], lambda x: x[0])
_CLASS = _Layout(lambda x, _: x[None, None], lambda x: x[0, 0])
_DENSE = _Layout(lambda x, _: x.T, lambda x: x.T)
_CONV = _Layout(lambda x, _: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
_INTO_HEADS = _Layout(
    lambda x, heads: x.T.reshape(x.shape[1], heads, -1), lambda x: x.reshape(x.shape[0], -1).T
)
_HEADS_BIAS = _Layout(lambda x, heads: x.reshape(heads, -1), lambda x: x.reshape(-1))
_FROM_HEADS = _Layout(
    lambda x, heads: x.T.reshape(heads, -1, x.shape[0]), lambda x: x.reshape(-1, x.shape[-1]).T
)

_Place = tuple[str, str, _Layout]


def to_linen(
    tensors: Mapping[str, np.ndarray], part: str, *, num_heads: int
) -> tuple[_Arrays, _Arrays]:
    """Converts the tensors of one tower.

    Args:
      tensors: arrays of any float dtype by the names of Hugging Face.
      part: `img` or `txt`.
      num_heads: attention heads.

    Returns:
      `(params, rest)`: arrays by path within the tower, and the tensors that are not its own.

    Raises:
      ValueError: a tensor does not have the shape that its name implies.
    """
    prefix, _ = PREFIXES[part]
    rest, params = dict(tensors), {}
    for kind in ("weight", "bias"):
        fused = rest.pop(f"{prefix}head.attention.in_proj_{kind}", None)
        if fused is not None:
            for name, x in zip("qkv", np.split(fused, 3), strict=True):
                rest[f"{prefix}head.attention.{name}_proj.{kind}"] = x
    for theirs, ours, layout in _list_places(part, count_layers(rest, part)):
        if theirs in rest:
            x = rest.pop(theirs)
            try:
                params[ours] = layout.read(x, num_heads)
            except (ValueError, IndexError) as error:
                raise ValueError(f"{theirs} is {x.shape}: {error}") from error
    return params, rest


def to_huggingface(params: Mapping[str, np.ndarray], part: str, *, is_clip: bool) -> _Arrays:
    """Converts the parameters of one tower to tensors by the names of Hugging Face.

    Args:
      params: arrays of any float dtype by path within the tower; blocks are not stacked.
      part: `img` or `txt`.
      is_clip: whether the names are those of CLIP or of SigLIP, whose heads differ.

    Raises:
      ValueError: a parameter has no place there.
    """
    prefix, _ = PREFIXES[part]
    rest, tensors = dict(params), {}
    layers = len({m[1] for m in map(_OURS.match, params) if m})
    for theirs, ours, layout in _list_places(part, layers, is_clip=is_clip):
        if ours in rest:
            tensors[theirs] = layout.write(rest.pop(ours))
    for kind in ("weight", "bias"):
        names = [f"{prefix}head.attention.{name}_proj.{kind}" for name in "qkv"]
        if names[0] in tensors:
            fused = np.concatenate([tensors.pop(name) for name in names])
            tensors[f"{prefix}head.attention.in_proj_{kind}"] = fused
    if rest:
        what = "CLIP" if is_clip else "SigLIP"
        raise ValueError(f"{what} of Hugging Face has no place for {part}/{sorted(rest)[0]}")
    return tensors


_OURS = re.compile(r"Transformer/encoderblock_(\d+)/")


def count_layers(tensors: Mapping[str, Any], part: str) -> int:
    """Returns the number of blocks of a tower."""
    block = re.compile(rf"{re.escape(PREFIXES[part][0])}encoder\.layers\.(\d+)\.")
    return len({match[1] for match in map(block.match, tensors) if match})


def _list_places(part: str, layers: int, *, is_clip: bool | None = None) -> Iterator[_Place]:
    """Yields (theirs, ours, layout) of all tensors that a tower can have.

    The heads are those of CLIP or SigLIP; None for both.
    """
    prefix, projection = PREFIXES[part]
    for i in range(layers):
        theirs, ours = f"{prefix}encoder.layers.{i}", f"Transformer/encoderblock_{i}"
        yield from _norm(f"{theirs}.layer_norm1", f"{ours}/LayerNorm_0")
        yield from _norm(f"{theirs}.layer_norm2", f"{ours}/LayerNorm_1")
        yield from _attention(f"{theirs}.self_attn", f"{ours}/{_ATTENTION}")
        yield from _mlp(f"{theirs}.mlp", f"{ours}/MlpBlock_0")
    embeddings = f"{prefix}embeddings."
    yield f"{embeddings}position_embedding.weight", POSEMB, _ROWS
    if part == "img":
        yield f"{embeddings}class_embedding", "cls", _CLASS
        yield f"{embeddings}patch_embedding.weight", "embedding/kernel", _CONV
        yield f"{embeddings}patch_embedding.bias", "embedding/bias", _SAME
        yield from _norm(f"{prefix}pre_layrnorm", "Transformer/pre_norm")
        yield from _norm(f"{prefix}post_layernorm", "Transformer/encoder_norm")
    else:
        yield f"{embeddings}token_embedding.weight", "Embed_0/embedding", _SAME
        yield from _norm(f"{prefix}final_layer_norm", "Transformer/encoder_norm")
    if is_clip in (True, None):
        yield f"{projection}.weight", "head/kernel", _DENSE
    if is_clip in (False, None) and part == "txt":
        yield from _dense(f"{prefix}head", "head")
    if is_clip in (False, None) and part == "img":
        yield f"{prefix}head.probe", "MAPHead_0/probe", _SAME
        yield from _attention(f"{prefix}head.attention", f"MAPHead_0/{_ATTENTION}")
        yield from _norm(f"{prefix}head.layernorm", "MAPHead_0/LayerNorm_0")
        yield from _mlp(f"{prefix}head.mlp", "MAPHead_0/MlpBlock_0")


def _norm(theirs: str, ours: str) -> Iterator[_Place]:
    yield f"{theirs}.weight", f"{ours}/scale", _SAME
    yield f"{theirs}.bias", f"{ours}/bias", _SAME


def _dense(theirs: str, ours: str) -> Iterator[_Place]:
    yield f"{theirs}.weight", f"{ours}/kernel", _DENSE
    yield f"{theirs}.bias", f"{ours}/bias", _SAME


def _mlp(theirs: str, ours: str) -> Iterator[_Place]:
    yield from _dense(f"{theirs}.fc1", f"{ours}/Dense_0")
    yield from _dense(f"{theirs}.fc2", f"{ours}/Dense_1")


def _attention(theirs: str, ours: str) -> Iterator[_Place]:
    for name in ("query", "key", "value"):
        yield f"{theirs}.{name[0]}_proj.weight", f"{ours}/{name}/kernel", _INTO_HEADS
        yield f"{theirs}.{name[0]}_proj.bias", f"{ours}/{name}/bias", _HEADS_BIAS
    yield f"{theirs}.out_proj.weight", f"{ours}/out/kernel", _FROM_HEADS
    yield f"{theirs}.out_proj.bias", f"{ours}/out/bias", _SAME
