# SPDX-License-Identifier: Apache-2.0
"""Pre-trains a masked autoencoder on CIFAR-10, and fine-tunes it with a tenth of the labels.

python -m vit_jax.main --config=configs/cifar10_mae.py --workdir=runs/cifar10_mae \
    --config.data.name=folder:/data/cifar10
python -m vit_jax.main --config=configs/cifar10_mae.py:runs/cifar10_mae \
    --workdir=runs/cifar10_mae_ft --config.data.name=folder:/data/cifar10
python -m vit_jax.main --config=configs/cifar10_mae.py:none --workdir=runs/cifar10_few \
    --config.data.name=folder:/data/cifar10

The first command sees all training images without their labels; the second starts from its workdir,
the third from nothing, and both train on the same tenth of the images with labels, in the same way.
They reach 62.0 % and 55.4 % on test (docs/objectives.md). All take about half an hour on two cores.
"""

from ml_collections import ConfigDict


def get_config(init_from: str | None = None) -> ConfigDict:
    pretraining = init_from is None
    preprocess = "decode|resize(32)"

    config = ConfigDict()
    config.seed = 0
    config.epochs = 10 if pretraining else 40
    config.init_from = None if init_from == "none" else init_from
    config.model = {
        "name": "vit",
        "patch_size": 4,
        "hidden_size": 96,
        "num_layers": 4,
        "num_heads": 3,
        "mlp_dim": 192,
        "classifier": "gap",
        "position_embedding": "sincos2d_mae",
    }
    if pretraining:
        config.objective = {
            "name": "mae",
            "mask_ratio": 0.75,
            "decoder_width": 64,
            "decoder_depth": 1,
            "decoder_heads": 2,
        }
    else:
        config.objective = {"name": "supervised", "label_smoothing": 0.1}
    config.data = {
        "name": "cifar10",
        "split": "train[:98%]" if pretraining else "train[:10%]",
        "preprocess": f"{preprocess}|random_shift(4)|flip_lr",
        "batch_size": 128,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "b2": 0.95 if pretraining else 0.999,
        "schedule": "cosine",
        "warmup_percent": 10,
        "weight_decay": 0.05,
        "grad_clip_norm": 1.0,
    }
    judge = "reconstruction" if pretraining else "classification"
    config.evals = {
        "val": {
            "name": judge,
            "split": "train[98%:]",
            "preprocess": preprocess,
            "every_percent": 10,
        },
        "test": {"name": judge, "split": "test", "preprocess": preprocess},
    }
    config.checkpoint = {"every_percent": 10}
    return config
