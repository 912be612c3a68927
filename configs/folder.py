# SPDX-License-Identifier: Apache-2.0
"""Trains a small ViT from scratch on images in a folder for each class.

python -m vit_jax.main --config=configs/folder.py --workdir=runs/mine \
    --config.data.name=folder:/data/mine

The folder holds CLASS/IMAGE, which is cut into 80 % train, 10 % validation and 10 % test of each
class, or train/CLASS/IMAGE and test/CLASS/IMAGE, where the last 2 % of the training images are for
validation; docs/data.md has the other layouts. No gradient sees validation or test. The sizes fit
images of 32x32 pixels, such as CIFAR-10; all images are brought to that size, upright as their EXIF
orientation says. With few images add --config.data.batch_size=32.

For larger images set data.preprocess='decode(orient=True)|inception_crop(224)|flip_lr',
'decode(orient=True)|resize(224)' as both evals.NAME.preprocess, and model.patch_size=16.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    preprocess = "decode(orient=True)|resize(32)"

    config = ConfigDict()
    config.seed = 0
    config.epochs = 100
    config.model = {
        "name": "vit",
        "patch_size": 4,
        "hidden_size": 192,
        "num_layers": 6,
        "num_heads": 3,
        "mlp_dim": 768,
        "classifier": "gap",
    }
    config.objective = {"name": "supervised", "mixup": 0.2, "label_smoothing": 0.1}
    config.data = {
        "name": "folder:data",
        "split": "train[:98%]",
        "preprocess": f"{preprocess}|random_shift(4)|flip_lr",
        "batch_size": 128,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup_percent": 5,
        "lr_scaling": "sqrt",
        "base_batch_size": 128,
        "weight_decay": 0.1,
        "grad_clip_norm": 1.0,
    }
    config.evals = {
        "val": {"split": "train[98%:]", "preprocess": preprocess, "every_percent": 5},
        "test": {"split": "test", "preprocess": preprocess},
    }
    config.checkpoint = {"every_percent": 5}
    return config
