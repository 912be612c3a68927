# SPDX-License-Identifier: Apache-2.0
"""Trains NaViT-B/16, whose images of all sizes share rows, on ImageNet-1k (arXiv:2307.06304).

python -m vit_jax.main --config=configs/navit.py --workdir=runs/navit_b16

Four images share a row of 1,024 patches. Their sides are drawn from a range whose ends differ by a
factor of six, as of 64 to 384 pixels in the paper, and up to half of the patches of an image are
left out. Positions are factorised, attention normalises queries and keys, and a learned query pools
each image. The paper trains on JFT-4B, and publishes neither code nor an accuracy after training on
ImageNet alone, so none is given here; the optimizer is that of vit_s16_i1k.py.
"""

from ml_collections import ConfigDict

PATCH = 16
TOKENS = 1024  # of a row


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.examples = 90 * 1_281_167
    config.precision = "bfloat16"
    config.model = {
        "name": "vit",
        "variant": "B/16",
        "classifier": "map",
        "position_embedding": "factorized",
        "posemb_grid": (24, 24),
        "qk_norm": True,
        "qkv_bias": "none",
    }
    config.objective = {"name": "supervised", "loss": "sigmoid"}
    config.data = {
        "name": "imagenet2012",
        "split": "train[:99%]",
        "preprocess": f"decode|flip_lr|inception_patches({PATCH}, {TOKENS}, area_min=8)",
        "batch_size": 1024,
        "images_per_row": 4,
        "size_spread": 6.0,
        "drop_patches": (0.0, 0.5),
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 10_000,
        "weight_decay": 0.1,
        "grad_clip_norm": 1.0,
    }
    config.evals = {
        name: {
            "split": split,
            "preprocess": f"decode|patches({PATCH}, {budget})",
            "batch_size": 512,
            "every": every,
        }
        for name, split, budget, every in (
            ("minival", "train[99%:]", 256, 5000),
            ("val", "validation", 256, 20_000),
            ("val576", "validation", 576, 20_000),
        )
    }
    config.checkpoint = {"every": 5000}
    return config
