# SPDX-License-Identifier: Apache-2.0
"""Reads Hugging Face's ViT, DeiT, DINOv2, DINOv3 and I-JEPA by the tensor names of timm.

Source: transformers 5.23, `models/vit`, `deit`, `dinov2`, `dinov2_with_registers`, `dinov3_vit` and
`ijepa`;
`vit_msn` and `vit_mae` compute the same. The names are those that its files have.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint.pretrained.config_json import (
    check_keys,
    check_sizes,
    check_values,
    is_number,
    read_class_names,
    read_colors,
    read_pair,
)
from vit_jax.checkpoint.pretrained.names import (
    HUGGINGFACE_DINOV3_PATCHES,
    HUGGINGFACE_PATCHES,
    describe_family,
)
from vit_jax.checkpoint.pretrained.timm_tensors import (
    find_positions,
    pop_mask_token,
    require,
    to_linen,
)
from vit_jax.checkpoint.pretrained.weights import (
    Loss,
    Weights,
    describe_evaluation,
    describe_model,
    describe_no_line,
    image_size_of,
)
from vit_jax.utils.bounds import shorten

_PATCHES = HUGGINGFACE_PATCHES, HUGGINGFACE_DINOV3_PATCHES
_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.mask_token$", "mask_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
        (r"^(?:encoder\.|model\.)?layer\.(\d+)\.", r"blocks.\1."),
        (r"^(blocks\.\d+)\.attention\.(q|k|v)_proj\.", r"\1.attn.\2_proj."),
        (r"^(blocks\.\d+)\.attention\.o_proj\.", r"\1.attn.proj."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
        (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1_proj."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
        (r"^pooler\.dense\.", "pre_logits.fc."),
        (r"^(cls_)?classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    )
)
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
# What all models, or all of some kinds, have beside layers, by timm's names and those there.
_TOKENS = {"pos_embed": "position_embeddings", "cls_token": "cls_token"}
# Biases of a block by the key of config.json that states whether the model has them; DINOv3 has a
# key for each layer.
_BIASES = {"qkv_bias": ("attn.q_proj.bias", "attn.k_proj.bias", "attn.v_proj.bias")}
_BIASES_OF_DINOV3 = {
    "query_bias": ("attn.q_proj.bias",),
    "key_bias": ("attn.k_proj.bias",),
    "value_bias": ("attn.v_proj.bias",),
    "proj_bias": ("attn.proj.bias",),
    "mlp_bias": ("mlp.fc1.bias", "mlp.fc1_g.bias", "mlp.fc1_x.bias", "mlp.fc2.bias"),
}
# By their numbers in Pillow.
_INTERPOLATIONS = dict(enumerate(("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")))
# Keys of preprocessor_config.json that prepare images as no operation here does.
_ODD_IMAGES = ("do_pad", "crop_pct", "do_flip_channel_order")
_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

_ROPE_THETA = 100.0  # the default of Hugging Face's DINOv3
_EPSILONS = {"DINOv2": 1e-6, "DINOv2 with registers": 1e-6, "DINOv3": 1e-5}

# Kinds of models by `model_type`: the kind that the tensors show, and its name.
_KINDS = {
    "vit": ("ViT", "ViT"),
    "deit": ("DeiT", "DeiT"),
    "dinov2": ("DINOv2", "DINOv2"),
    "dinov2_with_registers": ("DINOv2 with registers", "DINOv2 with registers"),
    "vit_msn": ("ViT", "ViT-MSN"),
    "vit_mae": ("ViT", "ViT-MAE"),
    "ijepa": ("I-JEPA", "I-JEPA"),
    "dinov3_vit": ("DINOv3", "DINOv3"),
}
# Keys of config.json that tensors show (see `_list_sizes`), that matter in training or for other
# programs alone, or that every config has, for models of text too.
HARMLESS = {
    *("model_type", "architectures", "transformers_version", "dtype", "torch_dtype"),
    *("_name_or_path", "name_or_path", "_commit_hash", "_attn_implementation"),
    *("_attn_implementation_autoset", "attn_implementation"),
    *("patch_size", "num_channels", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("mlp_ratio", "qkv_bias", "use_mask_token", "use_swiglu_ffn", "num_register_tokens"),
    *("pooler_output_size", "add_pooling_layer", "layerscale_value", "initializer_range"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
    *("classifier_dropout", "classifier_dropout_prob", "gradient_checkpointing"),
    *("encoder_stride", "mask_ratio", "norm_pix_loss", "decoder_hidden_size"),
    *("decoder_num_hidden_layers", "decoder_num_attention_heads", "decoder_intermediate_size"),
    *("out_features", "out_indices", "stage_names", "reshape_hidden_states", "apply_layernorm"),
    *("num_labels", "label2id", "finetuning_task", "task_specific_params"),
    *("output_hidden_states", "output_attentions", "return_dict", "use_return_dict", "use_cache"),
    *("torchscript", "tf_legacy_loss", "use_bfloat16", "chunk_size_feed_forward", "vocab_size"),
    *("tie_word_embeddings", "tie_encoder_decoder", "cross_attention_hidden_size"),
    *("tokenizer_class", "prefix", "bos_token_id", "pad_token_id", "eos_token_id"),
    *("sep_token_id", "decoder_start_token_id", "max_length", "min_length", "do_sample"),
    *("early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature"),
    *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "output_scores", "return_dict_in_generate"),
    *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("use_gated_mlp", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"),
    *("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale", "attention_dropout"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
}
_USED = {"num_attention_heads", "layer_norm_eps", "image_size", "id2label"}
_USED |= {"hidden_act"}
_USED_BY_DINOV3 = {"rope_theta", "rope_parameters"}
# Values of other keys with which the function is that of a model here.
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "pooler_act": ("tanh",),
    "problem_type": ("single_label_classification", "multi_label_classification", "regression"),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}


def is_huggingface(tensors: Mapping[str, Any]) -> bool:
    """Whether the names are those of a Vision Transformer of Hugging Face."""
    return any(name.endswith(_PATCHES) for name in tensors)


def read_huggingface(
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    num_heads: int | None,
) -> Weights:
    """Reads a ViT, DeiT, DINOv2, DINOv3 or I-JEPA of Hugging Face.

    Args:
      tensors: arrays of any float dtype by name.
      config: content of the `config.json` beside them; may be empty.
      processor: content of the `preprocessor_config.json` beside them; may be empty.
      num_heads: attention heads; None for what the files state, or is usual for the width.

    Returns:
      Weights with the dtypes of the file.

    Raises:
      ValueError: the model has a part that no model here has, or the files are damaged.
    """
    if not isinstance(config.get("model_type"), str):
        config = {}  # It was written by another program.
    _check_kind(tensors, config)
    more_keys = _USED_BY_DINOV3 if config.get("model_type") == "dinov3_vit" else set()
    check_keys(config, HARMLESS | _USED | more_keys | _EXPECTED.keys())
    check_values(config, _EXPECTED)
    renamed, kind, originals = _to_timm_names(tensors)
    if renamed["patch_embed.proj.weight"].ndim != 4:
        shape = list(renamed["patch_embed.proj.weight"].shape)
        raise ValueError(f"{originals['patch_embed.proj.weight']} is {shape}: expected 4 axes")
    notes = _drop_unused(renamed)
    objective_params = pop_mask_token(renamed)
    if "model_type" in config:
        shown, name = _KINDS[config["model_type"]]
        check_sizes(config, {"model_type": f"those of a {kind}"} if kind != shown else {})
        kind = name
    absent = {"pos_embed"} if kind == "DINOv3" else {"cls_token"} if kind == "I-JEPA" else ()
    spell = functools.partial(_spell, originals)
    require(renamed, [name for name in _TOKENS if name not in absent], spell)
    loss, loss_notes = _read_loss(renamed, config)
    slots = sum(name in renamed for name in ("cls_token", "dist_token"))
    size = config.get("image_size")
    _, grid, grid_notes = find_positions(
        renamed,
        image_size=None if size is None else read_pair(size, "image_size in config.json"),
        candidates=(slots,),
        usual=slots,
        key="image_size in config.json" if config else "model_type and image_size in config.json",
    )
    heads = config.get("num_attention_heads") if num_heads is None else num_heads
    is_dinov3 = kind == "DINOv3"
    params, more = to_linen(
        renamed,
        num_heads=heads,
        num_slots=slots,
        halves=is_dinov3,
        fill_biases=not is_dinov3,
        unbiased=_list_unbiased(config, kind),
        spell=spell,
    )
    model = describe_model(params, rope_theta=_read_theta(config) if is_dinov3 else None)
    if is_dinov3:
        model["rope_coordinates"] = "centered"
    check_sizes(config, _list_sizes(config, renamed, params, model))
    settings, settings_notes = _read_settings(config, model, kind=kind)
    model = settings | model
    head = params.get("head/kernel")
    names, name_notes = read_class_names(
        config.get("id2label"),
        key="id2label",
        num_classes=None if head is None else head.shape[-1],
    )
    preprocess, image_notes = read_preprocess(processor, config, kind=kind)
    return Weights(
        params=params,
        objective_params=objective_params,
        layout=f"Hugging Face {kind} safetensors",
        model=model,
        preprocess=({"image_size": image_size_of(grid, model)} if grid else {}) | preprocess,
        posemb_grid=grid,
        posemb_resize="bicubic" if kind == "DINOv2 with registers" else "bicubic_no_antialias",
        class_names=names,
        loss=loss if head is not None else None,
        notes=(
            *notes,
            *loss_notes,
            *grid_notes,
            *more,
            *settings_notes,
            *image_notes,
            *name_notes,
        ),
    )


def _check_kind(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """Refuses other models that embed patches by the same names."""
    family = describe_family(tensors)
    if "model_type" in config and config["model_type"] not in _KINDS:
        found = f", a {family}" if family else ""
        raise ValueError(
            f"model_type={config['model_type']!r} in config.json{found}: expected one of "
            f"{', '.join(_KINDS)}"
        )
    if family:
        raise ValueError(f"it is a {family}: expected one of {', '.join(_KINDS)}")
    if not any(".layer.0." in f".{name}" for name in tensors):
        raise ValueError("it has no tensors encoder.layer.0.*; no model here has such layers")


def _list_unbiased(config: Mapping[str, Any], kind: str) -> set[str] | None:
    """Returns the biases that the blocks do not have; None if only the tensors show it."""
    if kind != "DINOv3":
        stated = {key: config.get(key) for key in _BIASES}
        return {x for key in stated if stated[key] is False for x in _BIASES[key]}
    if not config:
        return None
    stated = {key: config.get(key) for key in _BIASES_OF_DINOV3}
    if stated["key_bias"] is None:
        stated["key_bias"] = False  # By default keys alone have none.
    return {x for key in stated if stated[key] is False for x in _BIASES_OF_DINOV3[key]}


def _spell(originals: Mapping[str, str], name: str) -> str:
    """Returns the name of a tensor there, `originals` having those in the file by timm's names."""
    if name in originals:
        return originals[name]
    if name in _TOKENS:
        return originals["patch_embed.proj.weight"].partition("patch_emb")[0] + _TOKENS[name]
    stem, _, kind = name.rpartition(".")
    other = "bias" if kind == "weight" else "weight"
    if f"{stem}.{other}" in originals:
        return originals[f"{stem}.{other}"].removesuffix(other) + kind
    if block := _BLOCK.match(name):
        for like, original in originals.items():  # The same tensor of another block.
            if _BLOCK.sub(block[0], like) == name:
                return re.sub(r"(?<=layer\.)\d+(?=\.)", block[1], original)
    return name


def _read_theta(config: Mapping[str, Any]) -> float:
    """Returns the base of DINOv3's rotary embedding; its `rope_parameters` may state it too."""
    parameters = config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or parameters.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters={shorten(parameters)} in config.json: expected default")
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    theta = _ROPE_THETA if theta is None else theta
    if not is_number(theta) or theta <= 0:
        raise ValueError(f"rope_theta={shorten(theta)} in config.json: expected a number above 0")
    return float(theta)


def _read_loss(
    tensors: dict[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[Loss | None, list[str]]:
    """Returns what the head was trained for; removes the head of a regression, with a note."""
    kind = config.get("problem_type")
    if kind == "regression":
        for name in [name for name in tensors if name.startswith(("head.", "head_dist."))]:
            del tensors[name]
        return None, ["head: it is for regression (problem_type), which is not supported: dropped"]
    if kind == "multi_label_classification":
        return "sigmoid", ["head: for any number of classes per image (problem_type): sigmoid"]
    return "softmax" if kind else None, []


def _list_sizes(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    params: Mapping[str, np.ndarray],
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what config.json states as the tensors, by the names of timm, show it."""
    _, channels, *patch = tensors["patch_embed.proj.weight"].shape
    width, gated = model["hidden_size"], model.get("activation") == "swiglu"
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": model["num_layers"],
        "num_channels": channels,
        "patch_size": tuple(patch),
        "intermediate_size": model["mlp_dim"],
        "num_register_tokens": model.get("num_registers", 0),
        "use_swiglu_ffn": gated,
        "use_gated_mlp": gated,
        "query_bias": "blocks.0.attn.q_proj.bias" in tensors,
        "key_bias": "blocks.0.attn.k_proj.bias" in tensors,
        "value_bias": "blocks.0.attn.v_proj.bias" in tensors,
        "proj_bias": "blocks.0.attn.proj.bias" in tensors,
        "mlp_bias": "blocks.0.mlp.fc2.bias" in tensors,
        "qkv_bias": "blocks.0.attn.q_proj.bias" in tensors,
    }
    if "layer_scale_init" not in model:
        sizes["layerscale_value"] = "no layer scale"
    for key, path in (("num_labels", "head/kernel"), ("pooler_output_size", "pre_logits/kernel")):
        if path in params:
            sizes[key] = params[path].shape[-1]
    ratio = config.get("mlp_ratio")
    hidden = int(width * ratio) if is_number(ratio) else 0
    if gated:  # As the library has it.
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    if hidden != model["mlp_dim"]:
        sizes["mlp_ratio"] = f"layers of {model['mlp_dim']} units"
    return sizes


def _to_timm_names(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], str, dict[str, str]]:
    """Returns the tensors by timm's names, the kind of model ("DINOv2"), and their names there."""
    prefix = next(name for name in tensors if name.endswith(_PATCHES))
    for patches in _PATCHES:
        prefix = prefix.removesuffix(patches)
    originals = {}
    for original in tensors:
        name = original.removeprefix(prefix)
        for pattern, replacement in _NAMES:
            name = pattern.sub(replacement, name)
        originals[name] = original
    kind = "ViT"
    if any(".mlp.up_proj." in name for name in originals):
        gated = any(".mlp.fc1_g." in name for name in originals)
        up = ".mlp.fc1_x." if gated else ".mlp.fc1."
        originals = {name.replace(".mlp.up_proj.", up): x for name, x in originals.items()}
        kind = "DINOv3"
    elif any(name.endswith(".ls1.gamma") for name in originals):
        kind = "DINOv2 with registers" if "reg_token" in originals else "DINOv2"
    elif "dist_token" in originals:
        kind = "DeiT"
    elif "cls_token" not in originals:
        kind = "I-JEPA"
    return {name: tensors[original] for name, original in originals.items()}, kind, originals


def _drop_unused(tensors: dict[str, np.ndarray]) -> list[str]:
    """Removes layers that the model's classes do not apply, or that no head here has."""
    notes = []
    width = tensors["patch_embed.proj.weight"].shape[0]
    head = tensors.get("head.weight")
    if head is not None and head.shape[1:] == (2 * width,) and "cls_token" not in tensors:
        del tensors["head.weight"]
        tensors.pop("head.bias", None)
        notes.append("head: it reads two vectors, and there is no class token: dropped")
    if head is not None and tensors.pop("pre_logits.fc.weight", None) is not None:
        tensors.pop("pre_logits.fc.bias", None)
        notes.append("pre_logits: the pooler is not in front of the classifier: dropped")
    if "cls_token" not in tensors and tensors.pop("pre_logits.fc.weight", None) is not None:
        tensors.pop("pre_logits.fc.bias", None)
        notes.append(
            "pre_logits: the pooler reads the first patch, which is not supported: dropped"
        )
    return notes


def _read_settings(
    config: Mapping[str, Any], model: Mapping[str, Any], *, kind: str
) -> tuple[dict[str, Any], list[str]]:
    """Returns arguments of the model from config.json, or the defaults of the kind and a note."""
    epsilon = _EPSILONS.get(kind, 1e-12)
    gated = kind == "DINOv3" and model.get("activation") == "swiglu"
    activations = {"silu": "swiglu"} if gated else _ACTIVATIONS
    check_values(config, {"hidden_act": tuple(activations)})
    default = "silu" if gated else "gelu"
    taken = {
        "hidden_act": ("activation", activations[config.get("hidden_act") or default]),
        "layer_norm_eps": ("norm_epsilon", _read_epsilon(config, epsilon)),
    }
    settings = dict(taken.values())
    taken["num_attention_heads"] = "num_heads", model["num_heads"]
    missing = {name: x for key, (name, x) in taken.items() if config.get(key) is None}
    if not missing:
        return settings, []
    keys = " and ".join(key for key in taken if config.get(key) is None)
    values = ", ".join(f"{name}={value!r}" for name, value in missing.items())
    return settings, [
        f"no config.json states {keys}: assuming {values}, the defaults of Hugging Face's {kind}"
    ]


def _read_epsilon(config: Mapping[str, Any], default: float) -> float:
    epsilon = config.get("layer_norm_eps")
    epsilon = default if epsilon is None else epsilon
    if not is_number(epsilon) or epsilon < 0:
        raise ValueError(
            f"layer_norm_eps={shorten(epsilon)} in config.json: expected a number of 0 or more"
        )
    return float(epsilon)


def read_preprocess(
    processor: Mapping[str, Any], config: Mapping[str, Any], *, kind: str
) -> tuple[dict[str, Any], list[str]]:
    """Returns `Weights.preprocess` from preprocessor_config.json or config.json, and notes.

    `kind` is the name of the model, such as "DINOv2", whose processor has defaults of its own.
    """
    found: dict[str, Any] = {}
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    if not is_number(factor) or factor <= 0:
        raise ValueError(
            f"rescale_factor={shorten(factor)} in preprocessor_config.json: expected a number "
            "above 0"
        )
    scale = 255 * factor  # The mean there is that of pixels in [0, scale].
    if abs(scale - 1) < 1e-6:
        scale = 1.0
    stated = [processor.get(f"image_{key}") for key in ("mean", "std")]
    if processor.get("do_normalize", True) and None not in stated:
        for key, value in zip(("mean", "std"), map(read_colors, stated), strict=True):
            values = value if isinstance(value, tuple) else (value,)
            if not all(map(is_number, values)):
                raise ValueError(
                    f"image_{key}={shorten(value)} in preprocessor_config.json: expected a number, "
                    "or one a channel"
                )
            found[key] = tuple(x / scale for x in values)
    elif processor.get("do_normalize") is False:
        found |= {"mean": 0.0, "std": 1 / scale}
    more, notes = _describe_images(processor, kind=kind)
    found |= more
    if "image_size" not in found and "image_size" in config:
        found["image_size"] = read_pair(config["image_size"], "image_size in config.json")
    return found, notes


def _describe_images(
    processor: Mapping[str, Any], *, kind: str
) -> tuple[dict[str, Any], list[str]]:
    """Returns `image_size` and `eval` of `Weights.preprocess`, and notes."""
    size, crop = processor.get("size"), None
    # As the processors of these models read and resize by default.
    by_shorter_side = kind.startswith("DINOv2") or kind == "CLIP"
    bicubic = by_shorter_side or kind in ("DeiT", "SigLIP")
    if not processor:
        return {}, []
    odd = next((key for key in _ODD_IMAGES if processor.get(key)), None)
    if odd is not None:
        return {}, [describe_no_line(f"prepared with {odd}={shorten(processor[odd])}")]
    if not processor.get("do_resize", True):
        return {}, [describe_no_line("not resized (do_resize)")]
    if size is None:
        return {}, ["images: preprocessor_config.json states no size of them: name another line"]
    if isinstance(size, Mapping):
        size = {name: value for name, value in size.items() if value is not None}
    where = "in preprocessor_config.json"
    if isinstance(size, int) and by_shorter_side:
        size = {"shortest_edge": size}
    if processor.get("do_center_crop") and processor.get("crop_size") is not None:
        crop = read_pair(processor["crop_size"], f"crop_size {where}")
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        resize = read_pair(size["shortest_edge"], f"size.shortest_edge {where}")[:1]
    elif isinstance(size, Mapping) and set(size) != {"height", "width"}:
        return {}, [describe_no_line(f"resized to {size}")]
    else:
        resize = read_pair(size, f"size {where}")
    if crop is None and len(resize) == 1:
        return {}, [describe_no_line(f"resized to a shorter side of {resize[0]} and not cropped")]
    resample = processor.get("resample")
    if resample is None:
        resample = 3 if bicubic else 2
    found, notes = describe_evaluation(
        resize=resize,
        crop=crop,
        interpolation=_INTERPOLATIONS[resample] if resample in list(_INTERPOLATIONS) else resample,
        rounding="down",
    )
    return {"image_size": crop or resize} | found, notes
