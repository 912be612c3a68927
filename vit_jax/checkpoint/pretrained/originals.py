# SPDX-License-Identifier: Apache-2.0
"""Reads DINOv3 and ViT-5 by the tensor names of their own repositories, giving those of timm.

Sources: the names of the published files of facebookresearch/dinov3 and wangf3014/ViT-5.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

_DINOV3, _DINOV3_THETA = "storage_tokens", 100.0
_VIT5 = "blocks.0.attn.rope_reg.freqs"
_MASK = re.compile(r"(blocks\.\d+\.attn\.qkv\.bias)_mask$")
# Attention heads by width where a head does not have 64 channels.
_HEADS_BY_WIDTH = {4096: 32}


class Original(NamedTuple):
    """What the names of a repository show beside the tensors.

    Attributes:
      name: of the project.
      tensors: arrays by the names of timm.
      model: arguments of the model.
      halves: whether rotary embeddings turn channel i and i + half of a head's channels.
      num_heads: None for one head for each 64 channels.
      notes: what was left out, one line each.
    """

    name: str
    tensors: dict[str, np.ndarray]
    model: dict[str, Any]
    halves: bool
    num_heads: int | None
    notes: list[str]


def read_original(tensors: Mapping[str, np.ndarray]) -> Original | None:
    """Renames the tensors of a file of DINOv3 or ViT-5; None for those of any other project.

    Raises:
      ValueError: the rotary embedding of the file is not that of the project.
    """
    if _DINOV3 in tensors or "rope_embed.periods" in tensors:
        return _read_dinov3(dict(tensors))
    if _VIT5 in tensors:
        return _read_vit5(dict(tensors))
    return None


def _read_dinov3(tensors: dict[str, np.ndarray]) -> Original:
    notes = []
    width = tensors["patch_embed.proj.weight"].shape[0]
    heads = _HEADS_BY_WIDTH.get(width)
    periods = tensors.pop("rope_embed.periods", None)
    if periods is not None:
        head_dim = 4 * periods.size
        heads = width // head_dim
        expected = _DINOV3_THETA ** (4 * np.arange(periods.size) / head_dim)
        # Published files hold them in bfloat16.
        if not np.allclose(periods.astype(np.float32), expected, rtol=2**-7):
            raise ValueError(
                f"rope_embed.periods are not those of base {_DINOV3_THETA:g}, the only ones that "
                "are known here"
            )
    for name in [name for name in tensors if _MASK.match(name)]:
        del tensors[name]
        bias = tensors[_MASK.match(name)[1]].copy()  # type: ignore[index]
        # Whatever the mask holds: one that was never loaded is not a number.
        bias[bias.size // 3 : 2 * (bias.size // 3)] = 0
        tensors[name.removesuffix("_mask")] = bias
    for name in [name for name in tensors if name.startswith("local_cls_norm.")]:
        del tensors[name]
        if name.endswith("weight"):
            notes.append("local_cls_norm: only for local crops in pre-training: dropped")
    renamed = {name.replace("storage_tokens", "reg_token"): x for name, x in tensors.items()}
    model = {
        "rope_theta": _DINOV3_THETA,
        "rope_coordinates": "centered",
        "norm_epsilon": 1e-5,
        "activation": "gelu_erf",
    }
    return Original("DINOv3", renamed, model, True, heads, notes)


def _read_vit5(tensors: dict[str, np.ndarray]) -> Original:
    bases = {}
    for key, name in (("rope_theta", "rope"), ("rope_register_theta", "rope_reg")):
        found = [x for n, x in tensors.items() if n.endswith(f".attn.{name}.freqs")]
        bases[key] = _find_base(found, name)
    tensors = {name: x for name, x in tensors.items() if not name.endswith(".freqs")}
    model = bases | {"norm_epsilon": 1e-6, "activation": "gelu_erf"}
    return Original("ViT-5", tensors, model, False, None, [])


def _find_base(frequencies: list[np.ndarray], name: str) -> float:
    """Returns the base of frequencies base^(-i / n) for i from 0 to n - 1, equal in all blocks."""
    first = frequencies[0].astype(np.float64) if frequencies else np.zeros(0)
    if first.ndim == 1 and first.size > 1 and first[1] > 0:
        base = float(f"{first[1] ** -first.size:.4g}")
        expected = base ** -(np.arange(first.size) / first.size)
        if all(x.shape == first.shape and np.allclose(x, expected, 1e-4) for x in frequencies):
            return base
    raise ValueError(f"blocks.*.attn.{name}.freqs are no powers of one base, as no model here has")
