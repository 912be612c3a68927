# SPDX-License-Identifier: Apache-2.0
"""Linear probes of the encoder of digits_mae.py: five learning rates in one run.

python -m vit_jax.main --config=configs/digits_probe.py --workdir=runs/digits_probe

The encoder stays as it is; five linear heads are trained on its features at once, each as if it
were alone. At the end the head that is best on `val` is named, with its accuracy on both splits:
89.4 % on test, the mean of three seeds (docs/objectives.md). It takes about a minute on two CPU
cores. The argument is the workdir to start from: digits_probe.py:runs/digits_mae.
"""

from ml_collections import ConfigDict


def get_config(init_from: str = "runs/digits_mae") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 1000
    config.init_from = init_from
    config.model = {
        "name": "vit",
        "patch_size": 4,
        "hidden_size": 48,
        "num_layers": 4,
        "num_heads": 4,
        "mlp_dim": 192,
        "position_embedding": "sincos2d_mae",
    }
    config.objective = {"name": "linear_probe", "lr_factors": (0.1, 0.3, 1.0, 3.0, 10.0)}
    config.data = {
        "name": "digits",
        "split": "train[:90%]",
        "preprocess": "decode|resize(16)|random_shift(2)",
        "batch_size": 64,
    }
    config.optimizer = {
        "name": "sgd",
        "lr": 1.0,
        "momentum": 0.9,
        "schedule": "cosine",
        "warmup_steps": 100,
    }
    preprocess = "decode|resize(16)"
    config.evals = {
        "val": {
            "name": "probes",
            "split": "train[90%:]",
            "preprocess": preprocess,
            "every": 500,
            "choose": True,
        },
        "test": {"name": "probes", "split": "test", "preprocess": preprocess},
    }
    config.checkpoint = {"every": 500}
    return config
