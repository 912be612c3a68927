# SPDX-License-Identifier: Apache-2.0
"""A config that trains in seconds."""

from typing import Any

from ml_collections import ConfigDict

# Rows of 64 patches that four images share, of a model with `patch_size=4`.
PACKED = {
    "data.preprocess": "decode|patches(4, 64)",
    "data.images_per_row": 4,
    "data.batch_size": 256,
    "model.classifier": "gap",
    "model.posemb_grid": (8, 8),
}


def tiny_config(data_dir: str, **changes: Any) -> ConfigDict:
    """A small ViT on digits; `changes` by dotted key, dots written as two underscores."""
    config: dict[str, Any] = {
        "total_steps": 8,
        "model": {
            "patch_size": 2,
            "hidden_size": 16,
            "num_layers": 1,
            "num_heads": 4,
            "mlp_dim": 32,
        },
        "data": {
            "name": "digits",
            "split": "train",
            "preprocess": "decode|random_shift(1)",
            "batch_size": 16,
            "data_dir": data_dir,
        },
        "optimizer": {"lr": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, "grad_clip_norm": 1.0},
        "evals": {"val": {"split": "test[:50]", "preprocess": "decode", "every": 4}},
        "checkpoint": {"every": 4},
        "log_every": 2,
        "tracking": {"images": 0},
    }
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        section = config
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return ConfigDict(config)
