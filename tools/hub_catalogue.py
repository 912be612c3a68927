# SPDX-License-Identifier: Apache-2.0
"""Writes the list of published models on the Hugging Face hub that can be loaded here.

    build/torch/bin/python tools/hub_registry.py > registry.jsonl
    python -m tools.hub_catalogue registry.jsonl results-imagenet.csv

The second file is `results/results-imagenet.csv` of timm's repository. A model is listed if the
loader reads tensors of its shapes, and rebuilds a model with the attention heads, the activation
and the epsilon of timm; the others are printed with the reason. Needs no network.
`--examples` writes the smallest architecture of each family, as tests read it.
"""

import argparse
import csv
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.checkpoint.pretrained.rebuild import check_complete
from vit_jax.checkpoint.pretrained.repositories import (
    REPOSITORIES,
    Repository,
    write_repositories,
)
from vit_jax.checkpoint.pretrained.safetensors import read_safetensors, write_tensors
from vit_jax.models.block_config import BlockConfig
from vit_jax.utils.errors import UserError, first_line
from vit_jax.utils.streams import print_result

# The first pattern that is found in a name decides.
_FAMILIES = (
    ("^timm:g?mixer_", "MLP-Mixer"),
    ("naflexvit_", "NaFlex"),
    ("flexivit_", "FlexiViT"),
    ("siglip2|v2_webli", "SigLIP 2"),
    ("siglip", "SigLIP"),
    ("eupe", "EUPE"),
    ("dinov3", "DINOv3"),
    ("dinov2", "DINOv2"),
    (r"\.dino$", "DINO"),
    (r"\.mae$", "MAE"),
    ("ijepa", "I-JEPA"),
    ("eva02_", "EVA-02"),
    ("eva_", "EVA"),
    ("beit3_", "BEiT-3"),
    ("beitv2_", "BEiT v2"),
    ("beit_", "BEiT"),
    ("deit3_", "DeiT III"),
    ("deit_", "DeiT"),
    ("vit_pe_", "PE"),
    (r"\.dfn", "DFN"),
    ("metaclip", "MetaCLIP"),
    ("openai", "CLIP"),
    ("_clip_|clip-", "OpenCLIP"),
    ("tipsv2", "TIPS v2"),
    ("_rope_", "ViT with rotary embeddings"),
    (r"_r\d+_|_r_s16_|_resnet", "hybrid"),
    (r"\.augreg", "AugReg"),
    (r"\.sam", "SAM"),
    ("", "ViT"),
)
_ACTIVATIONS = {
    "gelu_erf": "GELU none",
    "gelu_tanh": "GELUTanh",
    "quick_gelu": "QuickGELU",
    "swiglu": "SiLU",
}


def find_family(name: str) -> str:
    """Returns the project or the method that weights are of, by their name."""
    return next(family for pattern, family in _FAMILIES if re.search(pattern, name))


def find_fault(model: Mapping[str, Any]) -> str:
    """Returns why a model of the registry can't be loaded; "" if it can.

    `model` is a line of `tools/hub_registry.py` with shapes.
    """
    tensors = {name: np.ones(shape, np.uint8) for name, shape in model["shapes"].items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        write_tensors(path, tensors, metadata={"format": "pt"})
        path.with_name("config.json").write_text(json.dumps(model["config"]))
        try:
            weights = read_safetensors(path)
            check_complete(weights)
        except UserError as e:
            return first_line(e).replace(f"{path}: ", "").partition("; expected the whole")[0]
    ours = {
        "num_heads": weights.model.get("num_heads"),  # None in a Mixer.
        "norm_epsilon": weights.model.get("norm_epsilon", BlockConfig.norm_epsilon),
        "activation": _ACTIVATIONS.get(weights.model["activation"]),
    }
    wrong = [key for key, value in ours.items() if value != model[key]]
    return ", ".join(f"{key} is {model[key]!r}, and {ours[key]!r} here" for key in wrong)


def make_rows(
    models: Sequence[Mapping[str, Any]], results: Mapping[str, Mapping[str, str]]
) -> tuple[list[Repository], dict[str, str]]:
    """Returns the rows of models that can be loaded, and the reasons against the others by name.

    Args:
      models: lines of `tools/hub_registry.py`.
      results: rows of timm's results by the name of the model.
    """
    faults: dict[str, str] = {}
    sizes: dict[str, float] = {}
    rows, refused = [], {}
    for model in models:
        key, name = model["key"], model["name"]
        if "num_params" in model:
            sizes[key] = model["num_params"] / 1e6
        if "shapes" in model:
            faults[key] = find_fault(model)
        fault = faults.get(key, "")
        if not fault and model["repository"] != name.removeprefix("hf:").replace(":", "/"):
            fault = f"it is not in timm's repositories, but in {model['repository']!r}"
        if not fault and not model["licence"]:
            fault = "timm states no licence"
        if fault:
            refused[name] = fault
            continue
        result = results.get(name.removeprefix("timm:"), {})
        rows.append(
            Repository(
                name=name,
                family=find_family(name),
                image_size=tuple(model["image_size"]),
                num_classes=model["num_classes"],
                million_params=round(sizes[key], 1),
                licence=model["licence"],
                top1=float(result["top1"]) if result else None,
                top1_image_size=int(result["img_size"]) if result else None,
            )
        )
    return rows, refused


def choose_examples(
    models: Sequence[Mapping[str, Any]], rows: Sequence[Repository]
) -> list[Mapping[str, Any]]:
    """Returns the line of the registry with the fewest parameters, of each family in timm."""
    families = {row.name: row.family for row in rows}
    shown = {m["key"]: m for m in models if "shapes" in m}
    known = [{**shown.get(m["key"], {}), **m} for m in models if m["name"] in families]
    known = [m for m in known if "shapes" in m]
    known.sort(key=lambda m: m["num_params"], reverse=True)
    return list({families[m["name"]]: m for m in known}.values())


def main() -> None:
    """Writes the list, and prints what is not in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("registry", type=Path, help="output of tools/hub_registry.py")
    parser.add_argument("results", type=Path, help="timm's results-imagenet.csv")
    parser.add_argument("--examples", type=Path, help="file of examples")
    args = parser.parse_args()
    models = [json.loads(line) for line in args.registry.read_text().splitlines()]
    with args.results.open(newline="") as file:
        results = {row["model"]: row for row in csv.DictReader(file)}
    rows, refused = make_rows(models, results)
    write_repositories(rows)
    if args.examples is not None:
        lines = (json.dumps(m, separators=(",", ":")) for m in choose_examples(models, rows))
        args.examples.write_text("".join(f"{line}\n" for line in lines))
    for name, fault in refused.items():
        print_result(f"{name}: {fault}")
    print_result(f"wrote {len(rows)} models to {REPOSITORIES}; {len(refused)} are not listed")


if __name__ == "__main__":
    main()
