# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a published ViT as its authors did; arguments are MODEL,DATASET.

python -m vit_jax.main --config=configs/vit.py:b16,cifar10 --workdir=runs/b16_cifar10 \
    --config.init_from=ViT-B_16.npz

Models: ti16, s16, s32, b8, b16, b32, l16, l32, h14. Data sets: cifar10, cifar100, imagenet2012.
Recipe: arXiv:2010.11929, appendix B.1.1, as in the published code: SGD with momentum in bfloat16,
batch 512 in 8 micro-batches, 384 pixels, no weight decay. Its results, from ImageNet-21k weights:
b16 reaches 99.0 % on cifar10, 92.1 % on cifar100 and 84.5 % on imagenet2012; 10,000 steps of b16
took 2.2 hours on one A100.
"""

import re

from ml_collections import ConfigDict

from vit_jax.utils.errors import UserError, suggest

SIZES = {"ti": "Ti", "s": "S", "b": "B", "l": "L", "h": "H"}

# steps, train split, evaluation split
DATASETS = {
    "cifar10": (10_000, "train[:98%]", "test"),
    "cifar100": (10_000, "train[:98%]", "test"),
    "imagenet2012": (20_000, "train[:99%]", "validation"),
}


def get_config(arguments: str = "b16,cifar10") -> ConfigDict:
    model, _, dataset = arguments.partition(",")
    match = re.fullmatch(r"(ti|s|b|l|h)(\d+)", model)
    if not match:
        raise UserError(
            f"--config: {model!r} is no model; expected MODEL,DATASET as in b16,cifar10"
        )
    if dataset not in DATASETS:
        raise UserError(f"--config: {dataset!r} is no data set here{suggest(dataset, DATASETS)}")
    size, patch = SIZES[match[1]], int(match[2])
    steps, train, test = DATASETS[dataset]

    config = ConfigDict()
    config.seed = 0
    config.total_steps = steps
    config.init_from = f"ViT-{size}_{patch}.npz"
    config.model = {"name": "vit", "variant": f"{size}/{patch}"}
    config.data = {
        "name": dataset,
        "split": train,
        "preprocess": "decode|inception_crop(384)|flip_lr",
        "batch_size": 512,
    }
    config.optimizer = {
        "name": "sgd",
        "lr": 0.01 if (model, dataset) == ("b16", "cifar10") else 0.03,
        "momentum": 0.9,
        "momentum_dtype": "bfloat16",
        "schedule": "cosine",
        "warmup_steps": 500,
        "grad_clip_norm": 1.0,
        "accum_steps": 8,
    }
    config.evals = {"val": {"split": test, "preprocess": "decode|resize(384)", "every": 1000}}
    config.checkpoint = {"every": 1000}
    return config
