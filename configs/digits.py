# SPDX-License-Identifier: Apache-2.0
"""A small Vision Transformer on handwritten digits (1,797 images of 8x8), from scratch.

python -m vit_jax.main --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 4000
    config.model = {
        "name": "vit",
        "patch_size": 2,
        "hidden_size": 48,
        "num_layers": 4,
        "num_heads": 4,
        "mlp_dim": 192,
        "representation_size": 48,
    }
    config.objective = {"name": "supervised", "mixup": 0.2, "label_smoothing": 0.05}
    config.data = {
        "name": "digits",
        "split": "train[:90%]",
        "preprocess": "decode|random_shift(1)",
        "batch_size": 64,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 2e-3,
        "schedule": "cosine",
        "warmup_steps": 200,
        "weight_decay": 0.05,
        "grad_clip_norm": 1.0,
    }
    config.evals = {
        "val": {"split": "train[90%:]", "preprocess": "decode", "every": 500},
        "test": {"split": "test", "preprocess": "decode"},
    }
    config.checkpoint = {"every": 500}
    config.log_every = 100
    return config
