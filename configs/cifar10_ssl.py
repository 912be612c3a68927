# SPDX-License-Identifier: Apache-2.0
"""Pre-trains a compact ViT on CIFAR-10 without labels, in one of four ways to be compared.

python -m vit_jax.main --config=configs/cifar10_ssl.py:dino --workdir=runs/cifar10_dino \
    --config.data.name=folder:/data/cifar10

The argument is dino, dino_ibot (with masked patches), mae (a masked autoencoder) or random (the
model as it is initialised, with no training). The model and the judges are the same: the 20 nearest
neighbours and a linear probe of frozen features, both fit to the training images with labels, and
the neighbours of raw pixels. python -m benchmarks.cifar10_ssl runs all four with several seeds.
With patches of 8 and after 3,000 steps, the neighbours are right for 48.1, 44.5, 40.4 and 31.1 % of
the test images, those of raw pixels for 36.2 % (docs/self_supervised.md).
"""

from ml_collections import ConfigDict

from vit_jax.utils.errors import UserError

KINDS = ("dino", "dino_ibot", "mae", "random")


def get_config(kind: str = "dino") -> ConfigDict:
    if kind not in KINDS:
        raise UserError(f"--config: cifar10_ssl.py:{kind}: expected one of {', '.join(KINDS)}")
    preprocess = "decode|resize(32)"
    jitter = "flip_lr|color_jitter(0.4, 0.4, 0.2, 0.1, 0.8)|grayscale(0.2)"
    wide = f"{preprocess}|inception_crop(32, 30, 100)|{jitter}"
    narrow = f"{preprocess}|inception_crop(16, 8, 40)|{jitter}"

    config = ConfigDict()
    config.seed = 0
    config.epochs = 20
    config.model = {
        "name": "vit",
        "patch_size": 4,
        "hidden_size": 96,
        "num_layers": 4,
        "num_heads": 3,
        "mlp_dim": 192,
        "position_embedding": "sincos2d_mae",
    }
    config.objective = {
        "name": "dino",
        "prototypes": 1024,
        "head_width": 256,
        "bottleneck": 64,
        "centering": "sinkhorn",
        "koleo_weight": 0.02,
        "teacher_temp": 0.04,
        "momentum": 0.99,
    }
    views = (("global", 1, f"{wide}|solarize(128, 0.2)"), ("local", 4, narrow))
    if kind == "dino_ibot":
        config.objective.update(ibot_weight=1.0, ibot_head="separate")
    if kind == "mae":
        views = ()
        wide = f"{preprocess}|random_shift(4)|flip_lr"
        config.objective = {
            "name": "mae",
            "mask_ratio": 0.75,
            "decoder_width": 64,
            "decoder_depth": 1,
            "decoder_heads": 2,
        }
    config.data = {
        "name": "cifar10",
        "split": "train[:98%]",
        "preprocess": wide,
        "views": views,
        "batch_size": 128,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup_percent": 10,
        "weight_decay": 0.05,
        "grad_clip_norm": 1.0 if kind == "mae" else 3.0,
    }
    if kind.startswith("dino"):
        config.optimizer["weight_decay_end"] = 0.4
        heads = ("dino_head", "ibot_head") if kind == "dino_ibot" else ("dino_head",)
        config.optimizer["grad_clip_groups"] = tuple(f"{head}/.*" for head in heads)
        config.optimizer["train_after"] = tuple(
            (f"{head}/prototypes/.*", {"percent": 2}) for head in heads
        )
    if kind == "random":
        # A step of no length.
        del config["epochs"]
        config.total_steps = 1
        config.optimizer = {"name": "sgd", "lr": 0.0, "schedule": "constant"}
    knn = {"name": "knn", "train_split": "train[:98%]", "preprocess": preprocess}
    config.evals = {
        "val": {**knn, "split": "train[98%:]", "every_percent": 10},
        "test": {**knn, "split": "test"},
        "linear": {**knn, "name": "linear_probe", "split": "test"},
        "pixels": {**knn, "split": "test", "of": "pixels"},
        "patches": {"name": "patches", "split": "test", "preprocess": preprocess},
    }
    config.checkpoint = {"every_percent": 10}
    return config
