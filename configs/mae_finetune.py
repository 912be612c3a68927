# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes the encoder of mae.py on ImageNet-1k (arXiv:2111.06377, appendix A.1).

python -m vit_jax.main --config=configs/mae_finetune.py:runs/mae --workdir=runs/mae_finetune

The argument is the workdir of mae.py. Published for B/16: 83.6 % after 1600 epochs of pre-training;
learning rate and layer decay are those of the published code, which the paper does not print. The
fixed position embeddings are where learned ones start; the mean over patches is normalised again.
"""

from ml_collections import ConfigDict


def get_config(init_from: str = "runs/mae") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.epochs = 100
    config.init_from = init_from
    config.adapt = {"dont_load": ("Transformer/encoder_norm/.*", "fc_norm/.*")}
    config.precision = "bfloat16"
    config.model = {
        "name": "vit",
        "variant": "B/16",
        "classifier": "gap",
        "num_registers": 1,
        "norm_after_pooling": True,
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
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 5e-4,
        "lr_scaling": "linear",
        "base_batch_size": 256,
        "end_lr": 1e-6,
        "schedule": "cosine",
        "warmup_epochs": 5,
        "weight_decay": 0.05,
        "layer_decay": 0.65,
    }
    config.evals = {
        "val": {
            "split": "validation",
            "preprocess": "decode|resize_small(256, 'bicubic_antialias', rounding='down')"
            "|central_crop(224, rounding='nearest')",
            "every_epochs": 5,
        },
    }
    config.checkpoint = {"every_epochs": 2}
    config.log_every = 50
    return config
