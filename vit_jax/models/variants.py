# SPDX-License-Identifier: Apache-2.0
"""Models by name and size.

Sizes: Table 1 of arXiv:2010.11929 (B, L, H), Table 2 of arXiv:2106.04560 (g, G) and
arXiv:2106.10270 (Ti, S).
"""

from typing import Any, Literal

import jax.numpy as jnp

from vit_jax.models.layers import Constrain, unconstrained
from vit_jax.models.vit import Classifier, VisionTransformer
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import lookup

_KEYS = ("hidden_size", "num_layers", "mlp_dim", "num_heads")
SIZES = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
}


def make_vit(
    *,
    num_classes: int,
    variant: str | None = None,
    patch_size: int | tuple[int, int] | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    mlp_dim: int | None = None,
    classifier: Classifier = "token",
    representation_size: int | None = None,
    dropout_rate: float = 0.0,
    attention_dropout_rate: float = 0.0,
    head_bias_init: float = 0.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    constrain: Constrain = unconstrained,
) -> VisionTransformer:
    """A `VisionTransformer` of a named size, of given sizes, or of a named one with changes.

    Args:
      num_classes: width of the head.
      variant: a name in `SIZES`, with the patch size or without: "B/16", "B".
      patch_size: pixels, one number for a square; needed if `variant` does not say it.
      hidden_size: as the rest, see `VisionTransformer`; defaults to the variant's.

    Raises:
      UserError: an unknown variant, a size missing, heads that don't divide the width.
    """
    named: dict[str, Any] = {}
    if variant is not None:
        name, _, patch = variant.partition("/")
        named = dict(zip(_KEYS, lookup(SIZES, name, key="model.variant"), strict=True))
        if patch:
            if not patch.isdigit():
                raise UserError(f"model.variant={variant!r}: expected SIZE/PATCH such as B/16")
            named["patch_size"] = int(patch)
    given = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "mlp_dim": mlp_dim,
        "num_heads": num_heads,
        "patch_size": patch_size,
    }
    sizes: dict[str, Any] = named | {k: v for k, v in given.items() if v is not None}
    for key in given:
        if key not in sizes:
            raise UserError(f"model.{key} is missing: give it, or a model.variant such as 'B/16'")
        value = sizes[key]
        if min(value if isinstance(value, tuple | list) else (value,)) < 1:
            raise UserError(f"model.{key}={value!r}: expected at least 1")
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise UserError(
            f"model.num_heads={sizes['num_heads']} does not divide "
            f"model.hidden_size={sizes['hidden_size']}"
        )
    rates: dict[str, Any] = {
        "dropout_rate": dropout_rate,
        "attention_dropout_rate": attention_dropout_rate,
    }
    for key, rate in rates.items():
        if not 0 <= rate < 1:
            raise UserError(f"model.{key}={rate}: expected 0 <= value < 1")
    patch = sizes.pop("patch_size")
    return VisionTransformer(
        num_classes=num_classes,
        patch_size=(patch, patch) if isinstance(patch, int) else (patch[0], patch[1]),
        **sizes,
        classifier=classifier,
        representation_size=representation_size,
        **rates,
        head_bias_init=head_bias_init,
        dtype=jnp.dtype(dtype),
        constrain=constrain,
    )


MODELS = {"vit": make_vit}
