# SPDX-License-Identifier: Apache-2.0
"""Models by name and size.

Sizes: Table 1 of arXiv:2010.11929 (B, L, H), Table 2 of arXiv:2106.04560 (g, G), arXiv:2106.10270
(Ti, S and the hybrids), arXiv:2305.13035 (So400m) and Table 1 of arXiv:2105.01601 (Mixer).
"""

from collections.abc import Mapping
from typing import Any

from vit_jax.models.blocks import parse_remat
from vit_jax.models.mixer import MlpMixer
from vit_jax.models.names import GAP, SIZES, guess_variant, normalize_variant
from vit_jax.models.positions import FIXED_POSITIONS
from vit_jax.models.vit import Classifier, VisionTransformer
from vit_jax.utils.bounds import shorten
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import lookup, takes_options_of

_KEYS = ("hidden_size", "num_layers", "mlp_dim", "num_heads")
# Units in each stage of the ResNet, the size, and the patch in cells of the ResNet's output. The
# number in the name is not the patch, but close to the pixels that a token covers.
HYBRIDS: dict[str, tuple[tuple[int, ...], str, int]] = {
    "R+Ti/16": ((), "Ti", 8),
    "R26+S/32": ((2, 2, 2, 2), "S", 1),
    "R26+B/32": ((2, 2, 2, 2), "B", 1),
    "R50+B/16": ((3, 4, 9), "B", 1),
    "R50+L/32": ((3, 4, 6, 3), "L", 1),
}
# Largest sizes: tracing and memory grow by them, and files of others state them too.
_MOST_LAYERS, _MOST = 2**10, 2**20

_MIXER_KEYS = ("hidden_size", "num_layers", "tokens_mlp_dim", "channels_mlp_dim")
MIXER_SIZES = {
    "S": (512, 8, 256, 2048),
    "B": (768, 12, 384, 3072),
    "L": (1024, 24, 512, 4096),
    "H": (1280, 32, 640, 5120),
}


@takes_options_of(VisionTransformer)
def make_vit(
    *,
    variant: str | None = None,
    patch_size: int | tuple[int, int] | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    mlp_dim: int | None = None,
    classifier: Classifier | None = None,
    resnet_layers: tuple[int, ...] | None = None,
    **options: Any,
) -> VisionTransformer:
    """Makes a `VisionTransformer` of a named size, of given sizes, or of a mixture of both.

    Other arguments are the attributes of `VisionTransformer`; None for the value of the variant.

    Args:
      variant: a size, with the patch or without ("B/16", "B"), or a hybrid ("R50+B/16"), in any
        spelling of `normalize_variant`; with the suffix "-gap-norep" the classifier defaults to
        `gap`.
      patch_size: in pixels, one number for a square; required if `variant` does not include it.

    Raises:
      UserError: the variant is unknown, a size is missing or impossible, or options exclude each
        other.
    """
    named = {} if variant is None else _parse_variant(variant)
    given = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "mlp_dim": mlp_dim,
        "num_heads": num_heads,
        "patch_size": patch_size,
    }
    sizes = _fill_sizes(named, given)
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise UserError(
            f"model.num_heads={sizes['num_heads']} does not divide "
            f"model.hidden_size={sizes['hidden_size']}"
        )
    pooling: Classifier = classifier or named.get("classifier", "token")
    resnet_layers = named.get("resnet_layers") if resnet_layers is None else tuple(resnet_layers)
    parse_remat(options.get("remat", "none"))
    _check_rates(options)
    _check_positions(sizes, options)
    _check_sizes("num_registers", options.get("num_registers", 0), least=0)
    _check_sizes("representation_size", options.get("representation_size") or 1)
    _check_sizes("resnet_layers", resnet_layers or ())
    if pooling == "unpooled" and options.get("norm_after_pooling"):
        raise UserError("model.norm_after_pooling with model.classifier='unpooled': nothing pools")
    if options.get("distillation_token"):
        _check_distillation_token(options | {"classifier": pooling})
    return VisionTransformer(classifier=pooling, resnet_layers=resnet_layers, **sizes, **options)


@takes_options_of(MlpMixer)
def make_mixer(
    *,
    variant: str | None = None,
    patch_size: int | tuple[int, int] | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    tokens_mlp_dim: int | None = None,
    channels_mlp_dim: int | None = None,
    **options: Any,
) -> MlpMixer:
    """Makes an `MlpMixer` of a named size ("B/16"), of given sizes, or of a mixture of both.

    Raises `UserError` if the variant is unknown, or if a size is missing or impossible.
    """
    named = {} if variant is None else _parse_size(variant, MIXER_SIZES, _MIXER_KEYS)
    given = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "tokens_mlp_dim": tokens_mlp_dim,
        "channels_mlp_dim": channels_mlp_dim,
        "patch_size": patch_size,
    }
    _check_rates(options)
    return MlpMixer(**_fill_sizes(named, given), **options)


def _parse_variant(variant: str) -> dict[str, Any]:
    variant = normalize_variant(variant)
    base = variant.removesuffix(GAP)
    pooling = {"classifier": "gap"} if base != variant else {}
    if "+" not in base:
        return _parse_size(base, SIZES, _KEYS) | pooling
    layers, size, patch = lookup(HYBRIDS, base, key="model.variant")
    sizes = dict(zip(_KEYS, SIZES[size], strict=True))
    return sizes | {"resnet_layers": layers, "patch_size": patch} | pooling


def _parse_size(
    variant: str, table: Mapping[str, tuple[int, ...]], keys: tuple[str, ...]
) -> dict[str, Any]:
    name, _, patch = normalize_variant(variant).partition("/")
    if name not in table:
        near = guess_variant(variant)
        if near is not None and near.partition("/")[0] in table:
            raise UserError(f"model.variant={variant!r} is unknown; did you mean {near!r}?")
    sizes: dict[str, Any] = dict(zip(keys, lookup(table, name, key="model.variant"), strict=True))
    if not patch:
        return sizes
    if not patch.isdigit():
        raise UserError(f"model.variant={variant!r}: expected SIZE/PATCH such as B/16")
    return sizes | {"patch_size": int(patch)}


def _fill_sizes(named: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {}
    for key, value in given.items():
        value = named.get(key) if value is None else value
        if value is None:
            raise UserError(f"model.{key} is missing: give it, or a model.variant such as 'B/16'")
        _check_sizes(key, value)
        sizes[key] = value
    patch = sizes["patch_size"]
    return sizes | {"patch_size": (patch, patch) if isinstance(patch, int) else tuple(patch)}


def _check_sizes(key: str, value: int | tuple[int, ...], *, least: int = 1) -> None:
    most = _MOST_LAYERS if "layers" in key else _MOST
    for size in value if isinstance(value, tuple | list) else (value,):
        if size < least:
            raise UserError(f"model.{key}={value!r}: expected at least {least}")
        if size > most:
            raise UserError(f"model.{key}={shorten(value)}: expected {most:,} at most")


def _check_rates(options: Mapping[str, Any]) -> None:
    for key, rate in options.items():
        if key.endswith("_rate") and not 0 <= rate < 1:
            raise UserError(f"model.{key}={rate}: expected 0 <= value < 1")


def _check_distillation_token(options: Mapping[str, Any]) -> None:
    expected = {"classifier": "token", "representation_size": None, "norm_after_pooling": False}
    for key, value in expected.items():
        if (given := options.get(key, value)) != value:
            raise UserError(
                f"model.distillation_token with model.{key}={given!r}: expected {value!r}"
            )


def _check_positions(sizes: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    head_dim = sizes["hidden_size"] // sizes["num_heads"]
    theta = options.get("rope_theta")
    if theta is not None and theta <= 0:
        raise UserError(f"model.rope_theta={theta}: expected more than 0, such as 100.0")
    if theta is not None and head_dim % 4:
        raise UserError(
            f"model.rope_theta={theta}: the {head_dim} channels of a head can't be halved into "
            "pairs for rows and columns; choose model.num_heads so that they divide by 4"
        )
    reference = options.get("rope_reference_grid")
    if reference is not None and (theta is None or min(reference) < 1):
        raise UserError(
            f"model.rope_reference_grid={reference!r} with model.rope_theta={theta}: expected rows "
            "and columns of at least 1, and a rope_theta such as 100.0"
        )
    positions = options.get("position_embedding")
    if positions in FIXED_POSITIONS and sizes["hidden_size"] % 4:
        raise UserError(
            f"model.hidden_size={sizes['hidden_size']} with position_embedding={positions!r}: "
            "expected a multiple of 4"
        )


MODELS = {"vit": make_vit, "mixer": make_mixer}
