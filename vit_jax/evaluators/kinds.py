# SPDX-License-Identifier: Apache-2.0
"""All evaluators, by the name that a config gives them."""

from vit_jax.evaluators.classification import Classification
from vit_jax.evaluators.corruptions import Corruptions
from vit_jax.evaluators.depth import Depth
from vit_jax.evaluators.fewshot import FewShot
from vit_jax.evaluators.knn import NearestNeighbours
from vit_jax.evaluators.linear_probe import LinearProbe
from vit_jax.evaluators.patch_sizes import PatchSizes
from vit_jax.evaluators.patches import Patches
from vit_jax.evaluators.probes import Probes
from vit_jax.evaluators.reconstruction import Reconstruction
from vit_jax.evaluators.retrieval import Retrieval
from vit_jax.evaluators.segmentation import Segmentation
from vit_jax.evaluators.subset import Subset
from vit_jax.evaluators.trust import Trust
from vit_jax.evaluators.zero_shot import ZeroShot

EVALUATORS = {
    "classification": Classification,
    "corruptions": Corruptions,
    "fewshot": FewShot,
    "knn": NearestNeighbours,
    "linear_probe": LinearProbe,
    "patch_sizes": PatchSizes,
    "patches": Patches,
    "probes": Probes,
    "reconstruction": Reconstruction,
    "retrieval": Retrieval,
    "depth": Depth,
    "segmentation": Segmentation,
    "subset": Subset,
    "trust": Trust,
    "zero_shot": ZeroShot,
}
