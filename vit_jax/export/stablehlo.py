# SPDX-License-Identifier: Apache-2.0
"""Writes a model as one StableHLO program for CPUs, GPUs and TPUs, which needs JAX only."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax import export

from vit_jax.export.quantize import as_int8_function
from vit_jax.export.schemes import DYNAMIC
from vit_jax.inference.model import LoadedModel
from vit_jax.utils.errors import UserError

PLATFORMS = ("cpu", "cuda", "tpu")


def trace_program(
    model: LoadedModel, layer: str, *, quantize: str | None = None
) -> export.Exported:
    """Traces a program that maps uint8 `[n, *image_shape]` to float32 `[n, ...]`, for any n.

    It returns the output of `layer`, see `LoadedModel.features`, and holds the parameters, whose
    kernels are int8 with `quantize`.
    """
    function = model.as_function(layer) if quantize is None else as_int8_function(model, layer)
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.image_shape), np.uint8)
    with _without_locations():
        return export.export(jax.jit(function), platforms=PLATFORMS)(images)


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Leaves out of programs in which files of this machine an operation was called."""
    key = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, key)
    jax.config.update(key, 0)
    try:
        yield
    finally:
        jax.config.update(key, before)


def write_stablehlo(
    path: Path,
    model: LoadedModel,
    layer: str,
    batches: Sequence[np.ndarray],
    *,
    quantize: str | None = None,
) -> list[np.ndarray]:
    """Writes a program, reads it back and returns its outputs; see `PROGRAMS` of the command.

    Raises:
      UserError: activations are to be quantized.
    """
    if quantize == DYNAMIC:
        raise UserError(
            f"--quantize={DYNAMIC}: a stablehlo program computes in the dtype of the model: "
            "expected --quantize=int8, or --to=onnx"
        )
    path.write_bytes(trace_program(model, layer, quantize=quantize).serialize())
    call = open_stablehlo(path)
    return [call(images) for images in batches]


def open_stablehlo(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Reads a program: a function from uint8 `[n, *image_shape]` to float32 `[n, ...]`."""
    call = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: np.asarray(call(images))
