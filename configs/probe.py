# SPDX-License-Identifier: Apache-2.0
"""Trains a linear classifier for ImageNet-1k on frozen features; the argument is the checkpoint.

python -m vit_jax.main --config=configs/probe.py:runs/mae --workdir=runs/mae_probe
python -m vit_jax.main --config=configs/probe.py:augreg:B/16 --workdir=runs/augreg_b16_probe

The argument is a workdir of mae.py or the name of a published ViT, whose kind and pixels are then
taken. Of any other, set the keys of model; what contradicts the checkpoint is refused with the keys
to set. Recipe: arXiv:2111.06377, appendix A.1: 90 epochs of batch 16384 with LARS, and a batch
normalisation before the classifier. Another data.batch_size scales the learning rate. Published for
MAE's B/16 after 1600 epochs: 68.0 % (67.8 % in github.com/facebookresearch/mae), from the class
token; here it is from the mean over patches. Several learning rates in one run:
--config.objective.lr_factors="(0.3, 1.0, 3.0)".
"""

from ml_collections import ConfigDict

from vit_jax.checkpoint.pretrained.catalogue import find, is_name

# The encoder of mae.py.
MAE = {
    "variant": "B/16",
    "classifier": "gap",
    "num_registers": 1,
    "position_embedding": "sincos2d_mae",
    "activation": "gelu_erf",
}


def get_config(init_from: str = "runs/mae") -> ConfigDict:
    model, mean, std = {"name": "vit", **MAE}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if is_name(init_from):
        published = find(init_from)
        model = {"name": published.model, "variant": published.variant}
        mean, std = published.mean, published.std

    config = ConfigDict()
    config.seed = 0
    config.epochs = 90
    config.init_from = init_from
    config.precision = "bfloat16"
    config.model = model
    config.objective = {"name": "linear_probe", "pixel_mean": mean, "pixel_std": std}
    crop = "inception_crop(224, area_min=8, method='bicubic_antialias', variant='byol')"
    config.data = {
        "name": "imagenet2012",
        "split": "train",
        "preprocess": f"decode|{crop}|flip_lr",
        "batch_size": 16_384,
    }
    config.optimizer = {
        "name": "lars",
        "lr": 0.1,
        "lr_scaling": "linear",
        "base_batch_size": 256,
        "schedule": "cosine",
        "warmup_epochs": 10,
    }
    config.evals = {
        "val": {
            "name": "probes",
            "split": "validation",
            "preprocess": "decode|resize_small(256, 'bicubic_antialias', rounding='down')"
            "|central_crop(224, rounding='nearest')",
            "batch_size": 1024,
            "every_epochs": 10,
        },
    }
    config.checkpoint = {"every_epochs": 5}
    return config
