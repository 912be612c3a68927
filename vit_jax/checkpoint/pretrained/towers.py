# SPDX-License-Identifier: Apache-2.0
"""Weights of two towers, an image and a text model, and those of one tower alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.models.two_towers import TOWERS
from vit_jax.utils.errors import UserError

_T = TypeVar("_T")

# The name in `Weights.model` of a text tower that is read alone; no run has such a model.
TEXT = "text"


def has_towers(params: Mapping[str, Any]) -> bool:
    """Whether parameters, by path, are those of two towers."""
    return all(any(path.startswith(f"{part}/") for path in params) for part in TOWERS)


def take_part(params: Mapping[str, _T], part: str) -> dict[str, _T]:
    """Returns the values below a part of the paths, by the rest of their paths."""
    return {p.removeprefix(f"{part}/"): x for p, x in params.items() if p.startswith(f"{part}/")}


def put_part(params: Mapping[str, _T], part: str) -> dict[str, _T]:
    """Returns the values of one part with the part in front of their paths."""
    return {f"{part}/{path}": x for path, x in params.items()}


def take_tower(weights: Weights, part: str) -> Weights:
    """Returns the weights of one tower alone, `img` or `txt`.

    Raises:
      UserError: there is no such tower.
    """
    params = take_part(weights.params, part)
    if part not in TOWERS or not params:
        parts = sorted({path.partition("/")[0] for path in weights.params if "/" in path})
        raise UserError(f"there is no part {part!r}; expected one of {', '.join(parts)}")
    model = {"name": TEXT if part == "txt" else "vit"} | weights.model[TOWERS[part]]
    of_images, notes = part == "img", weights.notes
    if "head/kernel" in params:
        width = params["head/kernel"].shape[-1]
        notes = (*notes, f"head: of the tower, to embeddings of {width} channels: no classes")
    return dataclasses.replace(
        weights,
        params=params,
        layout=f"{part} of {weights.layout}",
        model=model,
        preprocess=weights.preprocess if of_images else {},
        posemb_grid=weights.posemb_grid if of_images else None,
        class_names=None,
        loss=None,
        tokenizer=None if of_images else weights.tokenizer,
        notes=notes,
    )
