# SPDX-License-Identifier: Apache-2.0
"""Compares the outputs of a written model with those of the original."""

from collections.abc import Sequence

import numpy as np

from vit_jax.export.quantize import count_bytes
from vit_jax.export.schemes import DYNAMIC
from vit_jax.inference.model import LoadedModel
from vit_jax.utils.errors import UserError

# Batch sizes: one program must accept any.
_BATCHES = (1, 3)
# Largest allowed difference relative to the largest output: other compilers sum in other orders.
_TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
# Rounded activations change noise in ways that are measured on images; more is a broken program.
_DYNAMIC = 0.5

# Limit of serialized programs and protocol buffers.
_MAX_BYTES = 2**31


def make_batches(model: LoadedModel) -> list[np.ndarray]:
    """Returns batches of noise, uint8 `[n, *image_shape]`, each with a different n."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (rows, *model.image_shape), np.uint8) for rows in _BATCHES]


def compare_outputs(
    model: LoadedModel,
    layer: str,
    batches: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    *,
    what: str,
    quantize: str | None = None,
) -> str:
    """Returns a line with the largest difference of a written model from the original.

    Args:
      model: the original model.
      layer: layer whose output is compared.
      batches: uint8 `[n, *image_shape]` each, from `make_batches`.
      outputs: of the written model for each batch, float32 `[n, ...]`.
      what: name of the written file.
      quantize: scheme of quantization; the original model then has rounded weights.

    Raises:
      UserError: the difference exceeds the tolerance.
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
    largest = float(np.max(differences))  # NaN if any difference is NaN.
    dtype = str(np.dtype(getattr(model.module, "dtype", np.float32)))
    allowed = (_DYNAMIC if quantize == DYNAMIC else _TOLERANCES[dtype]) * scale
    original = "model" if quantize is None else "model with rounded weights"
    line = f"{what}: read back; differs from the {original} by {largest:.2g} at most"
    line += f", of {scale:.3g}"
    if not largest <= allowed:
        raise UserError(f"{line}: expected {allowed:.2g} or less; nothing is written")
    return line


def check_size(model: LoadedModel, *, what: str, quantized: bool = False) -> None:
    """Raises `UserError` if the parameters are too large for one file of this format.

    `quantized` is whether kernels are written as int8.
    """
    size = count_bytes(model.params)[quantized]
    if size >= _MAX_BYTES:
        raise UserError(
            f"--to={what}: the parameters are {size / 2**30:.1f} GiB, and a file of this kind "
            "holds less than 2; expected --to=safetensors or npz"
        )
