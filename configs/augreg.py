# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes an AugReg checkpoint briefly; the argument is MODEL, or the name of a checkpoint.

python -m vit_jax.main --config=configs/augreg.py:R_Ti_16 --workdir=runs/r_ti16_pets

Models: Ti_16, S_16, S_32, B_8, B_16, B_32, L_16, R_Ti_16, R26_S_32, R26_B_32, R50_L_32; of each
the checkpoint that was best on its validation split when it was pre-trained on ImageNet-21k. Any
other is had by its name, such as S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0, and one
that lies on disk by its path, which ends in .npz.
The dataset is --config.data.name=NAME of TFDS, with the splits that it has in data.split,
evals.val.split and evals.test.split; or folder:PATH with train/CLASS/IMAGE and test/CLASS/IMAGE, or
with CLASS/IMAGE, which is cut into 80 % train, 10 % validation and 10 % test of each class. Recipe:
arXiv:2106.10270, as in the published code: SGD with momentum in bfloat16, 500 steps of batch 512 in
8 micro-batches, 384 pixels, no dropout and no weight decay. The paper chose optimizer.lr among
0.001, 0.003, 0.01 and 0.03 on a validation split.
"""

import re
from pathlib import PurePosixPath

from ml_collections import ConfigDict

from vit_jax.models.names import normalize_variant
from vit_jax.utils.errors import UserError
from vit_jax.utils.suggestions import suggest

MODELS = {
    "Ti_16": "Ti/16",
    "S_16": "S/16",
    "S_32": "S/32",
    "B_8": "B/8",
    "B_16": "B/16",
    "B_32": "B/32",
    "L_16": "L/16",
    "R_Ti_16": "R+Ti/16",
    "R26_S_32": "R26+S/32",
    "R26_B_32": "R26+B/32",
    "R50_L_32": "R50+L/32",
}


def get_config(checkpoint: str = "R_Ti_16") -> ConfigDict:
    # Names of checkpoints start with that of the model.
    if "-" not in checkpoint.lower().removeprefix("vit-") and not checkpoint.endswith(".npz"):
        checkpoint = re.sub("[+/]", "_", normalize_variant(checkpoint))
    model = re.split(r"-|\.npz$", PurePosixPath(checkpoint).name)[0]
    if model not in MODELS:
        raise UserError(f"--config: {model!r} is no AugReg model{suggest(model, MODELS)}")

    config = ConfigDict()
    config.seed = 0
    config.total_steps = 500
    config.init_from = checkpoint if checkpoint.endswith(".npz") else f"augreg:{checkpoint}"
    config.model = {"name": "vit", "variant": MODELS[model], "dropout_rate": 0.0}
    config.data = {
        "name": "oxford_iiit_pet",
        "split": "train[:90%]",
        "preprocess": "decode|inception_crop(384, variant='tensorflow')|flip_lr",
        "batch_size": 512,
    }
    config.optimizer = {
        "name": "sgd",
        "lr": 0.03,
        "momentum": 0.9,
        "momentum_dtype": "bfloat16",
        "schedule": "cosine",
        "warmup_steps": 100,
        "grad_clip_norm": 1.0,
        "accum_steps": 8,
    }
    preprocess = "decode|resize(384)"
    config.evals = {
        "val": {"split": "train[90%:]", "preprocess": preprocess, "every": 100},
        "test": {"split": "test", "preprocess": preprocess},
    }
    config.checkpoint = {"every": 500}
    return config
