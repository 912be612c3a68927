# SPDX-License-Identifier: Apache-2.0
"""SavedModels. `make test-all` installs TensorFlow for the slow test, and sets TF_PYTHON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.trained import write_model
from vit_jax.export import savedmodel
from vit_jax.export.__main__ import main
from vit_jax.inference.model import load_model
from vit_jax.utils.errors import UserError

PYTHON = Path(__file__).parents[2] / os.environ.get("TF_PYTHON", "build/tensorflow/bin/python")
USE = """
import sys
import numpy as np
import tensorflow as tf
serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
found = serve(images=tf.constant(np.load(sys.argv[2])))
np.save(sys.argv[3], found["logits"].numpy())
"""


def test_an_interpreter_without_tensorflow_is_refused_before_anything_is_read(tmp_path):
    command = ["--checkpoint=none.npz", "--to=savedmodel", f"--output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="--tf_python=none can't be run: No such file"):
        main([*command, "--tf_python=none"])
    # An environment that has nothing.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UserError, match=r"needs TensorFlow, which .* pip install 'vit_jax\[sav"):
        main([*command, f"--tf_python={bare}"])


def test_what_tensorflow_says_is_one_line_and_nothing_is_left(tmp_path, monkeypatch, said):
    writer = tmp_path / "writer.py"
    writer.write_text("raise ValueError('no such version')")
    monkeypatch.setattr(savedmodel, "_WRITER", writer)
    monkeypatch.setattr("vit_jax.export.savedmodel.check_tensorflow", lambda python: None)
    file, output = write_model(tmp_path / "vit.npz"), tmp_path / "out"
    with pytest.raises(UserError, match="can't write this model: ValueError: no such version"):
        main([f"--checkpoint={file}", "--to=savedmodel", f"--output={output}"])
    assert {path.name for path in tmp_path.iterdir()} == {"vit.npz", "vit.json", "writer.py"}


@pytest.mark.slow
def test_tensorflow_computes_what_the_model_does(tmp_path, said):
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} has TensorFlow after make test-all; or set TF_PYTHON")
    file, output = write_model(tmp_path / "vit.npz", rope_theta=100.0), tmp_path / "out"
    main([f"--checkpoint={file}", "--to=savedmodel", f"--output={output}", f"--tf_python={PYTHON}"])
    assert any(line.startswith("model.savedmodel: read back; differs") for line in said)
    files = json.loads((output / "signature.json").read_text())["files"]
    assert files == {"savedmodel": "model.savedmodel"}
    names = {path.name for path in output.iterdir()}
    assert names == {"model.savedmodel", "signature.json", "README.md"}
    images = np.random.default_rng(3).integers(0, 256, (5, 8, 8, 3), np.uint8)
    np.save(tmp_path / "in.npy", images)
    arguments = [output / "model.savedmodel", tmp_path / "in.npy", tmp_path / "out.npy"]
    subprocess.run([PYTHON, "-c", USE, *arguments], check=True, capture_output=True)
    expected = load_model(file)(images).logits
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)
