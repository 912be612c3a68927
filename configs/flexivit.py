# SPDX-License-Identifier: Apache-2.0
"""Trains FlexiViT, one ViT for patches of 8 to 48 pixels, on ImageNet-1k (arXiv:2212.08013).

python -m vit_jax.main --config=configs/flexivit.py:B --workdir=runs/flexivit_b

The argument is the size: S, B or L. Each step draws one of ten sizes of patches for its images of
240 pixels. The model starts from the DeiT III of its size at 384 pixels, which is its teacher too:
both see the same mixed images. At patches of 16 pixels, S, B and L are published with 82.6 %,
84.7 % and 85.7 % after 1200 epochs (github.com/huggingface/pytorch-image-models,
results/results-imagenet.csv); 90 and 300 epochs are the other published lengths. At the end `sizes`
evaluates each size.
"""

from ml_collections import ConfigDict

from vit_jax.models.names import normalize_variant
from vit_jax.utils.errors import UserError

PIXELS = 240
PATCH_SIZES = (48, 40, 30, 24, 20, 16, 15, 12, 10, 8)


def get_config(size: str = "B") -> ConfigDict:
    name = normalize_variant(size).removesuffix("/16")
    if name not in ("S", "B", "L"):
        raise UserError(f"--config: {size!r}: expected S, B or L")
    teacher = f"big_vision:deit3-{name}/16-i1k@384"
    config = ConfigDict()
    config.seed = 0
    config.examples = 90 * 1_281_167
    config.precision = "bfloat16_moments"
    config.init_from = teacher
    config.adapt = {"posemb_resize": "bilinear_antialias"}
    config.model = {
        "name": "vit",
        "variant": f"{name}/16",
        "kernel_size": 16,
        "patch_sizes": PATCH_SIZES,
        "posemb_grid": (7, 7),
    }
    config.objective = {
        "name": "distillation",
        "teacher": teacher,
        "kind": "soft",
        "alpha": 1.0,
        "temperature": 1.0,
        "mixup": 1.0,
    }
    config.data = {
        "name": "imagenet2012",
        "split": "train",
        "preprocess": f"decode|inception_crop({PIXELS}, variant='tensorflow')|flip_lr",
        "batch_size": 1024,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-4,
        "schedule": "cosine",
        "warmup_steps": 5000,
        "weight_decay": 1e-5,
        "weight_decay_times": "schedule",
        "grad_clip_norm": 1.0,
    }
    evaluated = {
        "split": "validation",
        "preprocess": f"decode|resize_small(256, method='area')|central_crop({PIXELS})",
    }
    config.evals = {
        "val": {**evaluated, "every_epochs": 10},
        "sizes": {**evaluated, "name": "patch_sizes"},
    }
    config.checkpoint = {"every_epochs": 1}
    return config
