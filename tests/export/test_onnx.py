# SPDX-License-Identifier: Apache-2.0
"""ONNX files, in ONNX Runtime. `make test-all` installs what the slow tests need."""

import sys

import numpy as np
import pytest

from tests.trained import MIXER, write_model
from vit_jax.export.__main__ import main
from vit_jax.inference.model import load_model
from vit_jax.utils.errors import UserError

MODELS = {
    "token": {"num_registers": 1, "activation": "gelu_erf"},
    "rope": {"rope_theta": 100.0, "qk_norm": True, "activation": "swiglu"},
    "map": {"classifier": "map", "position_embedding": "sincos2d", "layer_scale_init": 0.5},
    "mixer": {"stated": MIXER},
}


@pytest.mark.parametrize("missing", ["jax2onnx", "onnxruntime"])
def test_without_the_libraries_it_is_said_how_to_install_them(monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, "jax2onnx", sys)
    monkeypatch.setitem(sys.modules, "onnxruntime", sys)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError) as error:
        main(["--checkpoint=none.npz", "--to=onnx", f"--output={tmp_path / 'out'}"])
    assert str(error.value) == f"--to=onnx needs {missing}: pip install 'vit_jax[onnx]'"


@pytest.mark.slow
def test_the_runtime_computes_what_each_kind_of_model_does(said, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="make test-all installs it")
    for name, changes in MODELS.items():
        file, output = write_model(tmp_path / f"{name}.npz", **changes), tmp_path / name
        main([f"--checkpoint={file}", "--to=onnx", f"--output={output}"])
        session = runtime.InferenceSession(str(output / "model.onnx"))
        (given,), (found,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.type) == ("images", "tensor(uint8)")
        assert given.shape == ["batch", 8, 8, 3]
        assert (found.name, found.shape) == ("logits", ["batch", 3])
        images = np.random.default_rng(2).integers(0, 256, (5, 8, 8, 3), np.uint8)
        (logits,) = session.run(None, {"images": images})
        np.testing.assert_allclose(logits, load_model(file)(images).logits, atol=1e-5)


@pytest.mark.slow
def test_what_the_libraries_have_not_is_refused(said, tmp_path):
    pytest.importorskip("jax2onnx", reason="make test-all installs it")
    sizes = {"patch_size": (1, 1), "resnet_layers": (1, 1), "resnet_width": 0.5, "size": 32}
    file = write_model(tmp_path / "hybrid.npz", **sizes)
    with pytest.raises(UserError, match="mistakes the standardized convolutions of a hybrid"):
        main([f"--checkpoint={file}", "--to=onnx", f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_in_bfloat16_is_exported_in_float32_or_not_at_all(said, tmp_path):
    pytest.importorskip("jax2onnx", reason="make test-all installs it")
    file = write_model(tmp_path / "half.npz", dtype="bfloat16")
    command = [f"--checkpoint={file}", "--to=onnx", f"--output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"in bfloat16, .* expected --config.model.dtype=float32"):
        main(command)
    main([*command, "--config.model.dtype=float32"])
    assert (tmp_path / "out" / "model.onnx").exists()
