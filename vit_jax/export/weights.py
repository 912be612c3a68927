# SPDX-License-Identifier: Apache-2.0
"""Writes the parameters of a loaded model as a file of weights."""

from pathlib import Path

import numpy as np

from vit_jax.checkpoint.pretrained.convert import convert
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.inference.model import LoadedModel
from vit_jax.utils.tree import flatten


def write_weights(path: Path, model: LoadedModel) -> str:
    """Writes a `.npz` or `.safetensors` file, reads it back and returns a line to log.

    Raises:
      UserError: the layout cannot hold this model, or the file cannot be written.
    """
    weights = Weights(
        params={name: np.asarray(x) for name, x in flatten(model.params).items()},
        layout="loaded model",
        model=dict(model.arguments),
        preprocess={
            "mean": model.pixel_mean,
            "std": model.pixel_std,
            "image_size": model.image_shape[:2],
            "eval": model.preparation.line,
        },
    )
    return f"{path.name}: {convert(weights, path)[-1]}"
