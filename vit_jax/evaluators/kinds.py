# SPDX-License-Identifier: Apache-2.0
"""All evaluators, by the name that a config gives them."""

from vit_jax.evaluators.classification import make_classification
from vit_jax.evaluators.fewshot import make_fewshot
from vit_jax.evaluators.knn import make_knn
from vit_jax.evaluators.linear_probe import make_linear_probe
from vit_jax.evaluators.probes import make_probes
from vit_jax.evaluators.reconstruction import make_reconstruction

EVALUATORS = {
    "classification": make_classification,
    "fewshot": make_fewshot,
    "knn": make_knn,
    "linear_probe": make_linear_probe,
    "probes": make_probes,
    "reconstruction": make_reconstruction,
}

# These judge heads that are trained, so that the labels have to be those that it is trained on.
JUDGE_HEAD = ("classification", "probes")
