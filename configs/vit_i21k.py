# SPDX-License-Identifier: Apache-2.0
"""Pre-trains a ViT on ImageNet-21k; arguments are variant=SIZE/PATCH and aug=LEVEL.

python -m vit_jax.main --config=configs/vit_i21k.py:variant=B/16 --workdir=runs/vit_b16_i21k \
    --config.data.name=folder:/data/imagenet21k

Recipe: arXiv:2106.10270 (AugReg), 300 epochs of batch 4096 with the sigmoid loss. Augmentation and
weight decay are those of the checkpoints that the authors recommend, if aug=LEVEL does not say
otherwise; the levels are those of vit_i1k.py. Published, fine-tuned on ImageNet-1k at 384 pixels
(github.com/google-research/vision_transformer): Ti/16 78.22 %, S/32 79.58 %, S/16 83.73 %,
B/32 83.59 %, B/16 85.49 %, L/16 85.59 %.

The folder holds train/CLASS/IMAGE; TFDS has no builder of the 21,843 classes. `test` and `val` are
the first 51,200 images, which no gradient sees.
"""

from ml_collections import ConfigDict

from vit_jax.models.names import normalize_variant
from vit_jax.utils.errors import UserError
from vit_jax.utils.suggestions import suggest

TRAIN_EXAMPLES = 14_197_122 - 51_200
# Level of augmentation and weight decay of the recommended checkpoints.
VARIANTS = {
    "Ti/16": ("none", 0.03),
    "S/32": ("none", 0.1),
    "S/16": ("light1", 0.03),
    "B/32": ("light1", 0.1),
    "B/16": ("medium1", 0.1),
    "L/16": ("strong1", 0.1),
}
# Operations after the crop, and mixup.
LEVELS = {
    "none": ("", 0.0),
    "light1": ("|randaug(2, 0, variant='augreg')", 0.0),
    "light2": ("|randaug(2, 10, variant='augreg')", 0.2),
    "medium1": ("|randaug(2, 15, variant='augreg')", 0.2),
    "medium2": ("|randaug(2, 15, variant='augreg')", 0.5),
    "strong1": ("|randaug(2, 20, variant='augreg')", 0.5),
    "strong2": ("|randaug(2, 20, variant='augreg')", 0.8),
}


def parse_arguments(text: str) -> tuple[str, str]:
    """The variant and the level of augmentation."""
    arguments = {k: v for k, _, v in (part.partition("=") for part in text.split(","))}
    variant = normalize_variant(arguments.pop("variant", ""))
    if variant not in VARIANTS:
        raise UserError(f"--config: variant={variant!r} is none here{suggest(variant, VARIANTS)}")
    level = arguments.pop("aug", VARIANTS[variant][0])
    if arguments:
        raise UserError(f"--config: {text!r}: expected variant=SIZE/PATCH, or that and aug=LEVEL")
    if level not in LEVELS:
        raise UserError(f"--config: aug={level!r} is no level{suggest(level, LEVELS)}")
    return variant, level


def get_config(arguments: str = "variant=B/16") -> ConfigDict:
    variant, level = parse_arguments(arguments)
    randaug, mixup = LEVELS[level]
    batch_size = 4096

    config = ConfigDict()
    config.seed = 0
    config.examples = 300 * TRAIN_EXAMPLES
    config.precision = "bfloat16_moments"
    config.model = {
        "name": "vit",
        "variant": variant,
        "num_classes": 21_843,
        "head_bias_init": -10.0,
    }
    config.objective = {"name": "supervised", "loss": "sigmoid", "mixup": mixup}
    config.data = {
        "name": "folder:imagenet21k",
        "split": "train[51200:]",
        "preprocess": f"decode|inception_crop(224, variant='tensorflow')|flip_lr{randaug}",
        "batch_size": batch_size,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup_examples": 10_000 * batch_size,
        "weight_decay": VARIANTS[variant][1],
        "grad_clip_norm": 1.0,
    }
    preprocess = "decode|resize_small(256, method='area')|central_crop(224)"
    config.evals = {
        "val": {"split": "train[25600:51200]", "preprocess": preprocess, "every": 5000},
        "test": {"split": "train[:25600]", "preprocess": preprocess, "every": 5000},
    }
    config.checkpoint = {"every": 2500}
    return config
