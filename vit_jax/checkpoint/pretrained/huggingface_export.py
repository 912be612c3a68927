# SPDX-License-Identifier: Apache-2.0
"""Writes Vision Transformers as ViT, I-JEPA, DINOv2 or DINOv3 of Hugging Face.

Source: see `huggingface`.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.checkpoint.pretrained.image_text_config import make_processor
from vit_jax.checkpoint.pretrained.safetensors import read_safetensors, write_tensors
from vit_jax.checkpoint.pretrained.timm_tensors import to_timm
from vit_jax.checkpoint.pretrained.weights import (
    POSEMB,
    REGISTERS,
    Weights,
    check_sizes_stay,
    infer_model,
)
from vit_jax.utils.errors import UserError

# The class of a backbone and of a classifier, its prefix there, and its names by those of timm.
_NAMES_VIT = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.([a-z]+)_proj\.", r".attention.attention.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
    (r"^pre_logits\.fc\.", "pooler.dense."),
    (r"^head\.", "classifier."),
)
_NAMES_DINOV2 = (
    *(pair for pair in _NAMES_VIT if "norm1" not in pair[0] and "norm2" not in pair[0]),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
)
_NAMES_DINOV2 = tuple(pair for pair in _NAMES_DINOV2 if r"\.mlp" not in pair[0])
_NAMES_DINOV3 = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.(\d+)\.", r"layer.\1."),
    (r"\.attn\.([a-z])[a-z]+_proj\.", r".attention.\1_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.mlp\.fc1_g\.", ".mlp.gate_proj."),
    (r"\.mlp\.fc1(_x)?\.", ".mlp.up_proj."),
    (r"\.mlp\.fc2\.", ".mlp.down_proj."),
    (r"\.gamma_(\d)$", r".layer_scale\1.lambda1"),
)
_KINDS: dict[str, tuple[str, str | None, tuple[tuple[str, str], ...]]] = {
    "vit": ("ViTModel", "ViTForImageClassification", _NAMES_VIT),
    "ijepa": ("IJepaModel", "IJepaForImageClassification", _NAMES_VIT),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification", _NAMES_DINOV2),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
        _NAMES_DINOV2,
    ),
    "dinov3_vit": ("DINOv3ViTModel", None, _NAMES_DINOV3),
}
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu_erf": "gelu", "swiglu": "silu"}
# Arguments that none of these classes has, and their values there.
_FIXED: dict[str, Any] = {
    "norm": "layer_norm",
    "attention_norm": False,
    "mlp_norm": False,
    "untied_norm": False,
    "pre_norm": False,
    "norm_after_pooling": False,
    "qk_norm": False,
    "embedding_bias": True,
    "resnet_layers": None,
    "distillation_token": False,
    "rope_register_theta": None,
    "rope_reference_grid": None,
}


def make_huggingface(
    weights: Weights,
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any] | None, list[str]]:
    """Makes the files of a repository of Hugging Face's `transformers`.

    Returns:
      Tensors by their names there, equal to the last bit; the content of `config.json` and of
      `preprocessor_config.json`, None if no processor prepares images as here; and notes.

    Raises:
      ValueError: no class there computes what the model does.
    """
    params = weights.params
    stated = {k: x for k, x in weights.model.items() if x is not None and k != "patch_size"}
    model = infer_model(params) | stated
    check_sizes_stay(weights.model, weights.preprocess.get("image_size"))
    kind = _find_kind(model, params)
    base, classifier, names = _KINDS[kind]
    tensors = _rename(params, model, names)
    if "layer_scale_init" in model:  # The classes have a mask token, for pre-training.
        width = model["hidden_size"]
        shape = (1, 1, width) if kind == "dinov3_vit" else (1, width)
        token = weights.objective_params.get("mask_token", np.zeros(width))
        token = token.astype(params["embedding/kernel"].dtype)
        tensors["embeddings.mask_token"] = token.reshape(shape)
    has_head = "head/kernel" in params
    if has_head:
        tensors = {
            name if name.startswith("classifier.") else f"{kind.partition('_with_')[0]}.{name}": x
            for name, x in tensors.items()
        }
        if kind == "dinov2_with_registers":
            tensors = {re.sub(r"^dinov2\.", f"{kind}.", n): x for n, x in tensors.items()}
    size = _find_side(weights, model)
    biases = {
        f"{part}_bias": f"layer.0.attention.{part[0]}_proj.bias" in tensors
        for part in ("query", "key", "value")
    }
    config = (
        _describe(model, kind)
        | (biases if kind == "dinov3_vit" else {})
        | {
            "architectures": [classifier if has_head else base],
            "image_size": size,
            "num_channels": params["embedding/kernel"].shape[2],
        }
    )
    if has_head:
        count = params["head/kernel"].shape[-1]
        labels = weights.class_names or [f"LABEL_{i}" for i in range(count)]
        config["id2label"] = {str(i): name for i, name in enumerate(labels)}
        config["label2id"] = {name: i for i, name in enumerate(labels)}
        if weights.loss == "sigmoid":
            config["problem_type"] = "multi_label_classification"
    processor, notes = make_processor(weights, "ViTImageProcessor", size)
    return tensors, config, processor, notes


def write_huggingface(folder: Path, weights: Weights) -> list[str]:
    """Writes the files of `make_huggingface` into a folder, and reads them back.

    Returns:
      Lines for the screen: notes, and how what was read compares with the weights.

    Raises:
      UserError: no class there computes what the model does, or what is read back differs.
    """
    try:
        tensors, config, processor, notes = make_huggingface(weights)
    except ValueError as e:
        raise UserError(f"--to=transformers: {e}") from e
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        if content is not None:
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
    path = folder / "model.safetensors"
    write_tensors(path, tensors, metadata={"format": "pt"})
    again = read_safetensors(path)
    theirs, ours = again.params, weights.params
    extra = [p for p in ours if p not in theirs and p.endswith("/key/bias") and not ours[p].any()]
    different = [
        p
        for p in ours.keys() | theirs.keys()
        if p not in extra
        and (p not in ours or p not in theirs or not np.array_equal(ours[p], theirs[p]))
    ]
    if different:
        raise UserError(f"{path}: {different[0]} was read back differently; this is a bug")
    return [*notes, f"{path.name}: read back: every parameter is the same"]


def _find_kind(model: Mapping[str, Any], params: Mapping[str, np.ndarray]) -> str:
    """Returns the `model_type` of the class that computes what a model does."""
    if model.get("name") != "vit":
        raise ValueError(
            f"model.name={model.get('name')!r} is no Vision Transformer, and only these can be "
            "written for Hugging Face; a .npz holds any model"
        )
    problems = [
        f"model.{key}={model[key]!r} (there {value!r})"
        for key, value in _FIXED.items()
        if model.get(key, value) != value
    ]
    scaled, registers = "layer_scale_init" in model, model.get("num_registers", 0)
    gap = model["classifier"] == "gap" and "cls" not in params
    expected: dict[str, Any] = {"rope_theta": None, "position_embedding": "learned"}
    if model.get("rope_theta") is not None:
        kind = "dinov3_vit"
        expected = {"rope_coordinates": "centered", "position_embedding": "none"}
        expected |= {"classifier": "token"}
        if not scaled:
            problems.append("model.layer_scale_init=None (there a number)")
        if "head/kernel" in params:
            problems.append("a head (there none)")
    elif scaled:
        kind = "dinov2_with_registers" if registers else "dinov2"
        expected |= {"classifier": "token_gap" if "head/kernel" in params else "token"}
    else:
        kind = "ijepa" if gap else "vit"
        expected |= {"num_registers": 0, "classifier": "gap" if gap else "token"}
        if model.get("activation") == "swiglu":
            problems.append("model.activation='swiglu'")
    if kind != "dinov3_vit":
        expected["qkv_bias"] = "all"
    defaults = {"rope_theta": None, "position_embedding": "learned", "num_registers": 0}
    defaults |= {"qkv_bias": "all", "rope_coordinates": "index"}
    for key, value in expected.items():
        if (found := model.get(key, defaults.get(key))) != value:
            problems.append(f"model.{key}={found!r} (there {value!r})")
    has_pooler = model.get("representation_size") is not None
    if has_pooler and (kind != "vit" or "head/kernel" in params):
        problems.append("a tanh layer (model.representation_size) in front of a head")
    if model.get("activation", "gelu_tanh") not in _ACTIVATIONS:
        problems.append(f"model.activation={model['activation']!r}")
    height, width = params["embedding/kernel"].shape[:2]
    if height != width:
        problems.append(f"patches of {height}x{width} pixels (there squares)")
    if problems:
        raise ValueError(
            f"Hugging Face's {_KINDS[kind][0]} computes something else: {'; '.join(problems)}; a "
            ".npz holds any model"
        )
    return kind


def _rename(
    params: Mapping[str, np.ndarray], model: Mapping[str, Any], names: tuple[tuple[str, str], ...]
) -> dict[str, np.ndarray]:
    is_dinov3 = names is _NAMES_DINOV3
    rest = dict(params)
    theirs = {"cls": "cls_token", REGISTERS: "register_tokens", POSEMB: "position_embeddings"}
    tensors = {
        f"embeddings.{name}": rest.pop(path) for path, name in theirs.items() if path in rest
    }
    # Positions and tokens stay apart there, so only the rest is as in timm.
    plain = {"num_registers": 0, "position_embedding": "none", "representation_size": None}
    plain["classifier"] = "token"
    if is_dinov3 and model.get("activation") == "gelu_tanh":
        plain["activation"] = "gelu_erf"  # timm has no other in such a model.
    found = to_timm(rest, model={**model, **plain}, grid=None)
    biases = {n for n in found if n.endswith((".q_bias", ".v_bias"))}
    for name, x in found.items():
        if name in biases:
            which = "query" if name.endswith(".q_bias") else "value"
            split = {f"{name[: -len('q_bias')]}{which}_proj.bias": x}
        elif ".attn.qkv." in name:
            parts = zip(("query", "key", "value"), np.split(x, 3), strict=True)
            split = {name.replace(".qkv.", f".{part}_proj."): y for part, y in parts}
        elif not is_dinov3 and model.get("activation") == "swiglu" and ".mlp." in name:
            layer = "weights_in" if ".fc1." in name else "weights_out"
            split = {re.sub(r"\.fc\d\.", f".{layer}.", name): x}
        else:
            split = {name: x}
        for new, y in split.items():
            for pattern, replacement in names:
                new = re.sub(pattern, replacement, new)
            tensors[new] = y
    return tensors


def _describe(model: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Returns what config.json states of the encoder."""
    width, hidden = model["hidden_size"], model["mlp_dim"]
    activation = model.get("activation", "gelu_tanh")
    config: dict[str, Any] = {
        "model_type": kind,
        "dtype": "float32",
        "hidden_size": width,
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "patch_size": model["patch_size"][0],
        "layer_norm_eps": model.get("norm_epsilon", 1e-6),
        "hidden_act": _ACTIVATIONS[activation],
    }
    if kind == "dinov3_vit":
        return config | {
            "intermediate_size": hidden,
            "use_gated_mlp": activation == "swiglu",
            "num_register_tokens": model.get("num_registers", 0),
            "rope_theta": float(model["rope_theta"]),
            "layerscale_value": model["layer_scale_init"],
            **dict.fromkeys(("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")),
        }
    if kind.startswith("dinov2"):
        gated = activation == "swiglu"
        ratio = _find_ratio(hidden, width, gated=gated)
        config |= {"mlp_ratio": ratio, "layerscale_value": model["layer_scale_init"]}
        if kind == "dinov2_with_registers":
            config["num_register_tokens"] = model["num_registers"]
        if gated:
            config |= {"use_swiglu_ffn": True, "hidden_act": "gelu"}
        return config | {"qkv_bias": True}
    config |= {"intermediate_size": hidden, "qkv_bias": True}
    if "representation_size" in model:
        config["pooler_output_size"] = model["representation_size"]
    return config


def _find_ratio(hidden: int, width: int, *, gated: bool) -> int:
    """Returns the `mlp_ratio` of DINOv2 there, an integer."""
    ratio = round((1.5 if gated else 1) * hidden / width)
    made = width * ratio
    if gated:  # There the width is 2/3 of the stated one, rounded up to a multiple of 8.
        made = (int(made * 2 / 3) + 7) // 8 * 8
    if made != hidden:
        raise ValueError(
            f"model.mlp_dim={hidden}: Hugging Face's DINOv2 has whole multiples of the width, here "
            f"{width}, and with SwiGLU two thirds of them, rounded up to a multiple of 8"
        )
    return ratio


def _find_side(weights: Weights, model: Mapping[str, Any]) -> int:
    """Returns the height and width of the images in pixels."""
    patch = model["patch_size"][0]
    size = weights.preprocess.get("image_size")
    if POSEMB not in weights.params:
        return size[0] if size else 14 * patch
    length = weights.params[POSEMB].shape[1] - ("cls" in weights.params)
    side = math.isqrt(length)
    grid = (size[0] // patch, size[1] // patch) if size else weights.posemb_grid or (side, side)
    if grid != (side, side) or side**2 != length:
        raise ValueError(
            f"its {length} positions are not those of a square, as Hugging Face's models have them"
        )
    return side * patch
