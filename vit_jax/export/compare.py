# SPDX-License-Identifier: Apache-2.0
"""Compares what a written model computes with what the model itself does."""

from collections.abc import Sequence

import numpy as np

from vit_jax.inference.model import LoadedModel
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

# Numbers of images: one program has to take any.
_BATCHES = (1, 3)
# What the largest difference may be, relative to the largest output: another compiler adds up in
# another order.
_TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}

# Serialized programs and protocol buffers can't be larger.
_MOST_BYTES = 2**31


def make_batches(model: LoadedModel) -> list[np.ndarray]:
    """Batches of noise, uint8 `[n, *image_shape]`, each with another n."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (rows, *model.image_shape), np.uint8) for rows in _BATCHES]


def compare_outputs(
    model: LoadedModel,
    layer: str,
    batches: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    *,
    what: str,
) -> str:
    """Compares outputs of a written model, and says by how much they differ.

    Args:
      model: that was written.
      layer: whose output is compared.
      batches: of `make_batches`.
      outputs: what the written model made of each.
      what: was written, for the screen.

    Returns:
      A line with the largest difference.

    Raises:
      UserError: they are not the same function.
    """
    differences, scale = [0.0], 0.0
    for images, found in zip(batches, outputs, strict=True):
        expected = model.features(images, layer)
        if found.shape != expected.shape:
            raise UserError(
                f"{what}: gives {list(found.shape)} where the model gives {list(expected.shape)}; "
                "this is a bug"
            )
        differences.append(float(np.abs(found - expected).max()))
        scale = max(scale, float(np.abs(expected).max()))
    largest = float(np.max(differences))  # Is not a number if one is not.
    allowed = _TOLERANCES[str(np.dtype(model.module.dtype))] * scale
    line = f"{what}: read back; differs from the model by {largest:.2g} at most, of {scale:.3g}"
    if not largest <= allowed:
        raise UserError(f"{line}: expected {allowed:.2g} or less; nothing is written")
    return line


def check_size(model: LoadedModel, *, what: str) -> None:
    """Raises `UserError` if the parameters can't be within one file of this kind."""
    size = sum(x.nbytes for x in flatten(model.params).values())
    if size >= _MOST_BYTES:
        raise UserError(
            f"--to={what}: the parameters are {size / 2**30:.1f} GiB, and a file of this kind "
            "holds less than 2; expected --to=safetensors or npz"
        )
