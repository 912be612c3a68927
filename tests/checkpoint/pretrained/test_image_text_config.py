# SPDX-License-Identifier: Apache-2.0
"""Two towers written as CLIP or SigLIP of Hugging Face, and read back."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from tests.checkpoint.pretrained.test_image_text import CASES, put
from vit_jax.checkpoint.pretrained.image_text_config import make_huggingface_config
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.npz import write_npz
from vit_jax.checkpoint.pretrained.safetensors import (
    read_tensors,
    write_safetensors,
    write_tensors,
)
from vit_jax.utils.errors import UserError

LINES = {
    "hf_clip": "decode|resize_small(26, method='bicubic_antialias', rounding='down')"
    "|central_crop(24)",
    "hf_clip_gelu": "decode|resize(24, 24, method='bicubic_antialias')",
    "hf_siglip": "decode|resize(32, method='bilinear_antialias')",
}


def load(case, folder):
    weights = load_pretrained(str(put(folder, case)))
    preprocess = weights.preprocess | {"eval": LINES[case]}
    tokenizer = {"line": "bytes(length=8)", "sha256": None}
    return dataclasses.replace(weights, preprocess=preprocess, tokenizer=tokenizer)


@pytest.mark.parametrize("case", LINES)
def test_tensors_are_written_as_they_were_read(case, tmp_path):
    weights = load(case, tmp_path)
    write_safetensors(tmp_path / "out.safetensors", weights)
    written, _ = read_tensors(epath.Path(tmp_path / "out.safetensors"))
    expected, _ = read_tensors(epath.Path(CASES / f"{case}.safetensors"))
    assert written.keys() == expected.keys()
    for name, x in expected.items():
        assert written[name].dtype == x.dtype
        np.testing.assert_array_equal(written[name], x, err_msg=name)


@pytest.mark.parametrize("case", LINES)
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_file_of_ours_is_read_without_others(case, ending, tmp_path):
    weights, path = load(case, tmp_path), tmp_path / "alone" / f"model.{ending}"
    path.parent.mkdir()
    {"npz": write_npz, "safetensors": write_safetensors}[ending](path, weights)
    again = load_pretrained(str(path))
    for field in ("model", "preprocess", "posemb_grid", "posemb_resize", "tokenizer"):
        assert getattr(again, field) == getattr(weights, field), field
    assert again.params.keys() == weights.params.keys()
    for name, x in weights.params.items():
        np.testing.assert_array_equal(again.params[name], x, err_msg=name)


@pytest.mark.parametrize("case", LINES)
def test_config_json_states_the_same_model(case, tmp_path):
    weights, folder = load(case, tmp_path), tmp_path / "exported"
    config, processor, notes = make_huggingface_config(weights)
    assert processor is not None
    assert not notes
    put(folder, case, config=config)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    again = load_pretrained(str(folder))
    assert again.model == weights.model
    assert again.preprocess.keys() == weights.preprocess.keys()
    np.testing.assert_allclose(again.preprocess["mean"], weights.preprocess["mean"])
    theirs = json.loads((CASES / f"{case}.json").read_text())
    unused = {"initializer_range", "initializer_factor", "bos_token_id", "pad_token_id"}
    for key in ("vision_config", "text_config"):
        missing = theirs[key].keys() - config[key].keys() - unused
        assert missing <= {"eos_token_id", "projection_size", "vision_use_head"}
        for name, value in config[key].items():
            assert theirs[key].get(name, value) == value, name


def test_a_line_without_a_processor_is_noted(tmp_path):
    weights = load("hf_clip", tmp_path)
    odd = weights.preprocess | {"eval": "decode|resize_long(24)|pad_to(24)"}
    _, processor, notes = make_huggingface_config(dataclasses.replace(weights, preprocess=odd))
    assert processor is None
    assert "preprocessor_config.json: not written: no processor" in notes[0]


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("hf_clip", {"text": {"causal": False}}, "CLIP .* model.text.causal=False .there True."),
        ("hf_clip", {"text": {"pooling": "last"}}, "model.text.pooling='last'"),
        ("hf_siglip", {"image": {"rope_theta": 10.0}}, "model.image.rope_theta=10.0"),
        ("hf_siglip", {"text": {"causal": True}}, "SigLIP .* model.text.causal=True"),
    ],
)
def test_what_the_classes_do_not_compute_is_refused(case, change, message, tmp_path):
    weights = load(case, tmp_path)
    changed = {section: weights.model[section] | values for section, values in change.items()}
    model = weights.model | changed
    with pytest.raises(UserError, match=message):
        write_safetensors(tmp_path / "out.safetensors", dataclasses.replace(weights, model=model))
    assert not (tmp_path / "out.safetensors").exists()


def test_a_softmax_model_with_attention_pooling_is_refused(tmp_path):
    weights = load("hf_siglip", tmp_path)
    params = {path: x for path, x in weights.params.items() if path != "b"}
    with pytest.raises(UserError, match=r"no bias of the pairs .model.bias_init."):
        write_safetensors(tmp_path / "out.safetensors", dataclasses.replace(weights, params=params))


def test_metadata_that_contradict_the_tensors_are_refused(tmp_path):
    weights = load("hf_siglip", tmp_path)
    write_safetensors(tmp_path / "out.safetensors", weights)
    tensors, metadata = read_tensors(epath.Path(tmp_path / "out.safetensors"))
    described = json.loads(metadata["vit_jax"])
    described["model"]["text"]["num_layers"] = 3
    write_tensors(
        tmp_path / "out.safetensors", dict(tensors), metadata={"vit_jax": json.dumps(described)}
    )
    with pytest.raises(UserError, match=r"model.text.num_layers is 3; its arrays are of 2"):
        load_pretrained(str(tmp_path / "out.safetensors"))
