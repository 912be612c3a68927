# SPDX-License-Identifier: Apache-2.0
"""The command that looks into checkpoints and converts them."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from tests.command import call
from tests.tiny import tiny_config
from tests.trained import write_run
from vit_jax.checkpoint.pretrained.convert import WRITERS, convert
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.npz import write_npz as write_npz_file
from vit_jax.checkpoint.pretrained.safetensors import read_tensors
from vit_jax.checkpoint.pretrained.weights import POSEMB
from vit_jax.convert import main
from vit_jax.inference.model import load_model
from vit_jax.models.variants import MODELS
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError

GOLDEN = Path(__file__).parent / "testdata" / "golden"


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """A workdir with averages."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    model = {"scan": True, "num_registers": 1, "activation": "gelu_erf", "layer_scale_init": 0.1}
    changes = {f"model__{key}": value for key, value in model.items()}
    objective = {"pixel_mean": 0.4, "loss": "sigmoid"}
    return write_run(workdir, data_dir, objective=objective, **changes)[0]


def assert_same(params, expected):
    assert params.keys() == expected.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_without_a_destination_it_says_what_the_file_is(capfd):
    main([str(GOLDEN / "vit_pre_logits.npz")])
    out = capfd.readouterr().out
    assert "layout      published npz" in out
    assert "head        21 classes" in out
    assert "representation_size=48" in out


def test_a_run_becomes_a_file_that_says_all_that_the_run_knew(run, tmp_path, capfd):
    main([str(run), str(tmp_path / "out.npz")])
    out = capfd.readouterr().out
    assert f"wrote {tmp_path / 'out.npz'}" in out
    assert f"wrote {tmp_path / 'out.json'}" in out
    assert "note        the parameters as they are, not their average" in out
    described = next(line for line in out.splitlines() if "  model  " in line).split()[1:]
    assert {"name=vit", "activation=gelu_erf", "num_registers=1"} <= set(described)
    assert not any(word.startswith(("qkv_bias=", "patch_dropout_rate=")) for word in described)
    source, written = load_pretrained(str(run)), load_pretrained(str(tmp_path / "out.npz"))
    assert_same(written.params, source.params)
    assert (written.model, written.preprocess) == (source.model, source.preprocess)
    assert written.model["activation"] == "gelu_erf"
    assert source.loss == written.loss == "sigmoid"
    assert written.preprocess == {
        "mean": 0.4,
        "std": 0.5,
        "image_size": (8, 8),
        "eval": "decode",
    }


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_class_names_are_in_what_is_written(ending, tmp_path, capfd):
    names = tuple(f"Käfer {i}" for i in range(10))
    weights = dataclasses.replace(load_pretrained(str(GOLDEN / "vit_gap.npz")), class_names=names)
    convert(weights, tmp_path / f"one{ending}")
    main([str(tmp_path / f"one{ending}"), str(tmp_path / "two.npz")])
    assert "class names Käfer 0, Käfer 1, " in capfd.readouterr().out
    assert load_pretrained(str(tmp_path / "two.npz")).class_names == names


def test_a_run_is_read_without_warnings(run):
    command = [sys.executable, "-m", "vit_jax.convert", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout
    assert done.stderr == ""


def test_a_model_is_built_from_what_a_checkpoint_says(run):
    weights = load_pretrained(str(run))
    arguments = dict(weights.model)
    model = MODELS[arguments.pop("name")](**arguments)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 8, 8, 3)), train=False)["params"]
    )
    assert {p: x.shape for p, x in weights.params.items()} == {
        jax.tree_util.keystr(p, simple=True, separator="/"): x.shape
        for p, x in jax.tree_util.tree_leaves_with_path(shapes)
    }


@pytest.mark.parametrize("arguments", [["{run}:ema_params"], ["{run}", "--params=ema"]])
def test_the_average_of_a_run_is_a_part_of_it(run, tmp_path, arguments, capfd):
    main([a.format(run=run) for a in arguments] + [str(tmp_path / "ema.npz")])
    assert "note        the average of the parameters" in capfd.readouterr().out
    raw, average = load_pretrained(str(run)), load_pretrained(str(tmp_path / "ema.npz"))
    assert np.abs(raw.params["embedding/kernel"] - average.params["embedding/kernel"]).max() > 1e-6


def test_a_converted_file_starts_a_run_of_the_same_function(run, tmp_path, data_dir, said):
    main([str(run), str(tmp_path / "out.npz")])
    config = tiny_config(data_dir, init_from=str(tmp_path / "out.npz"))
    with pytest.raises(UserError, match=r"--config.model.activation=gelu_erf"):
        Experiment.from_config(config).init_state()
    config.model.update({"activation": "gelu_erf", "num_registers": 1, "layer_scale_init": 1.0})
    state = Experiment.from_config(config).init_state()
    assert any("pixels: the weights expect pixel_mean 0.4, here it is 0.5" in x for x in said)
    assert "  head: kept, 10 classes" in said
    expected = load_pretrained(str(run)).params["Transformer/registers"]
    np.testing.assert_array_equal(state.params["Transformer"]["registers"], expected)


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_a_file_without_class_token_keeps_all_positions(ending, tmp_path, capfd):
    source = GOLDEN.parent / "torch" / "hf_ijepa" / "model.safetensors"
    written = tmp_path / f"out{ending}"
    main([str(source), str(written)])
    assert "layout      Hugging Face I-JEPA safetensors" in capfd.readouterr().out
    tensors, _ = read_tensors(epath.Path(source))
    weights = load_pretrained(str(written))
    expected = tensors["ijepa.embeddings.position_embeddings"]
    np.testing.assert_array_equal(weights.params[POSEMB], expected)
    assert (weights.posemb_grid, weights.posemb_resize) == ((4, 4), "bicubic_no_antialias")


def write_npz(file, **changes):
    """Writes a published file with other arrays; None leaves one out."""
    arrays = dict(np.load(GOLDEN / "vit_gap.npz")) | changes
    np.savez(file, **{name: x for name, x in arrays.items() if x is not None})
    return str(file)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder/Dense_0/kernel": np.ones((2, 2), "f")}, "decoder/Dense_0/kernel is (2, 2)"),
        ({"Transformer/encoder_norm/bias": None}, "Transformer/encoder_norm/bias is missing"),
        ({"head/bias": np.ones(4, "f")}, "head/bias is (4,), expected (10,)"),
        (
            {"Transformer/encoderblock_0/MlpBlock_3/Dense_1/bias": np.ones(3, "f")},
            "Transformer/encoderblock_0/MlpBlock_0/Dense_1/bias is (3,)",
        ),
    ],
)
def test_only_all_parameters_of_a_model_are_written(changes, words, ending, tmp_path):
    source = write_npz(tmp_path / "in.npz", **changes)
    with pytest.raises(UserError) as caught:
        main([source, str(tmp_path / f"out.{ending}")])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


@pytest.mark.parametrize("name", [path.stem for path in sorted(GOLDEN.glob("*.json"))])
def test_what_is_published_is_written_and_rebuilt(name, tmp_path, capfd):
    main([str(GOLDEN / f"{name}.npz"), str(tmp_path / "out.npz")])
    assert "read back: every parameter is the same, and so is the model" in capfd.readouterr().out


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_class_names_and_the_kind_of_problem_travel_with_the_file(ending, tmp_path):
    folder = tmp_path / "hub"
    shutil.copytree(GOLDEN.parent / "torch" / "hf_vit", folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): f"class {i}" for i in range(5)}
    config["problem_type"] = "multi_label_classification"
    (folder / "config.json").write_text(json.dumps(config))
    written = tmp_path / f"out.{ending}"
    main([str(folder), str(written)])
    for source in (folder, written):
        model = load_model(source)
        assert model.class_names == tuple(f"class {i}" for i in range(5))
        assert model.loss == "sigmoid"


def test_a_file_that_is_not_the_model_is_removed(tmp_path, monkeypatch):
    def write(path, weights):
        model = weights.model | {"num_heads": 4, "norm_epsilon": 1e-3}
        write_npz_file(path, dataclasses.replace(weights, model=model))

    monkeypatch.setitem(WRITERS, ".npz", (write, (".npz", ".json")))
    with pytest.raises(UserError, match=r"what was read back is not what was written"):
        main([str(GOLDEN / "vit_gap.npz"), str(tmp_path / "out.npz")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{golden}", "{tmp}/out.pth"], "expected a file that ends in .npz"),
        (["{golden}", "{tmp}/there.npz"], "there.npz exists; remove it, or choose another"),
        (["{golden}", "{tmp}/no/out.npz"], "/no does not exist"),
        (["{tmp}/none.npz"], "none.npz: there is no such file"),
        (["{golden}", "--params=ema"], "vit_gap.npz is no run; leave --params out"),
        (["{tmp}"], "has no checkpoint; expected the workdir of a run"),
    ],
)
def test_bad_input_is_one_line_and_loses_nothing(arguments, message, tmp_path):
    there = tmp_path / "there.npz"
    there.write_text("mine")
    arguments = [a.format(golden=GOLDEN / "vit_gap.npz", tmp=tmp_path) for a in arguments]
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert message in str(caught.value)
    assert there.read_text() == "mine"


def test_the_command_exits_with_2_on_bad_input(tmp_path, monkeypatch, capfd):
    assert call("convert", [str(tmp_path / "none.npz")], monkeypatch) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("vit_jax: error: ")
