# SPDX-License-Identifier: Apache-2.0
"""Programs with int8 kernels, and what is measured of them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax import export

from tests.trained import write_model, write_run, write_towers
from vit_jax.export.__main__ import main
from vit_jax.export.measure import Images, find_images, measure
from vit_jax.export.quantize import (
    count_bytes,
    find_inputs,
    quantize_kernel,
    quantize_params,
    round_weights,
)
from vit_jax.export.stablehlo import trace_program
from vit_jax.inference.model import load_model
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = write_model(tmp_path_factory.mktemp("int8") / "vit.npz", num_layers=1)
    return load_model(file, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    return write_run(tmp_path_factory.mktemp("int8") / "run", data_dir)[0]


@pytest.fixture(scope="module")
def loaded(run):
    return load_model(run, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("path", "shape", "inputs"),
    [
        ("head/kernel", (6, 4), (0,)),
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel", (6, 2, 3), (0,)),
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_0/out/kernel", (2, 3, 6), (0, 1)),
        ("embedding/kernel", (4, 4, 3, 6), (0, 1, 2)),
    ],
)
def test_each_output_channel_has_the_scale_of_its_largest_weight(path, shape, inputs):
    kernel = np.random.default_rng(0).normal(0, 0.3, shape).astype(np.float32)
    kernel[..., -1] = 0
    assert find_inputs(path, kernel.ndim) == inputs
    found = quantize_kernel(kernel, inputs)
    assert found.values.dtype == np.int8
    matrix = kernel.astype(np.float64).reshape(-1, *shape[len(inputs) :])
    for channel in np.ndindex(matrix.shape[1:]):
        column = matrix[(slice(None), *channel)]
        scale = np.abs(column).max() / 127
        values = np.round(column / scale) if scale else column
        at = (slice(None),) * len(inputs) + channel
        np.testing.assert_array_equal(found.values[at].ravel(), values)
        np.testing.assert_allclose(found.restore()[at].ravel(), values * scale, rtol=1e-6)
    again = quantize_kernel(found.restore(), inputs)
    np.testing.assert_array_equal(again.values, found.values)


def test_embeddings_norms_and_biases_stay_in_float(model):
    kernels = quantize_params(model.params)
    paths = flatten(model.params).keys()
    assert kernels.keys() == {path for path in paths if path.endswith("/kernel")}
    rounded = flatten(round_weights(model).params)
    for path, x in flatten(model.params).items():
        assert (path in kernels) == (not np.array_equal(x, rounded[path])), path


def test_weights_that_are_not_finite_are_refused(model):
    params = dict(model.params) | {
        "head": {"kernel": np.full((16, 3), np.nan), "bias": np.zeros(3)}
    }
    with pytest.raises(UserError, match="head/kernel has values that are not finite"):
        quantize_params(params)
    with pytest.raises(UserError, match="no parameter named kernel"):
        quantize_params({"head": {"weight": np.zeros((16, 3))}})


def test_a_program_stores_int8_and_computes_the_rounded_model(model):
    program = trace_program(model, "logits", quantize="int8")
    # Constants are printed with their types.
    assert "xi8>" in program.mlir_module()
    assert "tensor<16x32xi8>" in program.mlir_module()
    images = np.random.default_rng(1).integers(0, 256, (3, *model.image_shape), np.uint8)
    expected = round_weights(model)(images).logits
    np.testing.assert_allclose(program.call(images), expected, atol=1e-5)
    assert np.abs(expected - model(images).logits).max() > 1e-4


def test_large_kernels_take_a_quarter_of_the_bytes():
    params = {"head": {"kernel": np.zeros((1024, 512), np.float32), "bias": np.zeros(512, "f4")}}
    before, after = count_bytes(params)
    assert (before, after) == (4 * 1024 * 512 + 2048, 1024 * 512 + 2 * 2048)


def test_a_run_is_measured_on_its_val_split_before_it_is_done(run, loaded, tmp_path, said):
    output = tmp_path / "int8"
    main([str(run), "--to=stablehlo", "--quantize=int8", f"--output={output}"])
    (line,) = [line for line in said if "int8 weights:" in line]
    assert line.endswith("50 images: test[:50] of digits")
    measured = json.loads((output / "signature.json").read_text())["quantization"]
    assert measured["scheme"] == "int8"
    cost = measured["measured"]["stablehlo"]
    # Independent: labels and images of the data, and the program as JAX alone reads it.
    found = find_images(loaded, "logits", data=None, split=None, data_dir=None)
    assert found.data is not None
    source = found.data.open()
    images = np.stack([loaded.preprocess(source[i]["image"]) for i in range(50)])
    labels = np.array([source[i]["label"] for i in range(50)])
    call = export.deserialize(bytearray((output / "model.stablehlo").read_bytes())).call
    before = loaded(images).logits.argmax(-1)
    after = np.asarray(jax.jit(call)(images)).argmax(-1)
    hits = (before == labels).mean(), (after == labels).mean()
    assert cost["top1"] == pytest.approx(hits)
    assert cost["agreement"] == pytest.approx((before == after).mean())
    card = (output / "README.md").read_text()
    assert "## Quantization" in card
    assert "50 images: test[:50] of digits" in card
    assert said.index(line) < next(i for i, x in enumerate(said) if x.startswith("wrote"))


def test_the_cost_counts_changed_classes(model):
    images = Images("drawn images")

    def change(batch):
        logits = model(batch).logits.copy()
        logits[:16] = np.roll(logits[:16], 1, axis=1)
        return logits

    cost = measure(model, change, "logits", images, what="model.x")
    assert (cost.count, cost.agreement, cost.top1) == (64, 0.75, None)
    batch = next(images.read(model))[0]
    p, q = model(batch).probabilities, model.predict(change(batch)).probabilities
    assert cost.difference == pytest.approx(np.abs(p - q).max())
    assert "no labels, so the drop in accuracy is not known" in cost.describe()
    same = measure(model, model.features, "pre_logits", images, what="model.x")
    assert same.cosine == pytest.approx((1, 1))
    with pytest.raises(UserError, match=r"model\.x: gives values that are not finite"):
        measure(model, lambda x: change(x) * np.nan, "logits", images, what="model.x")


def test_a_model_without_data_is_compared_on_drawn_images(tmp_path, said):
    file = write_towers(tmp_path / "towers.npz")
    main(
        [f"--checkpoint={file}", "--to=stablehlo", "--quantize=int8", f"--output={tmp_path / 'o'}"]
    )
    (line,) = [line for line in said if "int8 weights:" in line]
    assert "cosine of the outputs 0.999" in line
    assert "64 drawn images, as the data of the model is not known" in line


def test_a_run_without_an_evaluator_that_classifies_is_compared_on_drawn_images(loaded):
    evals = {"val": {"name": "segmentation", "split": "test"}}
    run = dataclasses.replace(loaded, config={"data": {"name": "digits"}, "evals": evals})
    images = find_images(run, "logits", data=None, split=None, data_dir=None)
    assert images.title == "64 drawn images, as no evaluator of the run classifies"


def test_data_of_other_classes_or_splits_is_refused(model, loaded, data_dir):
    options = {"data_dir": data_dir, "split": None}
    with pytest.raises(UserError, match=r"--data: digits has 10 classes .*, .*vit.npz has 3"):
        find_images(model, "logits", data="digits", **options)
    with pytest.raises(UserError, match="--split=val: the model has no run with data"):
        find_images(model, "logits", data=None, split="val", data_dir=None)
    with pytest.raises(UserError, match=r"--split='valid': .* digits has train"):
        find_images(loaded, "logits", data=None, split="valid", data_dir=data_dir)
    found = find_images(loaded, "logits", data="digits", split="test[:20]", data_dir=data_dir)
    assert (found.title, found.labelled, found.limit) == ("test[:20] of digits", True, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--quantize=int4 --to=onnx", "--quantize=int4: expected int8 or int8_dynamic"),
        ("--quantize=int8 --to=npz", "npz is written as float: expected --to=stablehlo,onnx alone"),
        ("--quantize=int8_dynamic --to=stablehlo", "stablehlo is written as a program in the dt"),
        ("--data=digits --to=stablehlo", "--data=digits: expected --quantize with it"),
    ],
)
def test_what_can_not_be_quantized_is_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main(["--checkpoint=none.npz", "--output=out", *arguments.split()])
    assert message in str(error.value)
