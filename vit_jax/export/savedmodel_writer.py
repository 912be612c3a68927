# SPDX-License-Identifier: Apache-2.0
"""Wraps a StableHLO program as a SavedModel, in a separate process that needs TensorFlow only.

Called as `python savedmodel_writer.py FOLDER`. Reads `task.json`, `program.mlir` and `batches.npz`
in the folder, and writes `model`, and `outputs.npz` with the outputs of the model for the batches.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

# Imported by name: the type checker runs without TensorFlow.
tf: Any = importlib.import_module("tensorflow")
xla: Any = importlib.import_module("tensorflow.compiler.tf2xla.python.xla")


def main(folder: Path) -> None:
    """Writes the model, reads it back and calls it."""
    task = json.loads((folder / "task.json").read_text())
    program = (folder / "program.mlir").read_bytes()
    images = tf.TensorSpec([None, *task["image_shape"]], tf.uint8, name=task["input"])

    def call(images: Any) -> dict[str, Any]:
        (found,) = xla.call_module(
            [images],
            version=task["version"],
            module=program,
            Tout=[tf.float32],
            Sout=[[None, *task["output_shape"]]],
            platforms=[platform.upper() for platform in task["platforms"]],
        )
        return {task["output"]: found}

    module = tf.Module()
    module.call = tf.function(call, input_signature=[images], autograph=False)
    tf.saved_model.save(module, str(folder / "model"), signatures=module.call)
    serve = tf.saved_model.load(str(folder / "model")).signatures["serving_default"]
    with np.load(folder / "batches.npz") as batches:
        outputs = {
            name: serve(**{task["input"]: tf.constant(batches[name])})[task["output"]].numpy()
            for name in batches.files
        }
    np.savez(folder / "outputs.npz", **outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
