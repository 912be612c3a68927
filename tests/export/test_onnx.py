# SPDX-License-Identifier: Apache-2.0
"""ONNX files, in ONNX Runtime. `make test-all` installs what the slow tests need."""

import sys

import numpy as np
import pytest

from tests.trained import MIXER, write_model, write_run
from vit_jax.export.__main__ import main
from vit_jax.export.onnx import open_onnx
from vit_jax.export.onnx_int8 import quantize_graph
from vit_jax.export.quantize import quantize_kernel, quantize_params, round_weights
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


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_graphs_with_int8_kernels_compute_the_rounded_model(said, tmp_path, name):
    onnx = pytest.importorskip("onnx", reason="make test-all installs it")
    file, output = write_model(tmp_path / "model.npz", **MODELS[name]), tmp_path / "out"
    main([f"--checkpoint={file}", "--to=onnx", "--quantize=int8", f"--output={output}"])
    model = load_model(file)
    images = np.random.default_rng(2).integers(0, 256, (5, 8, 8, 3), np.uint8)
    found = open_onnx(output / "model.onnx", level="ORT_ENABLE_BASIC")(images)
    np.testing.assert_allclose(found, round_weights(model)(images).logits, atol=1e-5)
    graph = onnx.load(output / "model.onnx").graph
    stored = [x for x in graph.initializer if x.data_type == onnx.TensorProto.INT8]
    assert len(stored) == len(quantize_params(model.params))
    assert not [line for line in said if "cosine" in line]
    assert any("int8 weights: the same class for" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("equation", "x", "kernel"),
    [
        (None, (3, 8), (8, 5)),  # Gemm
        ("abc,cde->abde", (2, 3, 8), (8, 2, 3)),
        ("abcd,cde->abe", (2, 3, 2, 4), (2, 4, 6)),
    ],
)
def test_dynamic_products_are_those_of_rounded_operands(equation, x, kernel):
    onnx = pytest.importorskip("onnx", reason="make test-all installs it")
    runtime = pytest.importorskip("onnxruntime", reason="make test-all installs it")
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(1, 1, x).astype(np.float32), rng.normal(0, 1, kernel)
    depth = 2 if equation == "abcd,cde->abe" else 1
    int8 = quantize_kernel(kernel, tuple(range(depth)))
    bias = rng.normal(0, 1, 5).astype(np.float32)
    constants = [onnx.numpy_helper.from_array(int8.restore(), "kernel")]
    if equation is None:
        constants.append(onnx.numpy_helper.from_array(bias, "bias"))
        nodes = [onnx.helper.make_node("Gemm", ["x", "kernel", "bias"], ["y"])]
    else:
        nodes = [onnx.helper.make_node("Einsum", ["x", "kernel"], ["y"], equation=equation)]
    kind = onnx.TensorProto.FLOAT
    ends = [onnx.helper.make_tensor_value_info(name, kind, None) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "product", ends[:1], ends[1:], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    model.ir_version = 10
    assert quantize_graph(model, dynamic=True) == 1
    session = runtime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {"x": x})
    # The definition of DynamicQuantizeLinear, in float64.
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = (float(high) - float(low)) / 255
    zero = np.clip(np.round(-low / scale), 0, 255)
    rounded = (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale
    expected = np.tensordot(rounded, int8.values * int8.scale.astype(np.float64), depth)
    np.testing.assert_allclose(found, expected + (0 if equation else bias), atol=1e-4)


@pytest.mark.slow
def test_a_run_with_dynamic_activations_is_measured_on_its_val_split(said, tmp_path, data_dir):
    onnx = pytest.importorskip("onnx", reason="make test-all installs it")
    run, _, _ = write_run(tmp_path / "run", data_dir)
    output = tmp_path / "out"
    main([str(run), "--to=onnx", "--quantize=int8_dynamic", f"--output={output}"])
    (line,) = [line for line in said if "dynamic uint8 activations:" in line]
    assert line.endswith("50 images: test[:50] of digits")
    kinds = [node.op_type for node in onnx.load(output / "model.onnx").graph.node]
    assert "Gemm" not in kinds
    assert kinds.count("MatMulInteger") == 7
    assert "depends on the other images of its batch" in (output / "README.md").read_text()
