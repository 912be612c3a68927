# SPDX-License-Identifier: Apache-2.0
"""Mixers of timm; that their logits are equal is among the cases of `test_safetensors`."""

import dataclasses
import json

import numpy as np
import pytest

from tests.checkpoint.pretrained.test_safetensors import (
    GOLDEN,
    MIXERS,
    assert_same,
    describe,
    raw_tensors,
    read_case,
    refusal,
)
from vit_jax.checkpoint.pretrained.convert import convert
from vit_jax.checkpoint.pretrained.npz import read_npz
from vit_jax.checkpoint.pretrained.rebuild import check_complete
from vit_jax.checkpoint.pretrained.safetensors import read_safetensors, write_tensors
from vit_jax.checkpoint.pretrained.timm_config import make_timm_config
from vit_jax.checkpoint.pretrained.timm_mixer import mixer_to_linen, mixer_to_timm, read_timm_mixer
from vit_jax.checkpoint.pretrained.weights import Weights, infer_model

FILE = GOLDEN / "timm_mixer" / "model.safetensors"


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_the_description_is_that_of_the_files(name):
    weights = read_case(name)
    gated = name == "timm_mixer_gated"
    assert weights.model == {
        **{"name": "mixer", "patch_size": (8, 8), "hidden_size": 32, "num_layers": 2},
        **{"tokens_mlp_dim": 16, "channels_mlp_dim": 64 if gated else 128},
        "activation": "swiglu" if gated else "gelu_erf",
    }
    assert weights.preprocess["image_size"] == (32, 24)
    assert weights.preprocess["mean"] == (0.485, 0.456, 0.406)
    model = check_complete(weights)
    assert (model.activation, model.num_classes) == (weights.model["activation"], 5)


@pytest.mark.parametrize("name", sorted(MIXERS))
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_mixer_is_converted_and_read_back(name, ending, tmp_path):
    weights = read_case(name)
    (*_, last) = convert(weights, tmp_path / f"x.{ending}")
    assert last.startswith("read back: every parameter is the same, and so is the model")


def test_a_gated_mixer_is_known_without_the_description_beside_it(tmp_path):
    convert(read_case("timm_mixer_gated"), tmp_path / "x.npz")
    (tmp_path / "x.json").unlink()
    assert read_npz(tmp_path / "x.npz").model["activation"] == "swiglu"


@pytest.mark.parametrize(
    ("images", "size", "words"),
    [(12, None, "nothing states their size, of 12 patches"), (9, (24, 24), "assuming 24x24")],
)
def test_without_config_the_images_are_square_or_of_unknown_size(images, size, words):
    tensors = dict(raw_tensors(FILE)[0])
    for i in range(2):
        tensors[f"blocks.{i}.mlp_tokens.fc1.weight"] = np.ones((16, images), np.float32)
        tensors[f"blocks.{i}.mlp_tokens.fc2.weight"] = np.ones((images, 16), np.float32)
        tensors[f"blocks.{i}.mlp_tokens.fc2.bias"] = np.ones(images, np.float32)
    weights = read_timm_mixer(tensors, {})
    assert weights.preprocess.get("image_size") == size
    assert any(words in note for note in weights.notes)


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ("blocks.0.linear_tokens.weight", "it is a ResMLP, with affine layers in place of norms"),
        ("blocks.0.mlp_channels.gate.proj.weight", "it is a gMLP, with gates over patches"),
        ("stem.norm.weight", "it has a norm of the patches"),
        ("blocks.1.mlp_tokens.norm.weight", "it has norms within its MLPs"),
    ],
)
def test_mlps_that_no_model_here_computes_are_refused(added, words, tmp_path):
    tensors, _ = raw_tensors(FILE)
    path = describe("timm_mixer", tmp_path, architecture="other_24_224")
    write_tensors(tmp_path / path, {**tensors, added: np.ones((8, 8), np.float32)}, metadata={})
    message = refusal(read_safetensors, path)
    assert f"architecture 'other_24_224': {words}" in message
    assert added in message


def test_another_model_with_that_first_layer_is_refused(tmp_path):
    tensors, _ = raw_tensors(FILE)
    tensors = {name: x for name, x in tensors.items() if "mlp_tokens" not in name}
    write_tensors(tmp_path / "x.safetensors", tensors, metadata={})
    message = refusal(read_safetensors, tmp_path / "x.safetensors")
    assert "no blocks.0.mlp_tokens.fc1 as a Mixer" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_args": {"act_layer": "relu"}}, "act_layer='relu' in config.json: expected gelu"),
        ({"model_args": {"global_pool": ""}}, "global_pool='' in config.json: expected avg"),
        ({"global_pool": "max"}, "global_pool='max' in config.json: expected avg"),
        ({"model_args": {"patch_size": 16}}, "patch_size=16 in config.json, but the tensors"),
        ({"model_args": {"num_blocks": 3}}, "num_blocks=3"),
        ({"model_args": {"mlp_ratio": [1, 4]}}, "mlp_ratio=[1, 4]"),
        ({"model_args": {"mlp_ratio": "4"}}, "mlp_ratio='4'"),
        ({"model_args": {"mlp_ratio": [4]}}, "mlp_ratio=[4]"),
        ({"model_args": {"stem_norm": True}}, "stem_norm=True"),
        ({"model_args": {"img_size": 32}}, "32x32 pixels are 4x4 patches, and the tensors are of"),
        ({"model_args": {"block_layer": "x"}}, "block_layer='x' in config.json is unknown here"),
        ({"pretrained_cfg": 3}, "pretrained_cfg=3 in config.json: expected an object"),
        ({"num_features": 64}, "num_features=64"),
        ({"num_classes": 7}, "num_classes=7"),
    ],
)
def test_a_config_of_another_model_is_refused(changes, words, tmp_path):
    assert words in refusal(read_safetensors, describe("timm_mixer", tmp_path, **changes))


def test_arguments_that_are_no_object_are_refused():
    with pytest.raises(ValueError, match="model_args=3 in config"):
        read_timm_mixer(raw_tensors(FILE)[0], {"architecture": "mixer_s32_224", "model_args": 3})


def test_what_agrees_with_the_tensors_is_read(tmp_path):
    options = {"mlp_ratio": [0.5, 4], "act_layer": "gelu", "img_size": [32, 24], "patch_size": 8}
    read = read_safetensors(describe("timm_mixer", tmp_path, model_args=options))
    assert_same(read.params, read_case("timm_mixer").params)


def make_named(sizes, activation):
    """Weights of a Mixer with sizes of timm's by name, for images of 64 pixels; all zero."""
    patch, width, blocks, tokens, channels = sizes
    shapes = {"stem/kernel": (patch, patch, 3, width), "head/kernel": (width, 7)}
    for i in range(blocks):
        mixing = f"MixerBlock_{i}"
        for kind, n, hidden in (
            ("token", (64 // patch) ** 2, tokens),
            ("channel", width, channels),
        ):
            for layer in ("Dense_0", *(["gate"] if activation == "swiglu" else [])):
                shapes[f"{mixing}/{kind}_mixing/{layer}/kernel"] = (n, hidden)
                shapes[f"{mixing}/{kind}_mixing/{layer}/bias"] = (hidden,)
            shapes[f"{mixing}/{kind}_mixing/Dense_1/kernel"] = (hidden, n)
    params = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    model = infer_model(params) | {"activation": activation}
    preprocess = {"image_size": (64, 64), "mean": 0.5, "std": 0.5}
    return Weights(params=params, layout="test", model=model, preprocess=preprocess)


@pytest.mark.parametrize(
    ("sizes", "activation", "architecture"),
    [
        ((32, 512, 8, 256, 2048), "gelu_erf", "mixer_s32_224"),
        ((16, 768, 12, 100, 40), "gelu_erf", "mixer_b16_224"),
        ((16, 384, 12, 192, 768), "swiglu", "gmixer_12_224"),
    ],
)
def test_the_config_is_of_the_function_of_timm_with_these_sizes(sizes, activation, architecture):
    weights = make_named(sizes, activation)
    config, _ = make_timm_config(weights)
    config = json.loads(json.dumps(config))
    assert config["architecture"] == architecture
    # Its functions refuse these arguments, which they give themselves.
    assert not {"patch_size", "embed_dim", "num_blocks"} & config["model_args"].keys()
    again = read_timm_mixer(mixer_to_timm(weights.params), config)
    assert_same(again.params, weights.params)
    assert again.model == weights.model
    assert again.preprocess["image_size"] == (64, 64)


@pytest.mark.parametrize(
    ("sizes", "activation", "words"),
    [
        ((16, 768, 12, 384, 3072), "gelu_tanh", "model.activation='gelu_tanh': timm's Mixers"),
        ((16, 768, 11, 384, 3072), "gelu_erf", "patches of 16x16, width 768 and 11 blocks: timm"),
        ((16, 384, 12, 192, 700), "swiglu", "MLPs of 192 and 700: timm's gmixer_12_224 has others"),
    ],
)
def test_no_config_is_written_for_what_timm_has_no_name(sizes, activation, words):
    with pytest.raises(ValueError, match=words):
        make_timm_config(make_named(sizes, activation))


def test_parameters_without_a_place_are_refused():
    weights = read_case("timm_mixer")
    with pytest.raises(ValueError, match="timm has no place for extra"):
        mixer_to_timm(weights.params | {"extra": np.ones(2)})
    assert mixer_to_linen({"extra.weight": np.ones(2)}).keys() == {"extra.weight"}


def test_the_dtype_of_a_mixer_stays(tmp_path):
    weights = read_case("timm_mixer_gated")
    params = {path: x.astype(np.float16) for path, x in weights.params.items()}
    convert(dataclasses.replace(weights, params=params), tmp_path / "x.safetensors")
    assert_same(read_safetensors(tmp_path / "x.safetensors").params, params)
