# SPDX-License-Identifier: Apache-2.0
"""Writes `peft/`: adapters that PEFT 0.21 saved, of models in `torch/`, and what these compute.

Run it with an interpreter that has torch, timm, transformers and peft:

  python tests/testdata/make_peft_golden.py

All parameters are random. Outputs are computed in float64 and stored in float32.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import timm
import torch
import transformers
from safetensors.torch import load_file

OUT = Path(__file__).parent / "peft"
MODELS = OUT.parent / "torch"


def save_case(name: str, model: torch.nn.Module, base: str, **options) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(init_lora_weights=False, **options)
    adapted = peft.get_peft_model(model, config).double().eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # The magnitudes of DoRA were the norms.
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    images = np.load(MODELS / base / "io.npz")["image"]
    with torch.no_grad():
        out = adapted(torch.from_numpy(images).double().permute(0, 3, 1, 2))
    logits = out.logits if hasattr(out, "logits") else out
    folder = OUT / name
    adapted.float().save_pretrained(folder)
    (folder / "README.md").unlink()
    stated = json.loads((folder / "adapter_config.json").read_text())
    stated["base_model_name_or_path"] = f"../../torch/{base}"
    (folder / "adapter_config.json").write_text(json.dumps(stated, indent=2) + "\n")
    np.savez(folder / "io.npz", logits=logits.float().numpy())


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    load = transformers.AutoModelForImageClassification.from_pretrained
    folder = str(MODELS / "hf_vit")
    save_case(
        "hf_vit",
        load(folder, num_labels=3, ignore_mismatched_sizes=True),
        "hf_vit",
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "fc2"],
        rank_pattern={"fc2": 3},
        alpha_pattern={"layers.1.attention.q_proj": 5},
        modules_to_save=["classifier"],
    )
    save_case(
        "hf_vit_dora", load(folder), "hf_vit", r=3, target_modules=["o_proj", "fc1"], use_dora=True
    )
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    model = timm.models.VisionTransformer(**sizes, num_classes=5, mlp_ratio=2)
    model.load_state_dict(load_file(MODELS / "timm_vit" / "model.safetensors"))
    save_case(
        "timm_vit",
        model,
        "timm_vit",
        r=4,
        lora_alpha=3,
        target_modules=["qkv", "fc1"],
        modules_to_save=["norm"],
        use_rslora=True,
    )


if __name__ == "__main__":
    main()
