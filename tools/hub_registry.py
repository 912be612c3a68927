# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Prints what timm's registry and transformers state of published models, without their weights.

    build/torch/bin/python tools/hub_registry.py > registry.jsonl

It needs torch, timm and transformers, and no network; `tools/hub_catalogue.py` reads the result.
Each line is a JSON object with the name, the licence and the size of the images of one model. The
first model of each architecture also has the shapes of its tensors, of two of its blocks, and
what the library computes with them.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from timm.models import _registry
from timm.models._hub import save_config_for_hf

MODULES = (
    *("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "deit"),
    *("eva", "beit", "naflexvit", "mlp_mixer", "cait"),
)
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_DINOV2 = {"image_size": 518, "patch_size": 14}
_DINOV3 = {"image_size": 224, "patch_size": 16, "num_register_tokens": 4}
_SIZES = {
    "small": (384, 6, {}),
    "base": (768, 12, {}),
    "large": (1024, 16, {"num_hidden_layers": 24}),
    "giant": (1536, 24, {"num_hidden_layers": 40, "use_swiglu_ffn": True}),
}
# Repositories of transformers, which has no registry: the class, the arguments of its config that
# are not the defaults, and the licence that its page states.
REPOSITORIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "google/vit-base-patch16-224": (
        "ViTForImageClassification",
        {"num_labels": 1000},
        "apache-2.0",
    ),
    "google/vit-base-patch16-224-in21k": ("ViTModel", {}, "apache-2.0"),
    **{
        f"facebook/dinov2-{extra}{size}": (
            kind,
            {"hidden_size": width, "num_attention_heads": heads, **more, **_DINOV2},
            "apache-2.0",
        )
        for extra, kind in (("", "Dinov2Model"), ("with-registers-", "Dinov2WithRegistersModel"))
        for size, (width, heads, more) in _SIZES.items()
    },
    **{
        f"facebook/dinov3-{size}-pretrain-{data}": (
            "DINOv3ViTModel",
            {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
            | {"num_hidden_layers": layers, **_DINOV3}
            | ({"use_gated_mlp": True, "hidden_act": "silu"} if gated else {}),
            "dinov3-license",
        )
        for size, data, width, layers, heads, gated in (
            ("vits16", "lvd1689m", 384, 12, 6, False),
            ("vits16plus", "lvd1689m", 384, 12, 6, True),
            ("vitb16", "lvd1689m", 768, 12, 12, False),
            ("vitl16", "lvd1689m", 1024, 24, 16, False),
            ("vitl16", "sat493m", 1024, 24, 16, False),
            ("vith16plus", "lvd1689m", 1280, 32, 20, True),
        )
    },
    "facebook/ijepa_vith14_1k": (
        "IJepaModel",
        {
            **{"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16},
            **{"num_hidden_layers": 32, "patch_size": 14},
        },
        "cc-by-nc-4.0",
    ),
    "google/siglip-base-patch16-224": ("SiglipModel", {}, "apache-2.0"),
}


def print_timm() -> None:
    """Prints the pretrained models of the modules that have Vision Transformers."""
    shown = set()
    for name in timm.list_pretrained():
        architecture = name.partition(".")[0]
        if _registry._model_to_module[architecture] not in MODULES:
            continue
        stated = timm.get_pretrained_cfg(name)
        row: dict[str, Any] = {
            "name": f"timm:{name}",
            "repository": stated.hf_hub_id or "",
            "licence": stated.license or "",
            "image_size": stated.input_size[1:],
            "num_classes": stated.num_classes,
        }
        key = architecture, stated.num_classes, tuple(stated.input_size)
        row["key"] = " ".join(map(str, key))
        if key not in shown:
            shown.add(key)
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "config.json"
                save_config_for_hf(model, str(path))
                row["config"] = json.loads(path.read_text())
            row |= describe_timm(model)
        print(json.dumps(row), flush=True)


def describe_timm(model: Any) -> dict[str, Any]:
    """Returns the shapes of the tensors in two blocks, and numbers that no shape shows."""
    shapes = {}
    for name, x in model.state_dict().items():
        shapes[name] = list(x.shape)
        if (match := _BLOCK.match(name)) and int(match[1]) > 1:
            del shapes[name]
    if "rope.freqs" in shapes:
        shapes["rope.freqs"][1] = 2
    block = model.blocks[0] if hasattr(model, "blocks") else None
    mlp = getattr(block, "mlp", getattr(block, "mlp_channels", None))
    act = getattr(mlp, "act", None)
    return {
        "shapes": shapes,
        "num_params": sum(x.numel() for x in model.parameters()),
        "num_heads": getattr(getattr(block, "attn", None), "num_heads", None),
        "norm_epsilon": getattr(getattr(block, "norm1", None), "eps", None),
        "activation": f"{type(act).__name__} {getattr(act, 'approximate', '')}".strip(),
    }


def print_transformers() -> None:
    """Prints the models of `REPOSITORIES`; their files have other names than the model's tensors.

    Frozen cases in tests/testdata hold that the loader reads files of these classes.
    """
    for name, (kind, arguments, licence) in REPOSITORIES.items():
        make = getattr(transformers, kind)
        config = make.config_class(**arguments)
        with torch.device("meta"):
            model = make(config)
        size = getattr(config, "vision_config", config).image_size
        head = getattr(model, "classifier", None)
        row = {
            "name": f"hf:{name}",
            "repository": name,
            "licence": licence,
            "image_size": [size, size],
            "num_classes": 0 if head is None else head.out_features,
            "key": name,
            "num_params": sum(x.numel() for x in model.parameters()),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    print_timm()
    print_transformers()
