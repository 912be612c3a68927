# SPDX-License-Identifier: Apache-2.0
"""Trains ViT-B/16 on images of any size and aspect (NaFlex) on ImageNet-1k, from scratch.

python -m vit_jax.main --config=configs/naflex.py --workdir=runs/naflex_b16

An image keeps its aspect: it is resized to at most 128, 256 or 576 patches. Batches take these
budgets in turn, each with about as many tokens. timm publishes NaFlexVit models of this size after
300 epochs of up to 576 patches, with 83.3 % at 576 patches (naflexvit_base_patch16_gap,
github.com/huggingface/pytorch-image-models, results/results-imagenet.csv). Here nothing mixes
images, and the settings of the optimizer are those of vit_s16_i1k.py, so expect another number.
"""

from ml_collections import ConfigDict

PATCH = 16
# Patches, and images in a step: about 262,144 tokens.
BUDGETS = ((128, 2048), (256, 1024), (576, 448))


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.examples = 300 * 1_281_167
    config.precision = "bfloat16"
    config.model = {
        "name": "vit",
        "variant": "B/16",
        "classifier": "gap",
        "posemb_grid": (16, 16),
        "stochastic_depth_rate": 0.1,
    }
    config.objective = {"name": "supervised", "label_smoothing": 0.1}
    line = f"inception_patches({PATCH}, 256, area_min=8, method='bicubic_antialias')"
    config.data = {
        "name": "imagenet2012",
        "split": "train[:99%]",
        "preprocess": f"decode|flip_lr|{line}",
        "batch_size": 1024,
        "budgets": BUDGETS,
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
            "preprocess": f"decode|patches({PATCH}, {budget}, 'bicubic_antialias')",
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
