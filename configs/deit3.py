# SPDX-License-Identifier: Apache-2.0
"""Trains DeiT III on ImageNet-1k from scratch; arguments are S or B, and finetune=WORKDIR.

python -m vit_jax.main --config=configs/deit3.py:B --workdir=runs/deit3_b16
python -m vit_jax.main --config=configs/deit3.py:B,finetune=runs/deit3_b16 \
    --workdir=runs/deit3_b16_224

Recipe: arXiv:2204.07118, as in github.com/facebookresearch/deit, whose numbers differ from the
paper's: 800 epochs of batch 2048 with LAMB; then 20 of batch 512 with AdamW at a higher
resolution. S/16 is trained at 224 pixels, where it reaches 81.4 %, and fine-tuned at 384: 83.4 %.
B/16 is trained at 192 and fine-tuned at 224: 83.8 %. The learning rates are for these batches; the
authors have no rule for others.
"""

from ml_collections import ConfigDict

from vit_jax.models.names import normalize_variant
from vit_jax.utils.errors import UserError

NUM_CLASSES = 1000
# Pixels, learning rate and stochastic depth; then pixels and stochastic depth of fine-tuning.
SIZES = {"S": (224, 4e-3, 0.05, 384, 0.0), "B": (192, 3e-3, 0.2, 224, 0.2)}


def get_config(arguments: str = "B") -> ConfigDict:
    size, comma, finetune = arguments.partition(",finetune=")
    size = normalize_variant(size).removesuffix("/16")
    if size not in SIZES or bool(comma) > bool(finetune):
        raise UserError(f"--config: {arguments!r}: expected S or B, or S,finetune=WORKDIR")
    pixels, lr, depth_rate, finetune_pixels, finetune_depth_rate = SIZES[size]
    if finetune:
        pixels, depth_rate = finetune_pixels, finetune_depth_rate

    config = ConfigDict()
    config.seed = 0
    config.epochs = 20 if finetune else 800
    config.precision = "bfloat16"
    config.model = {
        "name": "vit",
        "variant": f"{size}/16",
        "activation": "gelu_erf",
        "layer_scale_init": 1e-4,
        "stochastic_depth_rate": depth_rate,
        "stochastic_depth_schedule": "uniform",
    }
    objective = {
        "name": "supervised",
        "mixup": 0.8,
        "cutmix": 1.0,
        "pixel_mean": (0.485, 0.456, 0.406),
        "pixel_std": (0.229, 0.224, 0.225),
    }
    method = "method='bicubic_antialias'"
    crop = f"inception_crop({pixels}, area_min=8, {method}, variant='torchvision')"
    data = {"name": "imagenet2012", "split": "train"}
    optimizer = {
        "schedule": "cosine",
        "decay_from": "start",
        "lr_every": "epoch",
        "warmup_epochs": 5,
        "start_lr": 1e-6,
        "end_lr": 1e-5,
    }
    if finetune:
        policy = "rand_augment('rand-m9-mstd0.5-inc1', variant='timm')"
        config.init_from = finetune
        config.adapt = {"posemb_resize": "bicubic"}
        config.objective = {**objective, "label_smoothing": 0.1}
        config.data = {
            **data,
            "preprocess": f"decode|{crop}|flip_lr|{policy}",
            "batch_size": 512,
        }
        # After the warmup the rate is constant: as published, the least one is the peak.
        config.optimizer = {**optimizer, "name": "adamw", "lr": 1e-5, "weight_decay": 0.1}
    else:
        config.objective = {
            **objective,
            "loss": "sigmoid",
            "binary_targets": True,
            "flip": 0.5,
            "three_augment": True,
            "color_jitter": 0.3,
        }
        config.data = {**data, "preprocess": f"decode|{crop}", "batch_size": 2048, "repeats": 3}
        # The published loss is the mean over classes, here it is the sum: so are gradients, of
        # which the published norm is at most 1, and eps 1e-8.
        config.optimizer = {
            **optimizer,
            "name": "lamb",
            "lr": lr,
            "eps": 1e-8 * NUM_CLASSES,
            "trust_ratio": "decayed",
            "weight_decay": 0.05,
            "grad_clip_norm": 1.0 * NUM_CLASSES,
        }
    resize = f"resize_small({pixels}, {method}, rounding='down')"
    config.evals = {
        "val": {
            "split": "validation",
            "preprocess": f"decode|{resize}|central_crop({pixels}, rounding='nearest')",
            "every_epochs": 1 if finetune else 20,
        },
    }
    config.checkpoint = {"every_epochs": 1 if finetune else 4}
    return config
