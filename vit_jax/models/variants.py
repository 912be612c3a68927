# SPDX-License-Identifier: Apache-2.0
"""Models by name and size.

Sizes: see `models.names`; arXiv:2106.10270 (hybrids) and Table 1 of arXiv:2105.01601 (Mixer).
"""

import math
from collections.abc import Mapping
from typing import Any

from vit_jax.models.block_config import Constrain, unconstrained
from vit_jax.models.blocks import parse_remat
from vit_jax.models.lora import Lora
from vit_jax.models.mixer import MlpMixer
from vit_jax.models.names import GAP, SIZES, guess_variant, normalize_variant
from vit_jax.models.positions import FIXED_POSITIONS
from vit_jax.models.text import TextTransformer
from vit_jax.models.two_towers import TwoTowers
from vit_jax.models.vit import Classifier, Dtype, VisionTransformer
from vit_jax.utils.bounds import shorten
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import bind, lookup, takes_options_of

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
    kernel_size: int | tuple[int, int] | None = None,
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
      kernel_size: see `VisionTransformer`; one number for a square.

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
    _check_heads(sizes)
    pooling: Classifier = classifier or named.get("classifier", "token")
    resnet_layers = named.get("resnet_layers") if resnet_layers is None else tuple(resnet_layers)
    parse_remat(options.get("remat", "none"))
    if options.get("drop_pixels") and resnet_layers is not None:
        raise UserError("model.drop_pixels with a ResNet, which pads images: expected False")
    _check_rates(options)
    _check_positions(sizes, options)
    _check_sizes("num_registers", options.get("num_registers", 0), least=0)
    _check_sizes("representation_size", options.get("representation_size") or 1)
    _check_sizes("resnet_layers", resnet_layers or ())
    if options.get("untied_norm") and options.get("norm_after_pooling"):
        raise UserError("model.untied_norm with model.norm_after_pooling: expected one of them")
    _check_sizes("kernel_size", kernel_size or 1)
    options |= {"kernel_size": (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size}
    _check_any_size(options, resnet_layers)
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


@takes_options_of(TextTransformer)
def make_text_transformer(
    *,
    vocab_size: int,
    context_length: int,
    variant: str | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    mlp_dim: int | None = None,
    **options: Any,
) -> TextTransformer:
    """Makes a `TextTransformer` of a named size ("B"), of given sizes, or of a mixture of both.

    Raises `UserError` if the variant is unknown, or if a size is missing or impossible.
    """
    named = {} if variant is None else _parse_size(variant, SIZES, _KEYS, key="model.text")
    given = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "mlp_dim": mlp_dim,
        "num_heads": num_heads,
    }
    if "patch_size" in named:
        raise UserError(f"model.text.variant={variant!r}: a text has no patches: expected a size")
    sizes = _fill_sizes(named, given, key="model.text")
    sizes |= {"vocab_size": vocab_size, "context_length": context_length}
    for key in ("vocab_size", "context_length"):
        _check_sizes(key, sizes[key], key="model.text")
    _check_sizes("num_classes", options.get("num_classes", 0), least=0, key="model.text")
    _check_heads(sizes, key="model.text")
    _check_rates(options, key="model.text")
    parse_remat(options.get("remat", "none"), key="model.text.remat")
    if options.get("eot_id") is not None:
        _check_eot(options, vocab_size)
    return TextTransformer(**sizes, **options)


# Constructors of the towers, by their sections of the config, and arguments that are set for both
# at once or follow from the model.
TOWER_MAKERS = {"image": make_vit, "text": make_text_transformer}
OF_BOTH_TOWERS = ("num_classes", "dtype", "constrain", "float8", "lora")


def make_two_towers(
    *,
    image: dict[str, Any],
    text: dict[str, Any],
    width: int | None = None,
    scale_init: float = 10.0,
    bias_init: float | None = None,
    num_classes: int = 0,
    dtype: Dtype = "float32",
    constrain: Constrain = unconstrained,
    float8: bool = False,
    lora: Lora | None = None,
) -> TwoTowers:
    """Makes a model of images and texts.

    Args:
      image: arguments of `make_vit`, such as `{"variant": "B/16", "classifier": "map"}`.
      text: arguments of `make_text_transformer`.
      width: of the embeddings, to which a head of each tower projects; None for the width of the
        image tower, which then has no head, as in SigLIP.
      scale_init: see `TwoTowers`.
      bias_init: see `TwoTowers`.
      num_classes: 0, since there is no head for classes.
      dtype: of the computation of both towers.
      constrain: shards activations over a mesh.
      float8: see `VisionTransformer`.
      lora: which matrix products of both towers have adapters; None for none.

    Raises:
      UserError: an argument of a tower is unknown, missing or impossible, or `num_classes` is set.
    """
    if num_classes:
        raise UserError(
            f"model.num_classes={num_classes}: two towers have no head for classes: expected 0, "
            "and an objective without one, such as objective.name=contrastive"
        )
    if scale_init <= 0:
        raise UserError(f"model.scale_init={scale_init}: expected more than 0, such as 10.0")
    towers = bind_towers({"image": image, "text": text})
    shared = {"dtype": dtype, "constrain": constrain, "float8": float8, "lora": lora}
    img = make_vit(**towers["image"], **shared, num_classes=width or 0)
    if "unpooled" in img.classifier:
        raise UserError(
            f"model.image.classifier={img.classifier!r} gives a vector for every token; expected "
            "'token', 'gap' or 'map'"
        )
    if width is not None:
        _check_sizes("width", width)
    pooled = img.hidden_size * (2 if img.classifier == "token_gap" else 1)
    joint = width or img.representation_size or pooled
    txt = make_text_transformer(**towers["text"], **shared, num_classes=joint)
    return TwoTowers(
        img=img, txt=txt, scale_init=scale_init, bias_init=bias_init, constrain=constrain
    )


def bind_towers(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the sections `image` and `text` of `model.name=two_towers`, with all defaults.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type.
    """
    # A vector of zeros has no direction.
    sections = {**section, "image": {"head_init": "lecun_normal"} | section["image"]}
    return {
        name: bind(sections[name], make, key=f"model.{name}", given=(*OF_BOTH_TOWERS, "any_size"))[
            0
        ]
        for name, make in TOWER_MAKERS.items()
    }


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
    variant: str,
    table: Mapping[str, tuple[int, ...]],
    keys: tuple[str, ...],
    *,
    key: str = "model",
) -> dict[str, Any]:
    name, _, patch = normalize_variant(variant).partition("/")
    if name not in table:
        near = guess_variant(variant)
        if near is not None and near.partition("/")[0] in table:
            raise UserError(f"{key}.variant={variant!r} is unknown; did you mean {near!r}?")
    sizes: dict[str, Any] = dict(zip(keys, lookup(table, name, key=f"{key}.variant"), strict=True))
    if not patch:
        return sizes
    if not patch.isdigit():
        raise UserError(f"{key}.variant={variant!r}: expected SIZE/PATCH such as B/16")
    return sizes | {"patch_size": int(patch)}


def _fill_sizes(
    named: Mapping[str, Any], given: Mapping[str, Any], *, key: str = "model"
) -> dict[str, Any]:
    sizes = {}
    example = "B/16" if "patch_size" in given else "B"
    for name, value in given.items():
        value = named.get(name) if value is None else value
        if value is None:
            raise UserError(
                f"{key}.{name} is missing: give it, or a {key}.variant such as {example!r}"
            )
        _check_sizes(name, value, key=key)
        sizes[name] = value
    if "patch_size" not in sizes:
        return sizes
    patch = sizes["patch_size"]
    return sizes | {"patch_size": (patch, patch) if isinstance(patch, int) else tuple(patch)}


def _check_sizes(
    name: str, value: int | tuple[int, ...], *, least: int = 1, key: str = "model"
) -> None:
    most = _MOST_LAYERS if "layers" in name else _MOST
    for size in value if isinstance(value, tuple | list) else (value,):
        if size < least:
            raise UserError(f"{key}.{name}={value!r}: expected at least {least}")
        if size > most:
            raise UserError(f"{key}.{name}={shorten(value)}: expected {most:,} at most")


def _check_heads(sizes: Mapping[str, Any], *, key: str = "model") -> None:
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise UserError(
            f"{key}.num_heads={sizes['num_heads']} does not divide "
            f"{key}.hidden_size={sizes['hidden_size']}"
        )


def _check_rates(options: Mapping[str, Any], *, key: str = "model") -> None:
    for name, rate in options.items():
        if name.endswith("_rate") and not 0 <= rate < 1:
            raise UserError(f"{key}.{name}={rate}: expected 0 <= value < 1")


def _check_eot(options: Mapping[str, Any], vocab_size: int) -> None:
    eot, pooling = options["eot_id"], options.get("pooling", "last")
    if pooling != "eot" or not 0 <= eot < vocab_size:
        raise UserError(
            f"model.text.eot_id={eot} with pooling={pooling!r} and vocab_size={vocab_size}: "
            "expected a token of the vocabulary, and pooling='eot'"
        )


def _check_distillation_token(options: Mapping[str, Any]) -> None:
    expected = {"classifier": "token", "representation_size": None, "norm_after_pooling": False}
    for key, value in expected.items():
        if (given := options.get(key, value)) != value:
            raise UserError(
                f"model.distillation_token with model.{key}={given!r}: expected {value!r}"
            )


def _check_any_size(options: dict[str, Any], resnet_layers: tuple[int, ...] | None) -> None:
    """Checks the options of models for patches or images of several sizes."""
    grid, sizes = options.get("posemb_grid"), options.get("patch_sizes", ())
    _check_sizes("posemb_grid", grid or 1)
    _check_sizes("patch_sizes", sizes)
    positions = options.get("position_embedding", "learned")
    for key in ("kernel_size", "patch_sizes"):
        if options.get(key) and resnet_layers is not None:
            raise UserError(
                f"model.{key}={options[key]!r} with a ResNet in front of the patches: expected a "
                "model without one"
            )
    if grid is not None and positions not in ("learned", "factorized"):
        raise UserError(
            f"model.posemb_grid={grid!r} with position_embedding={positions!r}: expected 'learned' "
            "or 'factorized', since others fit any grid"
        )
    if positions == "factorized" and grid is None:
        raise UserError(
            "model.position_embedding='factorized' needs the grid that they are resized from: "
            "expected model.posemb_grid, such as (16, 16)"
        )
    if sizes and positions == "learned" and grid is None:
        raise UserError(
            f"model.patch_sizes={tuple(sizes)!r}: each size has a grid of its own, to which "
            "position embeddings are resized: expected model.posemb_grid, such as (7, 7)"
        )
    if sizes and positions == "relative":
        raise UserError(
            f"model.patch_sizes={tuple(sizes)!r} with position_embedding='relative', whose biases "
            "are of one grid, and each size has its own: expected another embedding, such as "
            "'learned' with model.posemb_grid"
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
    _check_coordinates(options)
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


def _check_coordinates(options: Mapping[str, Any]) -> None:
    """Checks the options of rotary embeddings beside their base."""
    theta, coordinates = options.get("rope_theta"), options.get("rope_coordinates", "index")
    mixed = options.get("rope_frequencies", "axial") == "mixed"
    others = ("rope_reference_grid", "rope_register_theta", "rope_offset")
    if mixed and (theta is None or coordinates != "index" or any(map(options.get, others))):
        raise UserError(
            f"model.rope_frequencies='mixed' with model.rope_theta={theta} and "
            f"model.rope_coordinates={coordinates!r}: expected a rope_theta such as 10.0, "
            "rope_coordinates='index', and no rope_reference_grid, rope_offset or "
            "rope_register_theta"
        )
    offset = options.get("rope_offset", 0.0)
    if offset and (theta is None or coordinates != "index"):
        raise UserError(
            f"model.rope_offset={offset} with model.rope_theta={theta} and "
            f"model.rope_coordinates={coordinates!r}: expected a rope_theta such as 10000.0, and "
            "rope_coordinates='index'"
        )
    if coordinates != "index" and (theta is None or options.get("rope_reference_grid")):
        raise UserError(
            f"model.rope_coordinates={coordinates!r} with model.rope_theta={theta} and "
            f"model.rope_reference_grid={options.get('rope_reference_grid')!r}: expected a "
            "rope_theta such as 100.0, and no grid"
        )
    for key, least in (("rope_shift", 0), ("rope_jitter", 1), ("rope_rescale", 1)):
        value = options.get(key)
        if value is not None and (coordinates != "centered" or value <= least):
            raise UserError(
                f"model.{key}={value} with model.rope_coordinates={coordinates!r}: expected a "
                f"number above {least}, and rope_coordinates='centered'"
            )
    own, registers = options.get("rope_register_theta"), options.get("num_registers", 0)
    is_square = registers > 0 and math.isqrt(registers) ** 2 == registers
    if own is not None and (theta is None or own <= 0 or not is_square):
        raise UserError(
            f"model.rope_register_theta={own} with model.num_registers={registers} and "
            f"model.rope_theta={theta}: expected a number above 0, registers that make a square, "
            "such as 4, and a rope_theta"
        )


MODELS = {"vit": make_vit, "mixer": make_mixer, "two_towers": make_two_towers}
