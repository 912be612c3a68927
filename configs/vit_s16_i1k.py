# SPDX-License-Identifier: Apache-2.0
"""Trains ViT-S/16 on ImageNet-1k from scratch, plainly and well; the argument is epochs=90.

python -m vit_jax.main --config=configs/vit_s16_i1k.py:epochs=90 --workdir=runs/vit_s16_i1k

Recipe: arXiv:2205.01580, as in github.com/google-research/big_vision: the mean over patches, fixed
position embeddings, batch 1024, little RandAugment and mixup. Published: 76.5 % after 90 epochs,
which take 6 to 7 hours on eight cores of TPU v3, 78.5 % after 150, and 80.0 % after 300, in less
than a day.
"""

from ml_collections import ConfigDict

from vit_jax.utils.errors import UserError

TRAIN_EXAMPLES = 1_268_356  # train[:99%]
EPOCHS = {"epochs=90": 90, "epochs=150": 150, "epochs=300": 300}


def get_config(argument: str = "epochs=90") -> ConfigDict:
    if argument not in EPOCHS:
        raise UserError(f"--config: {argument!r}: expected {', '.join(EPOCHS)}")
    batch_size = 1024

    config = ConfigDict()
    config.seed = 0
    config.examples = EPOCHS[argument] * TRAIN_EXAMPLES
    config.precision = "bfloat16_moments"
    config.model = {
        "name": "vit",
        "variant": "S/16",
        "classifier": "gap",
        "representation_size": 384,
        "position_embedding": "sincos2d",
    }
    config.objective = {"name": "supervised", "mixup": 0.2}
    config.data = {
        "name": "imagenet2012",
        "split": "train[:99%]",
        "preprocess": (
            "decode|inception_crop(224, variant='tensorflow')|flip_lr"
            "|randaug(2, 10, variant='augreg')"
        ),
        "batch_size": batch_size,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup_examples": 10_000 * batch_size,
        "weight_decay": 0.1,
        "grad_clip_norm": 1.0,
    }
    preprocess = "decode|resize_small(256, method='area')|central_crop(224)"
    config.evals = {
        "minival": {"split": "train[99%:]", "preprocess": preprocess, "every": 2500},
        "val": {"split": "validation", "preprocess": preprocess, "every": 2500},
    }
    config.checkpoint = {"every": 2500}
    return config
