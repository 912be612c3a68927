# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a published MLP-Mixer as its authors did; arguments are MODEL,DATASET.

python -m vit_jax.main --config=configs/mixer.py:b16,cifar10 --workdir=runs/mixer_b16_cifar10

Models: b16 and l16, pre-trained on ImageNet-21k, and b32, trained on ImageNet with SAM. Data sets:
cifar10, cifar100, imagenet2012. Recipe: arXiv:2105.01601, as in the published code: SGD with
momentum in bfloat16, batch 512 in 8 micro-batches, no weight decay, and 224 pixels, as a Mixer
can't change its resolution. Its results on cifar10: 96.8 % for b16, 98.3 % for l16.
"""

from ml_collections import ConfigDict

from vit_jax.models.names import normalize_variant
from vit_jax.utils.errors import UserError
from vit_jax.utils.suggestions import suggest

# variant, checkpoint
MODELS = {
    "b16": ("B/16", "mixer-imagenet21k:B/16"),
    "b32": ("B/32", "mixer-sam:B/32"),
    "l16": ("L/16", "mixer-imagenet21k:L/16"),
}

# steps, train split, evaluation split
DATASETS = {
    "cifar10": (10_000, "train[:98%]", "test"),
    "cifar100": (10_000, "train[:98%]", "test"),
    "imagenet2012": (20_000, "train[:99%]", "validation"),
}


def get_config(arguments: str = "b16,cifar10") -> ConfigDict:
    model, _, dataset = arguments.partition(",")
    model = normalize_variant(model).replace("/", "").lower()
    if model not in MODELS:
        raise UserError(
            f"--config: {model!r} is no Mixer; expected MODEL,DATASET as in b16,cifar10"
        )
    if dataset not in DATASETS:
        raise UserError(f"--config: {dataset!r} is no data set here{suggest(dataset, DATASETS)}")
    variant, checkpoint = MODELS[model]
    steps, train, test = DATASETS[dataset]

    config = ConfigDict()
    config.seed = 0
    config.total_steps = steps
    config.init_from = checkpoint
    config.model = {"name": "mixer", "variant": variant}
    config.data = {
        "name": dataset,
        "split": train,
        "preprocess": "decode|inception_crop(224, variant='tensorflow')|flip_lr",
        "batch_size": 512,
    }
    config.optimizer = {
        "name": "sgd",
        "lr": 0.03,
        "momentum": 0.9,
        "momentum_dtype": "bfloat16",
        "schedule": "cosine",
        "warmup_steps": 500,
        "grad_clip_norm": 1.0,
        "accum_steps": 8,
    }
    config.evals = {"val": {"split": test, "preprocess": "decode|resize(224)", "every": 1000}}
    config.checkpoint = {"every": 1000}
    return config
