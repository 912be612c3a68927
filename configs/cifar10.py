# SPDX-License-Identifier: Apache-2.0
"""Trains a ViT on CIFAR-10 from scratch; the argument is the size: compact or small.

python -m vit_jax.main --config=configs/cifar10.py --workdir=runs/cifar10 \
    --config.data.name=folder:/data/cifar10

`compact` (the default) has 0.8 million parameters and takes 20 epochs, for a CPU; `small` has 6.3
million and takes 200, for a GPU. The folder holds train/CLASS/IMAGE and test/CLASS/IMAGE; without
--config.data.name the images come from TFDS. The last 2 % of train are for validation: no gradient
sees them. `compact` reaches 70.2 % on test (docs/objectives.md) in about an hour on two cores;
`small` has not been measured. Models of these sizes are published with 86.3 % after 200 epochs
(github.com/s-chh/PyTorch-Scratch-Vision-Transformer-ViT) and with 90.9 % after 200
(github.com/omihub777/ViT-CIFAR), by other recipes than this one.
"""

from ml_collections import ConfigDict

from vit_jax.utils.errors import UserError

SIZES = {
    "compact": {"hidden_size": 128, "num_layers": 6, "num_heads": 4, "mlp_dim": 256},
    "small": {"hidden_size": 384, "num_layers": 7, "num_heads": 12, "mlp_dim": 384},
}


def get_config(size: str = "compact") -> ConfigDict:
    if size not in SIZES:
        raise UserError(f"--config: {size!r} is no size here: expected {' or '.join(SIZES)}")
    compact = size == "compact"
    preprocess = "decode|resize(32)"
    policy = "" if compact else "|auto_augment"

    config = ConfigDict()
    config.seed = 0
    config.epochs = 20 if compact else 200
    config.ema_decay = None if compact else 0.999
    config.model = {
        "name": "vit",
        "patch_size": 4,
        "classifier": "gap",
        "stochastic_depth_rate": 0.0 if compact else 0.1,
        **SIZES[size],
    }
    config.objective = {
        "name": "supervised",
        "label_smoothing": 0.1,
        "mixup": 0.0 if compact else 0.8,
        "cutmix": 0.0 if compact else 1.0,
    }
    config.data = {
        "name": "cifar10",
        "split": "train[:98%]",
        "preprocess": f"{preprocess}|random_shift(4)|flip_lr{policy}",
        "batch_size": 128,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup_percent": 5,
        "lr_scaling": "sqrt",
        "base_batch_size": 128,
        "weight_decay": 0.05,
        "grad_clip_norm": 1.0,
    }
    config.evals = {
        "val": {"split": "train[98%:]", "preprocess": preprocess, "every_percent": 5},
        "test": {"split": "test", "preprocess": preprocess},
    }
    config.checkpoint = {"every_percent": 5}
    return config
