# SPDX-License-Identifier: Apache-2.0
"""Trains a linear head for ADE20k on the frozen patches of DINOv2; the argument is the checkpoint.

python -m vit_jax.main --config=configs/segment.py:dinov2-base --workdir=runs/ade20k

The argument is the folder of a DINOv2 ViT-B/14 from the Hugging Face hub, or a file of it; of any
other, set the keys of model. The data is ADEChallengeData2016 with a classes.txt of 151 lines, of
which the first reads "ignored". Recipe: arXiv:2304.07193, section 7.4: batch normalisation and one
linear layer on the last block, 40,000 steps of batch 16, AdamW with 1,500 steps of warmup and a
linear decay, crops of a random scale. Published mIoU on the 2,000 validation images: S/14 44.3 %,
B/14 47.3 %, L/14 47.7 %, g/14 49.0 %. Crops have 518 pixels here in place of 512, so that patches
of 14 fit, and in evaluation the longer side has 1,036 pixels, in place of 512 for the shorter one.
It has not been trained with this package.
"""

from ml_collections import ConfigDict

SIZE = 518
# The longer side of images in evaluation, and the side of a square that holds all masks.
LONG, MASKS = 2 * SIZE, 2100


def get_config(init_from: str = "dinov2-base") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 40_000
    config.init_from = init_from
    config.precision = "bfloat16"
    config.model = {
        "name": "vit",
        "variant": "B/14",
        "layer_scale_init": 1e-5,
        "activation": "gelu_erf",
    }
    config.objective = {
        "name": "segmentation",
        "head": "linear",
        "freeze_backbone": True,
        "dropout": 0.1,
        "pixel_mean": (0.485, 0.456, 0.406),
        "pixel_std": (0.229, 0.224, 0.225),
    }
    scale = f"random_scale({SIZE}, 0.5, 2.0)|pad_to({SIZE})|random_crop({SIZE})"
    config.data = {
        "name": "masks:ADEChallengeData2016",
        "split": "train",
        "preprocess": f"decode|{scale}|flip_lr|color_jitter(0.125, 0.5, 0.5, 0.05)",
        "batch_size": 16,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "weight_decay": 1e-4,
        "schedule": "linear",
        "warmup_steps": 1500,
        "start_lr": 1e-6,
    }
    config.evals = {
        "val": {
            "name": "segmentation",
            "split": "validation",
            "preprocess": f"decode|resize_long({LONG})|pad_to({LONG})",
            "batch_size": 8,
            "window": SIZE,
            "stride": 2 * SIZE // 3,
            "label_size": (MASKS, MASKS),
            "every": 10_000,
        },
    }
    config.checkpoint = {"every": 5_000}
    return config
