# SPDX-License-Identifier: Apache-2.0
"""Adapters in the layout of PEFT, against what PEFT computes with them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.peft import Adapters, make_adapters, write_config
from vit_jax.checkpoint.pretrained.rebuild import fill_model, rebuild_model
from vit_jax.checkpoint.pretrained.safetensors import read_tensors, write_tensors
from vit_jax.models.lora import Lora, merge_adapters
from vit_jax.utils.errors import UserError

TESTDATA = Path(__file__).parents[2] / "testdata"
CASES = sorted(folder.name for folder in (TESTDATA / "peft").iterdir() if folder.is_dir())


@pytest.fixture
def copy(tmp_path):
    """Adapters and their base in folders of their own, and a way to change the adapters."""
    shutil.copytree(TESTDATA / "torch" / "hf_vit", tmp_path / "torch" / "hf_vit")
    folder = tmp_path / "peft" / "mine"
    shutil.copytree(TESTDATA / "peft" / "hf_vit", folder)

    def change(rename=None, tensors=None, **config):
        stated = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(stated | config))
        if rename is not None or tensors is not None:
            file = folder / "adapter_model.safetensors"
            found, _ = read_tensors(epath.Path(file))
            found = {rename(k) if rename else k: x for k, x in found.items()} | (tensors or {})
            write_tensors(file, found, metadata={})
        return folder

    return change


def logits(source, image):
    weights = load_pretrained(str(source))
    params = {path: np.asarray(x, np.float32) for path, x in weights.params.items()}
    model = rebuild_model(weights, num_classes=params["head/bias"].size)
    params, _ = fill_model(model, weights, image.shape[1:])
    with jax.default_matmul_precision("highest"):
        return model.apply({"params": params}, image, train=False)[0]


def test_dora_leaves_a_row_of_zeros():
    parts = {"lora_A": np.ones((1, 3)), "lora_B": np.zeros((2, 1))}
    parts |= {"lora_magnitude_vector": np.ones(2)}
    adapters = Adapters(epath.Path("x"), "base", None, {"lora_alpha": 1}, {"a": parts}, {})
    kernel = np.array([[0, 0, 0], [0, 3, 4]], np.float32)
    added = adapters.add_to({"a.weight": kernel})["a.weight"]
    np.testing.assert_allclose(added, [[0, 0, 0], [0, 0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case):
    folder = TESTDATA / "peft" / case
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    image = np.load(folder / base / "io.npz")["image"]
    expected = np.load(folder / "io.npz")["logits"]
    np.testing.assert_allclose(logits(folder, image), expected, atol=2e-5, rtol=1e-5)
    assert any("adapters added to" in note for note in load_pretrained(str(folder)).notes)


def test_names_of_earlier_transformers_and_of_wrappers_mean_the_same(copy):
    names = {
        ".layers.": ".encoder.layer.",
        ".attention.q_proj.": ".attention.attention.query.",
        ".attention.v_proj.": ".attention.attention.value.",
        ".mlp.fc2.": ".output.dense.",
        ".lora_A.": ".lora_A.default.",
        "classifier.": "classifier.modules_to_save.default.",
    }

    def rename(name):
        for new, old in names.items():
            name = name.replace(new, old)
        return name

    expected = load_pretrained(str(TESTDATA / "peft" / "hf_vit")).params
    # The pattern names modules of the newer version.
    found = load_pretrained(
        str(copy(rename, alpha_pattern={"layer.1.attention.attention.query": 5}))
    ).params
    assert found.keys() == expected.keys()
    for path, x in found.items():
        np.testing.assert_array_equal(x, expected[path], err_msg=path)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("targets", ["query|value", "key|out|Dense_0|Dense_1"])
@pytest.mark.parametrize("base", ["timm_vit", "hf_vit"])
def test_what_is_written_is_read_back(base, targets, method, tmp_path):
    folder = TESTDATA / "torch" / base
    weights, rng = load_pretrained(str(folder)), np.random.default_rng(0)
    lora = Lora(rank=3, alpha=5.0, method=method, targets=(rf".*/({targets})/kernel",))
    lora = dataclasses.replace(lora, patterns=((r".*_1/.*/value/kernel", {"rank": 2}),))
    trained = {"head/kernel": (32, 4), "head/bias": (4,)}
    for path, x in weights.params.items():
        if rank := lora.size(path)[0]:
            depth = 2 if path.endswith("/out/kernel") else 1
            inputs, outputs = np.prod(x.shape[:depth]), np.prod(x.shape[depth:])
            trained |= {
                path.replace("kernel", "lora/a"): (inputs, rank),
                path.replace("kernel", "lora/b"): (rank, outputs),
            }
            if method == "dora":
                trained[path.replace("kernel", "lora/magnitude")] = (outputs,)
    trained = {path: rng.normal(size=s).astype(np.float32) for path, s in trained.items()}
    tensors, config = make_adapters(
        trained, weights.params, lora, layout=weights.layout, name=str(folder)
    )
    write_tensors(tmp_path / "adapter_model.safetensors", tensors, metadata={})
    write_config(tmp_path / "adapter_config.json", config)
    expected = merge_adapters(weights.params | trained, lora)
    found = load_pretrained(str(tmp_path)).params
    assert found.keys() == expected.keys()
    for path, x in found.items():
        np.testing.assert_allclose(x, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    ("trained", "layout", "words"),
    [
        ("Transformer/encoder_norm/scale", "timm safetensors", "attention and of MLPs without"),
        ("head_dist/kernel", "timm safetensors", "head_dist/kernel is not of the base"),
        ("head/kernel", "published npz", "belong to a .safetensors file"),
    ],
)
def test_adapters_that_peft_has_not_are_refused(trained, layout, words):
    with pytest.raises(UserError, match=words):
        make_adapters({trained: np.zeros((2, 2))}, {}, Lora(rank=1), layout=layout, name="base")


FC2 = "base_model.model.vit.layers.0.mlp.fc2"
RANK_0 = {
    f"{FC2}.lora_A.weight": np.zeros((0, 64), np.float32),
    f"{FC2}.lora_B.weight": np.zeros((32, 0), np.float32),
}


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal"])
def test_adapters_that_start_beside_the_base_as_it_is_are_read(init, copy):
    assert load_pretrained(str(copy(init_lora_weights=init))).params


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(
            ({"init_lora_weights": init}, f"init_lora_weights={init!r}: such adapters belong to")
            for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", ["eva"])
        ),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"alpha_pattern": [1]}, "alpha_pattern=[1]: expected an object"),
        ({"alpha_pattern": "ab"}, "alpha_pattern='ab': expected an object"),
        ({"rank_pattern": "ab"}, "rank_pattern='ab': expected an object"),
        ({"alpha_pattern": {"(": 16}}, "alpha_pattern has '(': expected a regular expression"),
        ({"rank_pattern": {"(": 16}}, "rank_pattern has '(': expected a regular expression"),
        ({"alpha_pattern": {"x": "y"}}, "alpha_pattern: 'x' has 'y': expected a number"),
        (
            {"tensors": {f"{FC2}.lora_magnitude_vector": np.ones(5, np.float32)}},
            "vit.layers.0.mlp.fc2 has lora_magnitude_vector [5]: expected one for each of the 32",
        ),
        ({"tensors": RANK_0}, "has lora_A [0, 64] and lora_B [32, 0]: expected [rank, inputs]"),
        ({"peft_type": "IA3"}, "peft_type='IA3': expected 'LORA'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True in adapter_config.json is unknown here"),
        ({"base_model_name_or_path": None}, "expected the base weights"),
        ({"base_model_name_or_path": "/nowhere/at all"}, "its base, /nowhere/at all, is not there"),
        ({"base_model_name_or_path": "../../torch"}, "has no .safetensors file"),
        ({"lora_alpha": "much"}, "lora_alpha='much'"),
        ({"rename": lambda n: n.replace("q_proj", "k_proj_2")}, "has no product vit.layers.0."),
        ({"rename": lambda n: n.replace("fc2.lora_A", "fc1.lora_A")}, "lacks one of lora_A"),
        ({"rename": lambda n: n.replace("fc2", "fc1")}, "the base has (64, 32)"),
        ({"rename": lambda n: n.replace("lora_A", "lora_embedding_A")}, "is not supported"),
    ],
)
def test_adapters_that_can_not_be_added_are_refused_in_a_line(copy, changes, words):
    folder = copy(**changes)
    with pytest.raises(UserError) as error:
        load_pretrained(str(folder))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_adapters_without_their_config_are_named(copy):
    folder = copy()
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapters of PEFT, without the adapter_config"):
        load_pretrained(str(folder))
