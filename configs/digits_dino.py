# SPDX-License-Identifier: Apache-2.0
"""Pre-trains a small ViT on digits without labels, by self-distillation (DINO with KoLeo).

python -m vit_jax.main --config=configs/digits_dino.py --workdir=runs/digits_dino

The run takes about seven minutes of CPU time. At its end `test` is the accuracy of the nearest of
72 labelled images by the features of the student, `test_ema` by those of the teacher, and `pixels`
by the pixels themselves: the teacher's neighbour is right for 90.6 % of the test images, that of
the pixels for 83.1 % (docs/self_supervised.md). A digit of 8x8 pixels, drawn at 16x16, bears only
mild crops and no flips.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    jitter = "color_jitter(0.4, 0.4, 0)"
    wide = f"decode|resize(16)|random_shift(1)|inception_crop(16, 60, 100, 0.8, 1.25)|{jitter}"
    narrow = f"decode|resize(16)|inception_crop(12, 35, 70, 0.8, 1.25)|{jitter}"

    config = ConfigDict()
    config.seed = 0
    config.total_steps = 3000
    config.model = {
        "name": "vit",
        "patch_size": 4,
        "hidden_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "mlp_dim": 192,
        "classifier": "token",
        "position_embedding": "sincos2d_mae",
    }
    config.objective = {
        "name": "dino",
        "prototypes": 128,
        "head_width": 128,
        "bottleneck": 32,
        "centering": "sinkhorn",
        "koleo_weight": 0.02,
        "teacher_temp": 0.03,
        "teacher_temp_start": 0.03,
        "momentum": 0.97,
    }
    config.data = {
        "name": "digits",
        "split": "train[:90%]",
        "preprocess": wide,
        "views": (("global", 1, wide), ("local", 2, narrow)),
        "batch_size": 64,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 2e-3,
        "schedule": "cosine",
        "warmup_steps": 100,
        "end_lr": 1e-6,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "grad_clip_norm": 3.0,
        "grad_clip_groups": ("dino_head/.*",),
        "train_after": (("dino_head/prototypes/.*", {"percent": 2}),),
    }
    judge = {"name": "knn", "k": (1, 5), "preprocess": "decode|resize(16)"}
    judge["train_split"] = "train[:5%]"
    config.evals = {
        "val": {**judge, "split": "train[90%:]", "every": 500},
        "test": {**judge, "split": "test"},
        "pixels": {**judge, "split": "test", "of": "pixels"},
    }
    config.checkpoint = {"every": 500}
    return config
