# SPDX-License-Identifier: Apache-2.0
"""Continues the training of a ViT without labels, on your own images (DINO, iBOT and KoLeo).

python -m vit_jax.main --config=configs/dino_continue.py:/models/dinov2-small \
    --workdir=runs/continued --config.data.name=folder:/data/mine

The argument is what to start from: a file, folder, name or workdir of any ViT
(docs/checkpoints.md); without it nothing is loaded. Released backbones come without the heads that
they were trained with, so new heads are trained first, while the backbone stays as it is: for the
first 5 % of the run. Then everything is trained, with a small learning rate that falls towards the
input. The model is DINOv2's S/14; for another one set model.variant and what else differs, such as
--config.model.layer_scale_init=none: a difference is an error that names it. 20 epochs of 100,000
images are about 8,000 steps. `knn` needs labels: for images without classes it has to be left out
of the evals.

The first and the last `knn_ema/20nn` show whether the images have helped. There is no published
result to compare with, and this recipe has not been measured on photographs.
"""

from ml_collections import ConfigDict

JITTER = "flip_lr|color_jitter(0.4, 0.4, 0.2, 0.1, 0.8)|grayscale(0.2)"


def crop(size: int, area_min: float, area_max: float) -> str:
    area = f"area_min={area_min}, area_max={area_max}"
    return f"inception_crop({size}, {area}, method='bicubic_antialias', variant='torchvision')"


def get_config(init_from: str | None = None) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.epochs = 20
    config.precision = "bfloat16"
    config.init_from = init_from
    config.model = {
        "name": "vit",
        "variant": "S/14",
        "activation": "gelu_erf",
        "layer_scale_init": 1e-5,
        "stochastic_depth_rate": 0.1,
        "stochastic_depth_schedule": "uniform",
    }
    config.objective = {
        "name": "dino",
        "prototypes": 16384,
        "last_layer": "weight_norm",
        "centering": "sinkhorn",
        "teacher_temp": 0.07,
        "teacher_temp_start": 0.04,
        "teacher_temp_warmup_percent": 30,
        "momentum": 0.996,
        "ibot_weight": 1.0,
        "ibot_head": "separate",
        "koleo_weight": 0.1,
        "pixel_mean": (0.485, 0.456, 0.406),
        "pixel_std": (0.229, 0.224, 0.225),
    }
    wide = f"decode(orient=True)|{crop(224, 32, 100)}|{JITTER}"
    narrow = f"decode(orient=True)|{crop(98, 5, 32)}|{JITTER}"
    config.data = {
        "name": "folder:data",
        "split": "train",
        "preprocess": wide,
        "views": (
            ("global", 1, f"{wide}|gaussian_blur(probability=0.9)|solarize(128, 0.2)"),
            ("local", 8, f"{narrow}|gaussian_blur(probability=0.5)"),
        ),
        "batch_size": 256,
    }
    heads = ("dino_head", "ibot_head")
    config.optimizer = {
        "name": "adamw",
        "lr": 2e-4,
        "lr_scaling": "sqrt",
        "base_batch_size": 1024,
        "schedule": "cosine",
        "warmup_percent": 10,
        "end_lr": 1e-6,
        "weight_decay": 0.04,
        "weight_decay_end": 0.2,
        "layer_decay": 0.9,
        "lr_multipliers": (("embedding/.*", 0.2),),
        "grad_clip_norm": 3.0,
        "grad_clip_groups": tuple(f"{head}/.*" for head in heads),
        # All but the heads.
        "train_after": ((f"(?!{'|'.join(heads)}).*", {"percent": 5}),),
    }
    judge = {
        "split": "test",
        "preprocess": "decode(orient=True)|resize_small(256, 'bicubic_antialias', rounding='down')"
        "|central_crop(224, rounding='nearest')",
    }
    config.evals = {
        "knn": {"name": "knn", "train_split": "train", "every_percent": 10, **judge},
        "patches": {"name": "patches", "every_percent": 10, **judge},
    }
    config.checkpoint = {"every_percent": 5}
    return config
