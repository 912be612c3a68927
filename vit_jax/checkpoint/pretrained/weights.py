# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights by the parameter names of this package, and the model that they belong to."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from vit_jax.models.resampling import OWN_METHOD, Method
from vit_jax.models.resnet import total_stride
from vit_jax.utils.bounds import shorten
from vit_jax.utils.errors import UserError

POSEMB = "Transformer/posembed_input/pos_embedding"
REGISTERS = "Transformer/registers"

# Parameters that objectives train beside those of a model.
OBJECTIVE_PARAMS = {
    "decoder": "only for pre-training",
    "probe": "the heads of a linear probe",
    "dino_head": "only for pre-training",
    "ibot_head": "only for pre-training",
    "centers": "only for pre-training",
    "mask_token": "only for pre-training",
    "gram_teacher": "only for pre-training",
    "segmenter": "the head of segmentation",
    "depth_head": "the head of depth",
}

# Methods of resizing here by the names of Pillow.
_RESIZES = {
    "nearest": "nearest",
    "bilinear": "bilinear_antialias",
    "bicubic": "bicubic_antialias",
    "lanczos": "lanczos_antialias",
}
Loss = Literal["softmax", "sigmoid"]

_BLOCK = re.compile(r"(.*/)?encoderblock_(\d+)/(.*)")
# What a name has up to the number of a block, or of a part of a ResNet, this number, and the first.
_NUMBERED = tuple(
    (re.compile(pattern), first)
    for pattern, first in (
        (r"((?:.*/)?(?:encoderblock|MixerBlock)_)(\d+)/", 0),
        (r"((?:.*/)?block)(\d+)/", 1),
        (r"((?:.*/)?block\d+/unit)(\d+)/", 1),
        (r"(blocks\.)(\d+)\.", 0),
        (r"(patch_embed\.backbone\.stages\.)(\d+)\.", 0),
        (r"(patch_embed\.backbone\.stages\.\d+\.blocks\.)(\d+)\.", 0),
        (r"((?:.*\.)?layer\.)(\d+)\.", 0),
    )
)
_STACK = re.compile(r"(.*/)?encoderblock/(.*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Parameters that were read from a file or a run, and how to use them.

    Attributes:
      params: arrays of any float dtype by path (`Transformer/encoderblock_0/LayerNorm_0/scale`),
        with the shapes of a model without `scan`: blocks are never stacked.
      layout: the kind of file, for the screen: "timm safetensors".
      model: known arguments of one of `models.variants.MODELS`, and `name`, that rebuild the model:
        sizes, and what shapes do not show, such as `{"activation": "gelu_erf"}`. The `name` of a
        text tower alone is `text`.
      preprocess: the known ones of `mean` and `std` of pixels in [0, 1] (one number or one for each
        channel), `image_size` (height, width in pixels), and `eval`, a value of `data.preprocess`.
      posemb_grid: (rows, columns) of patches of the learned position embeddings; None if only
        `preprocess` or their number shows it.
      posemb_resize: the rule by which the file's own project resizes position embeddings.
      objective_params: arrays by path of parameters that a run trained beside its model's, such as
        those of a decoder.
      class_names: names of the head's classes by label; None if they are not known.
      loss: "softmax" if the head was trained for one class per image, "sigmoid" if for any number;
        None if it is not known.
      tokenizer: `line`, a value of `data.tokenizer`, and `sha256` of its vocabulary file, None if
        there is no file; None if it is not known.
      notes: what was left out or changed while reading, one line each.
    """

    params: dict[str, np.ndarray]
    layout: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocess: dict[str, Any] = dataclasses.field(default_factory=dict)
    posemb_grid: tuple[int, int] | None = None
    posemb_resize: Method = OWN_METHOD
    objective_params: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    loss: Loss | None = None
    tokenizer: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def describe_weights(weights: Weights) -> dict[str, Any]:
    """Returns what the parameters of a written file do not show, as JSON."""
    described: dict[str, Any] = {
        "model": dict(weights.model),
        "preprocess": dict(weights.preprocess),
        "posemb": describe_posemb(weights),
    }
    if weights.class_names is not None:
        described["class_names"] = list(weights.class_names)
    if weights.loss is not None:
        described["loss"] = weights.loss
    if weights.tokenizer is not None:
        described["tokenizer"] = dict(weights.tokenizer)
    return described


def check_tokenizer(tokenizer: Any, where: str) -> dict[str, Any] | None:
    """Returns a description of a tokenizer that was read as JSON; None if there is none.

    Raises:
      UserError: it is no such description; the message starts with `where`.
    """
    if tokenizer is None:
        return None
    known = isinstance(tokenizer, Mapping) and isinstance(tokenizer.get("line"), str)
    if not known or not isinstance(tokenizer.get("sha256"), str | None):
        raise UserError(f"{where}: tokenizer={shorten(tokenizer)}: expected its line and checksum")
    return {key: tokenizer.get(key) for key in ("line", "sha256")}


def check_loss(loss: Any, where: str) -> Loss | None:
    """Returns a loss that was read as JSON; None if it is not known.

    Raises:
      UserError: it has no name here; the message starts with `where`.
    """
    if loss not in (None, *get_args(Loss)):
        raise UserError(f"{where}: loss={loss!r}: expected one of {', '.join(get_args(Loss))}")
    return loss


def unstack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Splits `[num_layers, ...]` arrays of a scanned encoder into arrays `[...]` with own paths."""
    flat = {}
    for path, value in params.items():
        if match := _STACK.fullmatch(path):
            prefix, rest = match[1] or "", match[2]
            flat |= {f"{prefix}encoderblock_{i}/{rest}": value[i] for i in range(value.shape[0])}
        else:
            flat[path] = value
    return flat


def stack_blocks(params: Mapping[str, Any], *, like: Iterable[str] | None = None) -> dict[str, Any]:
    """Stacks the arrays `[...]` of the blocks as `[num_layers, ...]`, for a scanned encoder.

    Of several encoders, only those that are scanned in the paths `like` are stacked, if given.
    """
    stacked = None if like is None else {m[1] or "" for m in map(_STACK.fullmatch, like) if m}
    flat, blocks = {}, {}
    for path, value in params.items():
        match = _BLOCK.fullmatch(path)
        if match and (stacked is None or (match[1] or "") in stacked):
            blocks.setdefault(f"{match[1] or ''}encoderblock/{match[3]}", {})[int(match[2])] = value
        else:
            flat[path] = value
    return flat | {
        path: np.stack([layers[i] for i in sorted(layers)]) for path, layers in blocks.items()
    }


def check_blocks(names: Iterable[str]) -> None:
    """Refuses parameters of which a whole block is absent, as in a part of a file.

    Args:
      names: of parameters of this package, or of tensors of timm or Hugging Face.

    Raises:
      ValueError: there is a block of a higher number than one that is absent.
    """
    blocks: dict[tuple[str, int], set[int]] = {}
    for name, (pattern, first) in itertools.product(names, _NUMBERED):
        if match := pattern.match(name):
            blocks.setdefault((match[1], first), set()).add(int(match[2]))
    for (prefix, first), numbers in blocks.items():
        every = range(first, first + len(numbers))
        absent = next((i for i in every if i not in numbers), None)
        if absent is not None:
            raise ValueError(
                f"it has {prefix}{max(numbers)}, but nothing of {prefix}{absent}: expected all "
                "blocks of the model"
            )


def check_sizes_stay(model: Mapping[str, Any], image_size: Sequence[int] | None) -> None:
    """Raises `ValueError` if a model resizes its kernel or position embeddings in each call.

    Other packages' models for images of one size do not. `image_size` is (height, width) in pixels.
    """
    patch, kernel, grid = (
        () if (size := model.get(key)) is None else tuple(np.broadcast_to(size, 2).tolist())
        for key in ("patch_size", "kernel_size", "posemb_grid")
    )
    if not patch:
        return
    if kernel and kernel != patch:
        raise ValueError(
            f"its kernel of {kernel[0]}x{kernel[1]} pixels is resized to patches of {patch[0]}x"
            f"{patch[1]} in each call, which models there do not do"
        )
    if (
        grid
        and image_size
        and grid != tuple(s // p for s, p in zip(image_size, patch, strict=True))
    ):
        raise ValueError(
            f"its position embeddings of {grid[0]}x{grid[1]} patches are resized to the images in "
            "each call, which models there do not do"
        )


def infer_model(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a model's constructor that follow from the parameters' shapes.

    Args:
      params: arrays or `jax.ShapeDtypeStruct` by path; blocks are not stacked.

    Returns:
      Keyword arguments, and `name`; empty if the parameters are not of a model of this package.
    """
    shapes = {path: tuple(value.shape) for path, value in params.items()}
    if "txt/Embed_0/embedding" in shapes and "img/embedding/kernel" in shapes:
        return _infer_two_towers(shapes)
    if "Embed_0/embedding" in shapes:
        return {"name": "text"} | _infer_text(shapes)
    if "stem/kernel" in shapes:
        return _infer_mixer(shapes)
    if len(shapes.get("embedding/kernel", ())) == 4:
        return _infer_vit(shapes)
    return {}


def describe_model(params: Mapping[str, np.ndarray], *, rope_theta: float | None) -> dict[str, Any]:
    """Returns `infer_model` of a file whose position embeddings are learned or none."""
    positions = "learned" if POSEMB in params else "none"
    positions = "factorized" if f"{POSEMB}_y" in params else positions
    positions = "relative" if f"{ATTENTION_0}/{RELATIVE}" in params else positions
    return infer_model(params) | {"position_embedding": positions, "rope_theta": rope_theta}


def image_size_of(grid: tuple[int, int], model: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (height, width) in pixels of an image that becomes (rows, columns) of patches."""
    rows, columns = _stride(model)
    return grid[0] * rows, grid[1] * columns


def describe_posemb(weights: Weights) -> dict[str, Any]:
    """Returns what `read_posemb` reads, as JSON."""
    return {"grid": weights.posemb_grid, "resize": weights.posemb_resize}


def read_posemb(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `Weights` in a description by `describe_posemb`, which may be empty.

    Raises:
      ValueError: the rule has no name here.
    """
    resize, grid = description.get("resize", OWN_METHOD), description.get("grid")
    if resize not in get_args(Method):
        raise ValueError(f"posemb.resize={resize!r}: expected one of {', '.join(get_args(Method))}")
    return {"posemb_grid": None if grid is None else tuple(grid), "posemb_resize": resize}


def find_grid(model: Mapping[str, Any], preprocess: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns (rows, columns) of patches in an image, if its size and that of a patch are known."""
    image_size = preprocess.get("image_size")
    if image_size is None or not model.get("patch_size"):
        return None
    height, width = image_size
    rows, columns = _stride(model)
    return height // rows, width // columns


def describe_evaluation(
    *,
    resize: tuple[int, ...],
    crop: tuple[int, int] | None,
    interpolation: Any,
    rounding: Literal["down", "nearest"],
) -> tuple[dict[str, str], list[str]]:
    """Describes how torchvision, timm and Hugging Face prepare images for evaluation.

    They resize by Pillow, or by PyTorch as Pillow does: antialiased, and the longer side is rounded
    down.

    Args:
      resize: (length of the shorter side,); or (height, width), where the aspect is not kept.
      crop: (height, width) of the middle that is cropped then; None for the whole image.
      interpolation: name of the filter in Pillow, in lower case.
      rounding: of `central_crop`.

    Returns:
      `(preprocess, notes)`: `{"eval": line}`, or nothing and a note if no line does the same.
    """
    sides = resize * 2 if len(resize) == 1 else resize
    if interpolation not in list(_RESIZES):  # It may be of any type.
        return {}, [describe_no_line(f"resized by {shorten(interpolation)} interpolation")]
    if crop is not None and (crop[0] > sides[0] or crop[1] > sides[1]):
        return {}, [describe_no_line(f"resized to {sides}, and padded in a crop of {crop}")]
    arguments = f"{', '.join(map(str, resize))}, method={_RESIZES[interpolation]!r}"
    if len(resize) == 1:
        line = f"decode|resize_small({arguments}, rounding='down')"
    else:
        line = f"decode|resize({arguments})"
    if crop is not None and crop != resize:
        size = f"{crop[0]}" if crop[0] == crop[1] else f"{crop[0]}, {crop[1]}"
        line += f"|central_crop({size}{'' if rounding == 'down' else f', rounding={rounding!r}'})"
    return {"eval": line}, []


def describe_no_line(what: str) -> str:
    """Returns a note on images that are prepared in a way that no operation here supports."""
    return f"images: {what} in evaluation there, which no operation here does: name another line"


def _infer_mixer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    height, width, _, hidden = shapes["stem/kernel"]
    gated = "MixerBlock_0/channel_mixing/gate/kernel" in shapes
    return {
        "name": "mixer",
        "patch_size": (height, width),
        "hidden_size": hidden,
        "num_layers": _count(shapes, r"MixerBlock_(\d+)/"),
        "tokens_mlp_dim": shapes.get("MixerBlock_0/token_mixing/Dense_0/bias", (0,))[0],
        "channels_mlp_dim": shapes.get("MixerBlock_0/channel_mixing/Dense_0/bias", (0,))[0],
        **({"activation": "swiglu"} if gated else {}),
    }


def _infer_two_towers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    image, text = (
        {p.removeprefix(part): x for p, x in shapes.items() if p.startswith(part)}
        for part in ("img/", "txt/")
    )
    sections = {"image": _infer_vit(image), "text": _infer_text(text)}
    del sections["image"]["name"]
    return {
        "name": "two_towers",
        **sections,
        "width": image["head/kernel"][-1] if "head/kernel" in image else None,
        "bias_init": -10.0 if "b" in shapes else None,  # Only used to initialise.
    }


def _infer_text(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    vocab_size, hidden = shapes["Embed_0/embedding"]
    found = {"vocab_size": vocab_size, "hidden_size": hidden, **_infer_encoder(shapes)}
    if len(positions := shapes.get(POSEMB, ())) == 3:
        found["context_length"] = positions[1]
    if "MAPHead_0/probe" in shapes:
        found["pooling"] = "map"
    if "head/kernel" in shapes and "head/bias" not in shapes:
        found["head_bias"] = False
    return found


# Parameters of attention that depend on the position.
RELATIVE, FREQUENCIES = "relative_position_bias", "rope_frequencies"

_BLOCK_0 = "Transformer/encoderblock_0"
ATTENTION_0 = f"{_BLOCK_0}/MultiHeadDotProductAttention_0"


def _infer_encoder(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns the arguments of the blocks, which images and texts share."""
    found: dict[str, Any] = {
        "num_layers": _count(shapes, r"Transformer/encoderblock_(\d+)/"),
        "mlp_dim": shapes.get(f"{_BLOCK_0}/MlpBlock_0/Dense_0/bias", (0,))[0],
        "num_heads": shapes.get(f"{ATTENTION_0}/query/kernel", (0, 0))[1],
    }
    options = {
        f"{_BLOCK_0}/MlpBlock_0/gate/kernel": {"activation": "swiglu"},
        f"{ATTENTION_0}/query_norm/scale": {"qk_norm": True},
        f"{ATTENTION_0}/norm/scale": {"attention_norm": True},
        f"{ATTENTION_0}/{RELATIVE}": {"position_embedding": "relative"},
        f"{ATTENTION_0}/{FREQUENCIES}": {"rope_frequencies": "mixed"},
        f"{_BLOCK_0}/MlpBlock_0/norm/scale": {"mlp_norm": True},
        f"{_BLOCK_0}/LayerScale_0/scale": {"layer_scale_init": 1e-5},  # Only used to initialise.
    }
    for path, option in options.items():
        if path in shapes:
            found |= option
    # A single absent bias is a damaged file, so it is only looked for in the first block.
    if f"{ATTENTION_0}/key/kernel" in shapes and f"{ATTENTION_0}/key/bias" not in shapes:
        others = f"{ATTENTION_0}/query/bias" in shapes
        found["qkv_bias"] = "query_value" if others else "none"
    if f"{_BLOCK_0}/LayerNorm_0/scale" in shapes and f"{_BLOCK_0}/LayerNorm_0/bias" not in shapes:
        found["norm"] = "rms_norm"
    return found


def _infer_vit(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    height, width, _, hidden = shapes["embedding/kernel"]
    pooling = "map" if "MAPHead_0/probe" in shapes else "gap"
    found: dict[str, Any] = {
        "name": "vit",
        "patch_size": (height, width),
        "hidden_size": hidden,
        **_infer_encoder(shapes),
        "classifier": "token" if "cls" in shapes else pooling,
    }
    pooled = shapes.get("MAPHead_0/MultiHeadDotProductAttention_0/query/kernel")
    if pooled is not None and pooled[1] != found["num_heads"]:
        found["map_num_heads"] = pooled[1]
    hidden_pooled = shapes.get("MAPHead_0/MlpBlock_0/Dense_0/bias", (found["mlp_dim"],))[0]
    if hidden_pooled != found["mlp_dim"]:
        found["map_mlp_dim"] = hidden_pooled
    doubled = shapes.get("head/kernel", (0,))[0] == 2 * hidden
    if doubled and "cls" in shapes and "pre_logits/bias" not in shapes:
        found["classifier"] = "token_gap"
    axes = [shapes.get(f"{POSEMB}_{axis}", ()) for axis in "yx"]
    if all(axes):
        found |= {"position_embedding": "factorized", "posemb_grid": (axes[0][0], axes[1][0])}
    if "pre_logits/bias" in shapes:
        found["representation_size"] = shapes["pre_logits/bias"][0]
    if "conv_root/kernel" in shapes:
        stages = _count(shapes, r"block(\d+)/")
        units = (_count(shapes, rf"block{i + 1}/unit(\d+)/") for i in range(stages))
        found["resnet_layers"] = tuple(units)
        found["resnet_width"] = shapes["conv_root/kernel"][-1] / 64
    if "Transformer/registers" in shapes:
        found["num_registers"] = shapes["Transformer/registers"][1]
    options = {
        "dist": {"distillation_token": True},
        "fc_norm/scale": {"norm_after_pooling": True},
        "Transformer/pre_norm/scale": {"pre_norm": True},
        "Transformer/prefix_norm/scale": {"untied_norm": True},
    }
    for path, option in options.items():
        if path in shapes:
            found |= option
    for kernel, option in (("embedding", "embedding_bias"), ("head", "head_bias")):
        if f"{kernel}/kernel" in shapes and f"{kernel}/bias" not in shapes:
            found[option] = False
    return found


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for path in shapes if (match := re.match(pattern, path))})


def _stride(model: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (height, width) in pixels of the image area that becomes one token."""
    patch = model["patch_size"]
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    layers = model.get("resnet_layers")
    shrink = 1 if layers is None else total_stride(tuple(layers))
    return rows * shrink, columns * shrink
