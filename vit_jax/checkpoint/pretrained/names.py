# SPDX-License-Identifier: Apache-2.0
"""Names of the tensors of a PyTorch model: what training code adds, and what they show."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

_T = TypeVar("_T")

# The tensor that every Vision Transformer of timm, or of Hugging Face, has.
TIMM_PATCHES = "patch_embed.proj.weight"
TIMM_NAFLEX_PATCHES = "embeds.proj.weight"
TIMM_MIXER_PATCHES = "stem.proj.weight"
HUGGINGFACE_PATCHES = "embeddings.patch_embeddings.projection.weight"
HUGGINGFACE_DINOV3_PATCHES = "embeddings.patch_embeddings.weight"
_PATCHES = (
    TIMM_PATCHES,
    TIMM_NAFLEX_PATCHES,
    TIMM_MIXER_PATCHES,
    HUGGINGFACE_PATCHES,
    HUGGINGFACE_DINOV3_PATCHES,
)

# Wrappers of PyTorch, which may surround any module of a model.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Attributes in which training code keeps a model. In front of these names Hugging Face has only the
# name of the model, such as "vit", which is a part of the layout.
_ATTRIBUTES = {"module", "model", "backbone", "encoder", "net", "network", "student", "teacher"}

# Tensors that one kind of model has, and no model here; the most specific ones come first.
_FAMILIES = (
    (r"\.lora_A\.", "folder of adapters of PEFT, without the adapter_config.json beside it"),
    (r"(^|\.)layers\.\d+\.blocks\.\d+\.", "Swin Transformer"),
    (r"^rel_pos_bias\.relative_position_bias", "BEiT with one bias for all blocks"),
    (r"(^|\.)(shared_)?rel_pos\.(mlp|relative_position_bias)", "ViT with relative positions"),
    (r"^((?!blocks\.\d+\.attn\.).)*relative_position_bias", "BEiT"),
    (r"(^|\.)blocks_token_only\.", "CaiT"),
    (r"(^|\.)cls_attn_blocks\.", "XCiT"),
    (r"\.rel_pos_[hw]$", "SAM"),
    (r"(^|\.)detection_tokens$", "YOLOS"),
    (r"(^|\.)(visual|vision_model)\.", "CLIP or SigLIP"),
    (r"^stages\.\d+\.", "model in stages, such as ConvNeXt"),
    (r"^(features\.|layer1\.|conv1\.)", "convolutional network"),
)


def unwrap(tensors: Mapping[str, _T], *, part: str = "") -> tuple[dict[str, _T], list[str]]:
    """Removes what training code has put in front of the names of a model's tensors.

    Args:
      tensors: any values by name.
      part: takes only the tensors below this name, such as "teacher", of a file of several models.

    Returns:
      The values by their names in the model, and a note if these differ. Tensors outside of the
      model keep their names.

    Raises:
      ValueError: there is no such part, there are several models, or two tensors would get the
        same name.
    """
    inside = {n: x for n, x in tensors.items() if not part or n.startswith(f"{part}.")}
    if not inside:
        raise ValueError(f"no tensor starts with {part}.; they are such as {next(iter(tensors))}")
    plain = _rename(inside, lambda n: _remove_wrappers(n.removeprefix(f"{part}." if part else "")))
    found = {prefix for prefix in map(_find_prefix, plain) if prefix is not None}
    if len(found) > 1:
        parts = sorted(".".join(filter(None, [part, prefix.rstrip(".")])) for prefix in found)
        raise ValueError(
            f"it holds several models, {' and '.join(p or 'one without a prefix' for p in parts)}; "
            f"give one of them, as FILE:{parts[-1]}"
        )
    prefix = next(iter(found), "")
    renamed = _rename(plain, lambda n: n.removeprefix(prefix))
    if renamed.keys() == tensors.keys():
        return renamed, []
    old = next(name for name in inside if _ends_with_patches(name) or not found)
    new = next(name for name in renamed if _ends_with_patches(name) or not found)
    return renamed, [f"names of tensors: wrappers removed, as from {old} to {new}"]


def describe_family(names: Iterable[str]) -> str | None:
    """Returns the kind of model that the names of tensors show; None if they show none."""
    names = sorted(names)
    for pattern, family in _FAMILIES:
        if name := next((name for name in names if re.search(pattern, name)), None):
            return f"{family} (by its tensor {name})"
    return None


def _remove_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _ends_with_patches(name: str) -> bool:
    return name.endswith(_PATCHES)


def _find_prefix(name: str) -> str | None:
    """Returns the prefix of the model's names, if this is the name of its patches."""
    for patches in _PATCHES:
        prefix = name.removesuffix(patches)
        if prefix == name or (prefix and not prefix.endswith(".")):
            continue
        *outer, last = prefix.rstrip(".").split(".")
        if patches != TIMM_PATCHES and last not in _ATTRIBUTES:
            return "".join(f"{part}." for part in outer)
        return prefix
    return None


def _rename(tensors: Mapping[str, _T], rename: Callable[[str], str]) -> dict[str, _T]:
    renamed: dict[str, _T] = {}
    origin: dict[str, str] = {}
    for name, x in tensors.items():
        new = rename(name)
        if new in renamed:
            raise ValueError(f"both {origin[new]} and {name} would be {new} without the wrappers")
        renamed[new], origin[new] = x, name
    return renamed
