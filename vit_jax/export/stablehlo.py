# SPDX-License-Identifier: Apache-2.0
"""A model as one StableHLO program for CPUs, GPUs and TPUs, to be called with JAX alone."""

from pathlib import Path

import jax
import numpy as np
from jax import export

from vit_jax.export.compare import check_size, compare_outputs, make_batches
from vit_jax.inference.model import LoadedModel

PLATFORMS = ("cpu", "cuda", "tpu")


def trace_program(model: LoadedModel, layer: str) -> export.Exported:
    """The program of a layer's output, for any number of images.

    Args:
      model: whose parameters become constants of the program.
      layer: see `LoadedModel.features`.
    """
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.image_shape), np.uint8)
    return export.export(jax.jit(model.as_function(layer)), platforms=PLATFORMS)(images)


def write_stablehlo(path: Path, model: LoadedModel, layer: str) -> list[str]:
    """Writes a program, reads it back, and compares it with the model.

    Args:
      path: of the file.
      model: to be written.
      layer: whose output it gives.

    Returns:
      Lines for the screen.

    Raises:
      UserError: it is too large, or computes something else.
    """
    check_size(model, what="stablehlo")
    path.write_bytes(trace_program(model, layer).serialize())
    call = export.deserialize(bytearray(path.read_bytes())).call
    batches = make_batches(model)
    outputs = [np.asarray(call(images)) for images in batches]
    return [compare_outputs(model, layer, batches, outputs, what=path.name)]
