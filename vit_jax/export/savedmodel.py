# SPDX-License-Identifier: Apache-2.0
"""Writes a model as a SavedModel, with a Python interpreter that has TensorFlow."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_jax.export.signature import INPUT
from vit_jax.export.stablehlo import trace_program
from vit_jax.inference.model import LoadedModel
from vit_jax.utils.errors import UserError

_WRITER = Path(__file__).with_name("savedmodel_writer.py")


def check_tensorflow(python: str) -> None:
    """Raises `UserError` unless the interpreter has TensorFlow."""
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('tensorflow') is None)"
    try:
        missing = subprocess.run([python, "-c", find], capture_output=True).returncode
    except OSError as e:
        raise UserError(
            f"--tf_python={python} can't be run: {e.strerror}; expected an "
            "interpreter with TensorFlow"
        ) from None
    if missing:
        raise UserError(
            f"--to=savedmodel needs TensorFlow, which {python} does not have: pip install "
            "'vit_jax[savedmodel]', or --tf_python=PYTHON of an environment that has it"
        )


def write_savedmodel(
    path: Path, model: LoadedModel, layer: str, batches: Sequence[np.ndarray], *, python: str
) -> list[np.ndarray]:
    """Writes a SavedModel, reads it back and returns its outputs; see `PROGRAMS` of the command.

    Its signature `serving_default` returns the output of the layer. `python` is an interpreter that
    has TensorFlow.

    Raises:
      UserError: TensorFlow rejects the program.
    """
    program = trace_program(model, layer)
    name = layer.replace("/", "_")  # TensorFlow does not allow slashes in names
    task = {
        "version": program.calling_convention_version,
        "platforms": program.platforms,
        "input": INPUT,
        "image_shape": model.image_shape,
        "output": name,
        "output_shape": program.out_avals[0].shape[1:],
    }
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        folder = Path(place)
        (folder / "task.json").write_text(json.dumps(task))
        (folder / "program.mlir").write_bytes(program.mlir_module_serialized)
        np.savez(folder / "batches.npz", *batches)
        env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [python, str(_WRITER), place], capture_output=True, text=True, env=env
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"--to=savedmodel: TensorFlow can't write this model: {reason}")
        with np.load(folder / "outputs.npz") as found:
            outputs = [found[key] for key in found.files]
        os.rename(folder / "model", path)
    return outputs
