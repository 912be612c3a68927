# SPDX-License-Identifier: Apache-2.0
"""Policies of numerical precision: the dtypes that the key `precision` chooses.

Parameters, second moments, norm statistics, softmax and logits are float32 in all of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_jax.models.variants import MODELS
from vit_jax.optim.base_optimizers import BASE_OPTIMIZERS, Dtype
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import find_part, keywords, lookup


@dataclasses.dataclass(frozen=True)
class Precision:
    """The keys that a policy sets.

    Attributes:
      dtype: dtype of the model's computation.
      moment_dtype: dtype of the optimizer's first moment.
      float8: whether attention projections and MLPs multiply in float8.
    """

    dtype: Dtype | None = None
    moment_dtype: Dtype | None = None
    float8: bool = False


PRECISIONS = {
    "float32": Precision("float32"),
    "bfloat16": Precision("bfloat16"),
    "bfloat16_moments": Precision("bfloat16", moment_dtype="bfloat16"),
    "float8": Precision("bfloat16", float8=True),
}


def apply_precision(
    name: str | None, model: Mapping[str, Any], optimizer: Mapping[str, Any]
) -> tuple[Precision, dict[str, Any], dict[str, Any]]:
    """Returns a policy, and the sections of model and optimizer with the keys that it sets.

    Args:
      name: of the policy; None for a policy that sets nothing.
      model: the section `model` of the config.
      optimizer: the section `optimizer`.

    Raises:
      UserError: there is no such policy, a section contradicts it, or the model has no dtype or the
        optimizer no first moment whose dtype could be set.
    """
    if name is None:
        return Precision(), dict(model), dict(optimizer)
    precision = lookup(PRECISIONS, name, key="precision")
    chosen = model.get("name", "vit")
    if "dtype" not in keywords(find_part(MODELS, chosen, key="model.name")):
        raise UserError(f"precision={name!r}: model.name={chosen!r} has no argument dtype")
    model_keys = {"dtype": precision.dtype}
    optimizer_keys = {}
    if precision.moment_dtype is not None:
        optimizer_keys = dict.fromkeys(_moment_keys(name, optimizer), precision.moment_dtype)
    for key, section, wanted in (
        ("model", model, model_keys),
        ("optimizer", optimizer, optimizer_keys),
    ):
        for k, value in wanted.items():
            if section.get(k, value) != value:
                raise UserError(
                    f"{key}.{k}={section[k]!r} with precision={name!r}: expected {value!r}, which "
                    f"that sets; leave {key}.{k} out, or give another precision or None"
                )
    return precision, {**model, **model_keys}, {**optimizer, **optimizer_keys}


def _moment_keys(name: str, optimizer: Mapping[str, Any]) -> list[str]:
    """The arguments of the optimizer that are the dtype of a moment."""
    chosen = optimizer.get("name", "adamw")
    base = find_part(BASE_OPTIMIZERS, chosen, key="optimizer.name")
    keys = [key for key, argument in keywords(base).items() if argument.annotation == Dtype]
    if not keys:
        raise UserError(
            f"precision={name!r}: optimizer.name={chosen!r} keeps no moment in another dtype than "
            "float32: expected precision='bfloat16' with it"
        )
    return keys
