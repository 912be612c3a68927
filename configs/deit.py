# SPDX-License-Identifier: Apache-2.0
"""Trains DeiT, a ViT on only ImageNet-1k, from scratch; the argument is the size: Ti, S or B.

python -m vit_jax.main --config=configs/deit.py:S --workdir=runs/deit_s16

Recipe: arXiv:2012.12877, as in github.com/facebookresearch/deit: 300 epochs of batch 1024, in which
each image occurs three times, with different augmentation. Another data.batch_size scales the
learning rate. Published: Ti/16 72.2 %, S/16 79.9 % (64 hours on four GPUs), B/16 81.8 %; without
averaged parameters. With a teacher: distill.py.
"""

from ml_collections import ConfigDict

from vit_jax.models.names import normalize_variant
from vit_jax.utils.errors import UserError

SIZES = ("Ti", "S", "B")


def get_config(size: str = "S") -> ConfigDict:
    size = normalize_variant(size).removesuffix("/16")
    if size not in SIZES:
        raise UserError(f"--config: {size!r} is no size of DeiT: expected {', '.join(SIZES)}")

    config = ConfigDict()
    config.seed = 0
    config.epochs = 300
    config.ema_decay = 0.99996
    config.ema_warmup = "none"
    config.precision = "bfloat16"
    config.model = {
        "name": "vit",
        "variant": f"{size}/16",
        "activation": "gelu_erf",
        "stochastic_depth_rate": 0.1,
    }
    config.objective = {
        "name": "supervised",
        "label_smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "random_erasing": 0.25,
        "pixel_mean": (0.485, 0.456, 0.406),
        "pixel_std": (0.229, 0.224, 0.225),
    }
    crop = "inception_crop(224, area_min=8, method='bicubic_antialias', variant='torchvision')"
    config.data = {
        "name": "imagenet2012",
        "split": "train",
        "preprocess": f"decode|{crop}|flip_lr|rand_augment('rand-m9-mstd0.5-inc1', variant='timm')",
        "batch_size": 1024,
        "repeats": 3,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 5e-4,
        "lr_scaling": "linear",
        "base_batch_size": 512,
        "schedule": "cosine",
        "decay_from": "start",
        "lr_every": "epoch",
        "warmup_epochs": 5,
        "start_lr": 1e-6,
        "end_lr": 1e-5,
        "weight_decay": 0.05,
    }
    config.evals = {
        "val": {
            "split": "validation",
            "preprocess": "decode|resize_small(256, 'bicubic_antialias', rounding='down')"
            "|central_crop(224, rounding='nearest')",
            "every_epochs": 10,
        },
    }
    config.checkpoint = {"every_epochs": 2}
    return config
