# SPDX-License-Identifier: Apache-2.0
"""Names of models: the sizes, and the spellings of a variant. Needs no JAX.

Sizes: Table 1 of arXiv:2010.11929 (B, L, H), Table 2 of arXiv:2106.04560 (g, G), arXiv:2106.10270
(Ti, S), arXiv:2305.13035 (So400m), arXiv:2502.14786 (g-opt), and arXiv:2103.00020, Table 20: the
text model of CLIP B/32 and B/16 (M).
"""

import re

# Hidden size, layers, hidden width of MLPs, heads.
SIZES = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "So400m": (1152, 27, 4304, 16),
    "g-opt": (1536, 40, 6144, 16),
    "M": (512, 12, 2048, 8),
}
# As published: the mean over patches, and no layer before the head.
GAP = "-gap-norep"
# Sizes by the words of timm and the Hugging Face hub.
_WORDS = {
    "tiny": "Ti",
    "small": "S",
    "base": "B",
    "large": "L",
    "huge": "H",
    "giant": "g",
    "gigantic": "G",
    "giantopt": "g-opt",
    "medium": "M",
}
_SIZE = rf"(?:(r\d*)[-_+]?)?({'|'.join(sorted([*SIZES, *_WORDS], key=len, reverse=True))})"
_PATCH = r"[-/_]?(?:patch|p)?(\d+)"
_VARIANT = re.compile(rf"(?:(?:vit|mixer)[-_ ]?)?{_SIZE}(?:{_PATCH})?({GAP})?", re.IGNORECASE)
_WITHIN = re.compile(rf"(?<![a-z0-9]){_SIZE}{_PATCH}(?![a-z0-9])", re.IGNORECASE)


def normalize_variant(variant: str) -> str:
    """Returns the name of a variant in the form "B/16" or "R50+B/16".

    Case, separators and the name of the architecture may differ, as in "b16", "B_16", "ViT-B/16",
    "vit_base_patch16" and "r50_b16". "g" and "G" are different sizes. A text of another form is
    returned as it is.
    """
    match = _VARIANT.fullmatch(variant)
    if match is None:
        return variant
    resnet, size, patch, gap = match.groups()
    by_case = {name.lower(): name for name in [*reversed(SIZES)]} | _WORDS
    size = size if size in SIZES else by_case[size.lower()]
    name = size if resnet is None else f"{resnet.upper()}+{size}"
    return f"{name}{f'/{patch}' if patch else ''}{GAP if gap else ''}"


def guess_variant(text: str) -> str | None:
    """Returns the variant that a name contains: "B/16" for "timm/vit_base_patch16_224"; or None."""
    text = text.partition("@")[0]
    if _VARIANT.fullmatch(text):
        return normalize_variant(text)
    found = _WITHIN.search(text.rpartition("/")[2])
    return None if found is None else normalize_variant(found[0])
