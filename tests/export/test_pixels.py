# SPDX-License-Identifier: Apache-2.0
"""Programs of models that find the class of each pixel."""

import json

import numpy as np
from jax import export as jax_export

from vit_jax.export import __main__ as export
from vit_jax.inference.model import load_model


def test_a_program_returns_the_logits_of_the_classes_of_pixels(segment_run, tmp_path):
    folder = tmp_path / "exported"
    export.main([f"--workdir={segment_run}", "--to=stablehlo", f"--output={folder}"])
    model = load_model(segment_run)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    program = jax_export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    found = np.asarray(program.call(images))
    np.testing.assert_allclose(found, model.pixel_outputs(images), rtol=1e-4, atol=1e-4)
    signature = json.loads((folder / "signature.json").read_text())
    assert signature["output"]["name"] == "pixel_logits"
    assert signature["output"]["shape"] == ["batch", 16, 16, 11]
    assert signature["class_names"] == list(model.segmentation.classes)
    assert signature["probabilities"] is None
