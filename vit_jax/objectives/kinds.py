# SPDX-License-Identifier: Apache-2.0
"""All objectives, by the name that a config gives them."""

from vit_jax.objectives.contrastive import make_contrastive
from vit_jax.objectives.depth import make_depth
from vit_jax.objectives.dino import make_dino
from vit_jax.objectives.distillation import make_distillation
from vit_jax.objectives.linear_probe import make_linear_probe
from vit_jax.objectives.mae import make_mae
from vit_jax.objectives.segmentation import make_segmentation
from vit_jax.objectives.supervised import make_supervised

OBJECTIVES = {
    "supervised": make_supervised,
    "distillation": make_distillation,
    "mae": make_mae,
    "dino": make_dino,
    "linear_probe": make_linear_probe,
    "contrastive": make_contrastive,
    "depth": make_depth,
    "segmentation": make_segmentation,
}
