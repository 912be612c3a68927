# SPDX-License-Identifier: Apache-2.0
"""Runs models of timm for `tests/test_torch.py`, with an interpreter that has torch and timm.

  python tests/testdata/run_timm.py FOLDER

FOLDER/cases.json maps a name to a function of timm and its arguments. For each, FOLDER/NAME has
`image.npy` and `ours.safetensors`, weights to load. The logits for these go to `ours.npy`; a model
with random weights to `theirs.safetensors`, its logits to `theirs.npy`.
"""

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import HybridEmbed, StdConv2dSame
from timm.models.resnetv2 import ResNetV2


def make_backbone(**kwargs) -> partial:
    """Returns timm's patch embedding of a hybrid with a ResNet of other sizes than published."""
    conv = partial(StdConv2dSame, eps=1e-8)
    options = {"num_classes": 0, "global_pool": "", "preact": False, "stem_type": "same"}
    return partial(HybridEmbed, backbone=ResNetV2(conv_layer=conv, **options, **kwargs))


def make_model(function: str, arguments: dict) -> torch.nn.Module:
    """Calls a function of timm by its name, as in `timm.models.eva.Eva`."""
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
    if "backbone" in arguments:
        arguments["embed_layer"] = make_backbone(**arguments.pop("backbone"))
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)(**arguments).eval()


def randomize(model: torch.nn.Module) -> None:
    """Moves all parameters away from where they start: many are zero or one there."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def main(folder: Path) -> None:
    for name, (function, arguments) in json.loads((folder / "cases.json").read_text()).items():
        torch.manual_seed(0)
        model = make_model(function, arguments)
        image = torch.from_numpy(np.load(folder / name / "image.npy")).permute(0, 3, 1, 2)
        with torch.no_grad():
            randomize(model)
            save_file(model.state_dict(), folder / name / "theirs.safetensors")
            np.save(folder / name / "theirs.npy", model(image).numpy())
            model.load_state_dict(load_file(folder / name / "ours.safetensors"), strict=True)
            np.save(folder / name / "ours.npy", model(image).numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
