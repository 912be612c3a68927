# SPDX-License-Identifier: Apache-2.0
"""All evaluators, by the name that a config gives them."""

from vit_jax.evaluators.classification import make_classification
from vit_jax.evaluators.fewshot import make_fewshot
from vit_jax.evaluators.knn import make_knn
from vit_jax.evaluators.linear_probe import make_linear_probe

EVALUATORS = {
    "classification": make_classification,
    "fewshot": make_fewshot,
    "knn": make_knn,
    "linear_probe": make_linear_probe,
}

# These judge the model's own head, so that the labels have to be those that it is trained on.
JUDGE_HEAD = ("classification",)
