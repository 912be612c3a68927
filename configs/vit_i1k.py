# SPDX-License-Identifier: Apache-2.0
"""Pre-trains a ViT on ImageNet-1k from scratch; the argument is variant=SIZE/PATCH.

python -m vit_jax.main --config=configs/vit_i1k.py:variant=B/16 --workdir=runs/vit_b16_i1k

Recipe: arXiv:2106.10270 (AugReg): sigmoid loss, Adam with decoupled weight decay, 300 epochs of
batch 4096, mixup. It differs from the paper in having no RandAugment, so expect less than its 79 %
for B/16.
"""

from ml_collections import ConfigDict

from vit_jax.utils.errors import UserError

TRAIN_EXAMPLES = 1_268_356  # train[:99%]
# By the augmentation levels of the paper: none for Ti, medium for the others.
MIXUP = {"Ti": 0.0, "S": 0.5, "B": 0.5, "L": 0.5}


def get_config(arguments: str = "variant=B/16") -> ConfigDict:
    key, _, variant = arguments.partition("=")
    size = variant.partition("/")[0]
    if key != "variant" or size not in MIXUP:
        raise UserError(
            f"--config: {arguments!r}: expected variant=SIZE/PATCH, SIZE one of {', '.join(MIXUP)}"
        )
    batch_size = 4096

    config = ConfigDict()
    config.seed = 0
    config.total_steps = round(300 * TRAIN_EXAMPLES / batch_size)
    config.model = {
        "name": "vit",
        "variant": variant,
        "representation_size": {"Ti": 192, "S": 384, "B": 768, "L": 1024}[size],
        "head_bias_init": -6.9,  # a guess of one class in a thousand
        "dtype": "bfloat16",
    }
    config.objective = {"name": "supervised", "loss": "sigmoid", "mixup": MIXUP[size]}
    config.data = {
        "name": "imagenet2012",
        "split": "train[:99%]",
        "preprocess": "decode|inception_crop(224)|flip_lr",
        "batch_size": batch_size,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "mu_dtype": "bfloat16",
        "schedule": "cosine",
        "warmup_steps": 10_000,
        "weight_decay": 0.1,
        "grad_clip_norm": 1.0,
    }
    preprocess = "decode|resize_small(256)|central_crop(224)"
    config.evals = {
        "minival": {"split": "train[99%:]", "preprocess": preprocess, "every": 2500},
        "val": {"split": "validation", "preprocess": preprocess, "every": 5000},
    }
    config.checkpoint = {"every": 2500}
    config.log_every = 50
    return config
