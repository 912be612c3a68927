# SPDX-License-Identifier: Apache-2.0
"""Trains DeiT-S/16 with a distillation token on ImageNet-1k (arXiv:2012.12877).

python -m vit_jax.main --config=configs/distill.py --workdir=runs/deit_s16_distilled

The argument is the teacher: distill.py:augreg+imagenet2012:B/16@224, a name, file or workdir of a
model of the same classes. The published 81.2 % (83.4 % for B/16, --config.model.variant=B/16) have
a RegNetY-16GF as teacher, which is not available here, so expect another number. Each image
occurs three times in a batch, with different augmentation.
"""

from ml_collections import ConfigDict


def get_config(teacher: str = "augreg+imagenet2012:B/16@224") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.epochs = 300
    config.ema_decay = 0.99996
    config.ema_warmup = "none"
    config.precision = "bfloat16"
    config.model = {
        "name": "vit",
        "variant": "S/16",
        "distillation_token": True,
        "activation": "gelu_erf",
        "stochastic_depth_rate": 0.1,
    }
    config.objective = {
        "name": "distillation",
        "teacher": teacher,
        "kind": "hard",
        "alpha": 0.5,
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
    config.log_every = 50
    return config
