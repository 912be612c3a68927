# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes the model of digits.py at twice the resolution, with a new head.

python -m vit_jax.main --config=configs/digits_finetune.py --workdir=runs/digits_finetune

As in the ViT paper (arXiv:2010.11929, section 3.2): the pre-training head with its hidden layer
gives way to one zero-initialised linear layer, position embeddings are interpolated (4x4 to 8x8),
and SGD with momentum trains briefly without weight decay. The argument is the workdir to start
from: digits_finetune.py:runs/digits.
"""

from ml_collections import ConfigDict


def get_config(init_from: str = "runs/digits") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 500
    config.init_from = init_from
    config.model = {
        "name": "vit",
        "patch_size": 4,
        "hidden_size": 48,
        "num_layers": 4,
        "num_heads": 4,
        "mlp_dim": 192,
    }
    config.data = {
        "name": "digits",
        "split": "train[:90%]",
        "preprocess": "decode|resize(32)|random_shift(4)",
        "batch_size": 64,
    }
    config.optimizer = {
        "name": "sgd",
        "lr": 0.03,
        "momentum": 0.9,
        "schedule": "cosine",
        "warmup_steps": 50,
        "grad_clip_norm": 1.0,
    }
    preprocess = "decode|resize(32)"
    config.evals = {
        "val": {"split": "train[90%:]", "preprocess": preprocess, "every": 250},
        "test": {"split": "test", "preprocess": preprocess},
    }
    config.checkpoint = {"every": 250}
    return config
