# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a published ViT as its authors did; arguments are MODEL,DATASET[,eval=NAME].

python -m vit_jax.main --config=configs/vit.py:b16,cifar10 --workdir=runs/b16_cifar10

Models: ti16, s16, s32, b8, b16, b32, l16, l32, h14, and with a ResNet in front r_ti16, r26_s32,
r26_b32, r50_b16, r50_l32. Data sets: cifar10, cifar100, imagenet2012. Images are evaluated as
published, squashed to a square (eval=squash), or cropped from the middle (eval=central).
Recipe: arXiv:2010.11929, appendix B.1.1, as in the published code: SGD with momentum in bfloat16,
batch 512 in 8 micro-batches, 384 pixels, no weight decay, dropout of 0.1 for l16, h14, r50_b16 and
r50_l32. Its results, from ImageNet-21k weights: b16 reaches 99.0 % on cifar10, 92.1 % on cifar100
and 84.5 % on imagenet2012; 10,000 steps of b16 took 2.2 hours on one A100.
Models that the paper does not have start from the best AugReg checkpoint of their size.
"""

import re

from ml_collections import ConfigDict

from vit_jax.models.names import normalize_variant
from vit_jax.utils.errors import UserError
from vit_jax.utils.suggestions import suggest

# Published with the paper, pre-trained on ImageNet-21k.
ORIGINAL = ("b16", "b32", "l16", "l32", "h14", "r50_b16")

# As published; models and data sets that are not here have no dropout and a learning rate of 0.03.
DROPOUT = {"l16": 0.1, "h14": 0.1, "r50_b16": 0.1, "r50_l32": 0.1}
LR = {("b16", "cifar10"): 0.01}

# steps, train split, evaluation split
DATASETS = {
    "cifar10": (10_000, "train[:98%]", "test"),
    "cifar100": (10_000, "train[:98%]", "test"),
    "imagenet2012": (20_000, "train[:99%]", "validation"),
}


def get_config(arguments: str = "b16,cifar10") -> ConfigDict:
    model, _, rest = arguments.partition(",")
    dataset, _, option = rest.partition(",")
    variant = normalize_variant(model)
    match = re.fullmatch(r"(?:(R\d*)\+)?(?:Ti|S|B|L|H)/(\d+)", variant)
    if not match:
        raise UserError(
            f"--config: {model!r} is no model; expected MODEL,DATASET as in b16,cifar10"
        )
    if dataset not in DATASETS:
        raise UserError(f"--config: {dataset!r} is no data set here{suggest(dataset, DATASETS)}")
    resnet, patch = match[1], int(match[2])
    augreg = re.sub("[+/]", "_", variant)
    model = variant.replace("+", "_").replace("/", "").lower()
    steps, train, test = DATASETS[dataset]
    # What whole patches cover of 384 pixels: all, but for h14, where the published code leaves the
    # rest out as well. A hybrid cuts its features into patches, not the image.
    pixels = 384 if resnet else 384 // patch * patch
    eval_ops = {
        "eval=squash": f"resize({pixels})",
        "eval=central": f"resize_small({448 * pixels // 384}, 'area')|central_crop({pixels})",
    }
    option = option or "eval=squash"
    if option not in eval_ops:
        raise UserError(f"--config: {option!r}: expected {' or '.join(eval_ops)}")

    config = ConfigDict()
    config.seed = 0
    config.total_steps = steps
    config.init_from = f"imagenet21k:{variant}" if model in ORIGINAL else f"augreg:{augreg}"
    config.model = {
        "name": "vit",
        "variant": variant,
        "dropout_rate": DROPOUT.get(model, 0.0),
    }
    config.data = {
        "name": dataset,
        "split": train,
        "preprocess": f"decode|inception_crop({pixels}, variant='tensorflow')|flip_lr",
        "batch_size": 512,
    }
    config.optimizer = {
        "name": "sgd",
        "lr": LR.get((model, dataset), 0.03),
        "momentum": 0.9,
        "momentum_dtype": "bfloat16",
        "schedule": "cosine",
        "warmup_steps": 500,
        "grad_clip_norm": 1.0,
        "accum_steps": 8,
    }
    preprocess = f"decode|{eval_ops[option]}"
    config.evals = {"val": {"split": test, "preprocess": preprocess, "every": 1000}}
    config.checkpoint = {"every": 1000}
    return config
