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
    *("eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config"),
    *("megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision", "r"),
    *("runtime_config", "target_modules", "task_type"),
}
_USED = {"peft_type", "lora_alpha", "alpha_pattern", "rank_pattern", "use_dora", "use_rslora"}
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
        for module, parts in self.products.items():
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
        rank, matrix = len(a), kernel.astype(np.float32).reshape(len(kernel), -1)
        a, b = a.reshape(rank, -1), b.reshape(len(b), -1)  # Those of a convolution have more axes.
        if b.shape[1] != rank or (len(b), a.shape[1]) != matrix.shape:
            raise UserError(
                f"{self.file}: {module} has {b.shape} x {a.shape}; the base has {matrix.shape}"
            )
        adapted = matrix + self._scale(module, rank) * (b @ a)
        if "lora_magnitude_vector" in parts:
            norms = np.linalg.norm(adapted, axis=1)
            adapted *= (parts["lora_magnitude_vector"].astype(np.float32).ravel() / norms)[:, None]
        return adapted.reshape(kernel.shape).astype(kernel.dtype)

    def _scale(self, module: str, rank: int) -> float:
        alpha, found = self.config.get("lora_alpha", 8), self.config.get("alpha_pattern") or {}
        for pattern, value in found.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        if not is_number(alpha):
            raise UserError(f"{self.file}: lora_alpha={shorten(alpha)} in {CONFIG}: no number")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


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
        if config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type={shorten(config.get('peft_type'))}: expected 'LORA'")
        stated = {key: value for key, value in config.items() if value}
        check_keys(stated, _HARMLESS | _USED, file=CONFIG)
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


def _canonical(name: str) -> str:
    for pattern, replacement in _SYNONYMS:
        name = pattern.sub(replacement, name)
    return name
