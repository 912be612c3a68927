# SPDX-License-Identifier: Apache-2.0
"""Writes a model as one StableHLO program for CPUs, GPUs and TPUs, which needs JAX only."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax import export

from vit_jax.inference.model import LoadedModel

PLATFORMS = ("cpu", "cuda", "tpu")


def trace_program(model: LoadedModel, layer: str) -> export.Exported:
    """Traces a program that maps uint8 `[n, *image_shape]` to float32 `[n, ...]`, for any n.

    It returns the output of `layer`, see `LoadedModel.features`, and holds the parameters.
    """
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.image_shape), np.uint8)
    with _without_locations():
        return export.export(jax.jit(model.as_function(layer)), platforms=PLATFORMS)(images)


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
    path: Path, model: LoadedModel, layer: str, batches: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Writes a program, reads it back and returns its outputs; see `PROGRAMS` of the command."""
    path.write_bytes(trace_program(model, layer).serialize())
    call = export.deserialize(bytearray(path.read_bytes())).call
    return [np.asarray(call(images)) for images in batches]
