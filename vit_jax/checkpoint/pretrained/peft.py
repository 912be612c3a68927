# SPDX-License-Identifier: Apache-2.0
"""Reads and writes adapters in the layout of PEFT, the library of Hugging Face.

A folder of it has `adapter_config.json`, which names the base weights, and
`adapter_model.safetensors`. There, of a product `blocks.0.attn.qkv`, are

    base_model.model.blocks.0.attn.qkv.lora_A.weight  [rank, inputs]
    base_model.model.blocks.0.attn.qkv.lora_B.weight  [outputs, rank]
    base_model.model.blocks.0.attn.qkv.lora_magnitude_vector  [outputs], with DoRA

and whole parameters of layers that were trained as they are, such as a head. The sources are PEFT
0.21, `tuners/lora` and `utils/save_and_load.py`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from vit_jax.checkpoint.pretrained.config_json import check_keys, is_number
from vit_jax.models.lora import NAME, Lora, column_norms
from vit_jax.utils.bounds import shorten
from vit_jax.utils.errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
# Names that PEFT's wrappers add to those of the parameters that they keep.
_WRAPPERS = re.compile(r"\.(modules_to_save|base_layer|default)(?=\.)|\.default$")
_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?")
# Modules of transformers have other names in its files, which differ by version.
_SYNONYMS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(^|\.)encoder\.layers?\.", r"\1layers."),
        (r"(^|\.)layer\.(?=\d)", r"\1layers."),
        (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attention.\1_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(?<!attention)\.output\.dense\.", ".mlp.fc2."),
    )
)
# Keys that matter in training or for other programs alone, or that tensors show.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config"),
    *("megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision", "r"),
    *("runtime_config", "target_modules", "task_type"),
}
# The modules of PEFT for our layers of a block; timm computes queries, keys and values by one.
_TIMM = {"out": "attn.proj", "Dense_0": "mlp.fc1", "Dense_1": "mlp.fc2"}
_FUSED = ("query", "key", "value")
_HUGGINGFACE = {
    **{"query": "attention.q_proj", "key": "attention.k_proj", "value": "attention.v_proj"},
    **{"out": "attention.o_proj", "Dense_0": "mlp.fc1", "Dense_1": "mlp.fc2"},
}
_LAYER = re.compile(
    r"Transformer/encoderblock_(\d+)/\w+/(query|key|value|out|Dense_0|Dense_1)/kernel"
)
_PATTERNS = ("alpha_pattern", "rank_pattern")
_USED = {"peft_type", "lora_alpha", *_PATTERNS, "use_dora", "use_rslora", "init_lora_weights"}
# Other ways to initialise adapters change the base too: these would be added to the wrong one.
_INITS = (True, False, "gaussian", "eva", "orthogonal")
# What config.json says of a head, which adapters may replace.
_OF_HEADS = {"num_labels", "id2label", "label2id", "num_classes", "label_names"}
_OF_HEADS |= {"label_descriptions", "problem_type"}
_HEAD = re.compile(r"(^|\.)(head|classifier)\.weight$")


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters and whole parameters, to be added to the tensors of a base.

    Attributes:
      file: they were read from.
      base: the weights that they belong to, as `adapter_config.json` names them.
      revision: of a repository of the hub; None for its newest.
      config: content of `adapter_config.json`.
      products: for each adapted module its `lora_A`, `lora_B` and `lora_magnitude_vector`.
      whole: arrays that replace those of the base, by name.
    """

    file: epath.Path
    base: str
    revision: str | None
    config: Mapping[str, Any]
    products: Mapping[str, Mapping[str, np.ndarray]]
    whole: Mapping[str, np.ndarray]

    def add_to(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the tensors of the base, any float dtype, with the adapters added.

        Raises:
          UserError: the base has no such product, or one of other sizes.
        """
        added = dict(tensors)
        for module, parts in sorted(self.products.items()):
            name = self._find(f"{module}.weight", tensors)
            if name is None:
                raise UserError(
                    f"{self.file}: {self.base} has no product {module}; it has "
                    f"{', '.join(sorted(tensors)[:3])}, ...: expected the weights that the "
                    "adapters were trained on"
                )
            added[name] = self._adapt(module, parts, tensors[name])
        for name, x in self.whole.items():
            added[self._find(name, tensors) or name] = x
        return added

    def describe_base(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the `config.json` of the base, without what it says of a replaced head."""
        if not any(map(_HEAD.search, self.whole)):
            return dict(config)
        kept = {key: value for key, value in config.items() if key not in _OF_HEADS}
        return {k: self.describe_base(v) if isinstance(v, dict) else v for k, v in kept.items()}

    def _find(self, name: str, tensors: Mapping[str, Any]) -> str | None:
        """The tensor of the base with a name, which a model around it may lengthen."""
        wanted = _canonical(name)
        known = {_canonical(other): other for other in tensors}
        if wanted in known:
            return known[wanted]
        pairs = ((wanted, other) for other in known)
        near = [b for a, b in pairs if a.endswith(f".{b}") or b.endswith(f".{a}")]
        return known[max(near, key=len)] if near else None

    def _adapt(
        self, module: str, parts: Mapping[str, np.ndarray], kernel: np.ndarray
    ) -> np.ndarray:
        if not {"lora_A", "lora_B"} <= parts.keys():
            raise UserError(f"{self.file}: {module} lacks one of lora_A and lora_B")
        a, b = (np.asarray(parts[name], np.float32) for name in ("lora_A", "lora_B"))
        if a.ndim < 2 or b.ndim < 2 or not a.size or not b.size:
            raise UserError(
                f"{self.file}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}: "
                "expected [rank, inputs] and [outputs, rank], of a rank above 0"
            )
        rank, matrix = len(a), kernel.astype(np.float32).reshape(len(kernel), -1)
        a, b = a.reshape(rank, -1), b.reshape(len(b), -1)  # Those of a convolution have more axes.
        if b.shape[1] != rank or (len(b), a.shape[1]) != matrix.shape:
            raise UserError(
                f"{self.file}: {module} has {b.shape} x {a.shape}; the base has {matrix.shape}"
            )
        adapted = matrix + self._scale(module, rank) * (b @ a)
        if "lora_magnitude_vector" in parts:
            norms, magnitude = np.linalg.norm(adapted, axis=1), parts["lora_magnitude_vector"]
            if magnitude.size != norms.size:
                raise UserError(
                    f"{self.file}: {module} has lora_magnitude_vector {list(magnitude.shape)}: "
                    f"expected one for each of the {norms.size} outputs"
                )
            norms = np.where(norms > 0, norms, 1)
            adapted *= (magnitude.astype(np.float32).ravel() / norms)[:, None]
        return adapted.reshape(kernel.shape).astype(kernel.dtype)

    def _scale(self, module: str, rank: int) -> float:
        alpha, found = self.config.get("lora_alpha", 8), self.config.get("alpha_pattern") or {}
        for pattern, value in found.items():
            if re.fullmatch(_whole_name(pattern), module):
                alpha = value
                break
        if not is_number(alpha):
            raise UserError(f"{self.file}: lora_alpha={shorten(alpha)} in {CONFIG}: no number")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _whole_name(pattern: str) -> str:
    """Returns the expression by which PEFT compares names of modules with that of a pattern."""
    return rf"(.*\.)?({pattern})"


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises `ValueError` for adapters of another kind than `Adapters` adds."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type={shorten(config.get('peft_type'))}: expected 'LORA'")
    check_keys({k: x for k, x in config.items() if x}, _HARMLESS | _USED, file=CONFIG)
    init = config.get("init_lora_weights")
    if init is not None and (init.lower() if isinstance(init, str) else init) not in _INITS:
        raise ValueError(
            f"init_lora_weights={shorten(init)}: such adapters belong to a base that was changed "
            f"with them; expected one of {', '.join(map(repr, _INITS))}: convert them first by "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) of PEFT"
        )
    for key in _PATTERNS:
        patterns = config.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise ValueError(f"{key}={shorten(patterns)}: expected an object of numbers by pattern")
        for pattern, value in patterns.items():
            try:
                re.compile(_whole_name(pattern))
            except (re.error, OverflowError, RecursionError):
                raise ValueError(
                    f"{key} has {shorten(pattern)}: expected a regular expression"
                ) from None
            if not is_number(value):
                raise ValueError(
                    f"{key}: {shorten(pattern)} has {shorten(value)}: expected a number"
                )


def read_adapters(
    file: epath.Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> Adapters:
    """Reads adapters.

    Args:
      file: with the tensors.
      tensors: of `adapter_model.safetensors`, any float dtype.
      config: content of `adapter_config.json`.

    Raises:
      UserError: the config names no base, or the adapters are of a kind that is not known here.
    """
    try:
        _check_config(config)
        base = config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ValueError("base_model_name_or_path: expected the base weights")
    except ValueError as error:
        raise UserError(f"{file.parent / CONFIG}: {error}") from None
    products: dict[str, dict[str, np.ndarray]] = {}
    whole = {}
    for full, x in tensors.items():
        name = _WRAPPERS.sub("", full.removeprefix(_PREFIX))
        if match := _PART.fullmatch(name):
            products.setdefault(match[1], {})[match[2]] = x
        elif "lora_" in name:
            raise UserError(f"{file}: {full} is not supported: expected lora_A and lora_B")
        else:
            whole[name] = x
    return Adapters(file, base, config.get("revision"), config, products, whole)


@dataclasses.dataclass(frozen=True)
class _Product:
    """An adapter as PEFT has it: scale B A, and with DoRA the norms of the rows of the result."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    norms: np.ndarray | None


def make_adapters(
    trained: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
    lora: Lora,
    *,
    layout: str,
    name: str,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors and the config of adapters as PEFT loads them.

    They are for a model of timm or, if the base is a ViT of Hugging Face, of transformers 5.

    Args:
      trained: what a checkpoint holds, without stacked blocks: adapters and heads.
      base: the parameters that they are added to.
      lora: what they were trained with.
      layout: of the base, as `Weights.layout`.
      name: of the base, as PEFT's `base_model_name_or_path`.

    Raises:
      UserError: the base is of another layout, or something else than adapters of blocks and a head
        is not of the base.
    """
    of_timm = layout in ("timm safetensors", "vit_jax safetensors")
    if not of_timm and layout != "Hugging Face ViT safetensors":
        raise UserError(
            f"adapters of PEFT belong to a .safetensors file of timm or of a ViT of Hugging Face, "
            f"and these to {name} ({layout}); expected a run that starts from such a file, or DST "
            "as a .safetensors file with the adapters added"
        )
    layers: dict[tuple[str, str], _Product] = {}
    whole = {}
    is_gated = any(path.endswith("/gate/kernel") for path in base)
    for path, x in trained.items():
        if path.startswith("head/"):
            head, kind = ("head" if of_timm else "classifier"), path.rpartition("/")[2]
            whole[f"{head}.{'weight' if kind == 'kernel' else kind}"] = np.asarray(x).T
            continue
        kernel = path.rpartition(f"/{NAME}/")[0] + "/kernel"
        match = _LAYER.fullmatch(kernel)
        if match is None or (is_gated and match[2].startswith("Dense")):
            raise UserError(
                f"{path} is not of the base; PEFT takes adapters of attention and of MLPs without "
                "gates, and a head: write DST as a .safetensors file with the adapters added"
            )
        layers[match[1], match[2]] = _make_product(trained, base[kernel], kernel, lora)
    modules: dict[str, _Product] = {}
    for (block, layer), product in layers.items():
        if not of_timm:
            modules[f"vit.layers.{block}.{_HUGGINGFACE[layer]}"] = product
        elif layer in _TIMM:
            modules[f"blocks.{block}.{_TIMM[layer]}"] = product
        else:
            modules[f"blocks.{block}.attn.qkv"] = _fuse(block, layers, base)
    tensors = {f"{_PREFIX}{key}": x for key, x in whole.items()}
    for module, product in modules.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = product.a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = product.b
        if product.norms is not None:
            tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = product.norms
    ranks = {module: len(product.a) for module, product in modules.items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": name,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": {re.escape(module): rank for module, rank in ranks.items()},
        "alpha_pattern": {re.escape(m): p.scale * ranks[m] for m, p in modules.items()},
        "target_modules": sorted(modules),
        "modules_to_save": sorted({key.rpartition(".")[0] for key in whole}) or None,
        "use_dora": lora.method == "dora",
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return tensors, config


def _make_product(
    trained: Mapping[str, np.ndarray], kernel: np.ndarray, path: str, lora: Lora
) -> _Product:
    own = f"{path.removesuffix('/kernel')}/{NAME}"
    a, b = (np.asarray(trained[f"{own}/{part}"], np.float32) for part in "ab")
    scale, norms = lora.scale(path, a.shape[1]), None
    if lora.method == "dora":
        before, _ = column_norms(np.asarray(kernel).reshape(len(a), -1), a, b, scale, xp=np)
        norms = np.asarray(trained[f"{own}/magnitude"], np.float32) * before
    return _Product(a.T, b.T, scale, norms)


def _fuse(
    block: str, layers: Mapping[tuple[str, str], _Product], base: Mapping[str, np.ndarray]
) -> _Product:
    """One adapter of queries, keys and values, whose B is zero between these."""
    found = {layer: layers[block, layer] for layer in _FUSED if (block, layer) in layers}
    scale = next(iter(found.values())).scale
    ranks = [len(product.a) for product in found.values()]
    width = len(next(iter(found.values())).b)
    b = np.zeros((len(_FUSED) * width, sum(ranks)), np.float32)
    norms = []
    for i, layer in enumerate(_FUSED):
        path = f"Transformer/encoderblock_{block}/MultiHeadDotProductAttention_0/{layer}/kernel"
        kernel = np.asarray(base[path], np.float32).reshape(base[path].shape[0], -1)
        norm = np.linalg.norm(kernel, axis=0)
        if layer in found:
            product, start = found[layer], sum(ranks[: list(found).index(layer)])
            columns = slice(start, start + len(product.a))
            b[i * width : (i + 1) * width, columns] = product.b * (product.scale / scale)
            norm = product.norms
        norms.append(norm)
    a = np.concatenate([product.a for product in found.values()])
    is_dora = all(norm is not None for norm in norms)
    return _Product(a, b, scale, np.concatenate(norms) if is_dora else None)


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Writes `adapter_config.json`."""
    path.write_text(json.dumps(config, indent=2) + "\n")


def _canonical(name: str) -> str:
    for pattern, replacement in _SYNONYMS:
        name = pattern.sub(replacement, name)
    return name
