# SPDX-License-Identifier: Apache-2.0
"""Pre-trains ViT-B/16 on ImageNet-1k without labels, as a masked autoencoder (arXiv:2111.06377).

python -m vit_jax.main --config=configs/mae.py --workdir=runs/mae
python -m vit_jax.main --config=configs/mae_finetune.py:runs/mae --workdir=runs/mae_finetune
python -m vit_jax.main --config=configs/probe.py:runs/mae --workdir=runs/mae_probe

Published: 800 epochs of batch 4096; fine-tuned as in mae_finetune.py it reaches 83.3 %, and 83.6 %
after 1600 epochs (--config.total_steps=500456). The class token of the paper, which nothing reads
but the other tokens, is a register here. Other sizes: --config.model.variant=L/16.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.epochs = 800
    config.precision = "bfloat16"
    config.model = {
        "name": "vit",
        "variant": "B/16",
        "classifier": "gap",
        "num_registers": 1,
        "position_embedding": "sincos2d_mae",
        "activation": "gelu_erf",
    }
    config.objective = {
        "name": "mae",
        "mask_ratio": 0.75,
        "norm_pix": True,
        "decoder_width": 512,
        "decoder_depth": 8,
        "decoder_heads": 16,
        "pixel_mean": (0.485, 0.456, 0.406),
        "pixel_std": (0.229, 0.224, 0.225),
    }
    crop = "inception_crop(224, area_min=20, method='bicubic_antialias', variant='torchvision')"
    config.data = {
        "name": "imagenet2012",
        "split": "train",
        "preprocess": f"decode|{crop}|flip_lr",
        "batch_size": 4096,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1.5e-4,
        "lr_scaling": "linear",
        "base_batch_size": 256,
        "b2": 0.95,
        "schedule": "cosine",
        "warmup_epochs": 40,
        "weight_decay": 0.05,
        # All but vectors, as in the published code: tokens too.
        "weight_decay_params": (".*(kernel|registers|mask_token)",),
    }
    config.evals = {
        "val": {
            "name": "reconstruction",
            "split": "validation",
            "preprocess": "decode|resize_small(256, 'bicubic_antialias', rounding='down')"
            "|central_crop(224, rounding='nearest')",
            "every_epochs": 40,
        },
    }
    config.checkpoint = {"every_epochs": 8}
    config.log_every = 50
    return config
