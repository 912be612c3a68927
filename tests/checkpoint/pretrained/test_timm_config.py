# SPDX-License-Identifier: Apache-2.0
"""The config.json from which timm rebuilds a model."""

import json

import numpy as np
import pytest

from tests.checkpoint.pretrained.test_safetensors import random_params
from vit_jax.checkpoint.pretrained.convert import convert
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.safetensors import MODEL_KEYS
from vit_jax.checkpoint.pretrained.timm import read_timm
from vit_jax.checkpoint.pretrained.timm_config import make_timm_config
from vit_jax.checkpoint.pretrained.timm_tensors import TIMM_RESNET, to_timm
from vit_jax.checkpoint.pretrained.weights import Weights, infer_model

NAMES = ("ant", "bee", "ça va")
LINE = (
    "decode|resize_small(36, method='bicubic_antialias', rounding='down')"
    "|central_crop(32, rounding='nearest')"
)
PREPROCESS = {"mean": 0.4, "std": (0.1, 0.2, 0.3), "image_size": (32, 32), "eval": LINE}


DINOV3 = {
    "rope_theta": 100.0,
    "rope_coordinates": "centered",
    "position_embedding": "none",
    "num_registers": 4,
    "qkv_bias": "query_value",
    "layer_scale_init": 1e-5,
    "norm_epsilon": 1e-5,
}


def describe(params, model, **preprocess):
    preprocess = PREPROCESS | preprocess
    return Weights(
        params=params, layout="test", model=model, preprocess=preprocess, class_names=NAMES
    )


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"activation": "gelu_erf", "layer_scale_init": 0.1, "qk_norm": True},
        {"num_registers": 2},
        {"classifier": "gap", "position_embedding": "sincos2d"},
        {"classifier": "gap", "norm_after_pooling": True},
        {"classifier": "map", "num_registers": 2},
        {"distillation_token": True},
        {"rope_theta": 50.0, "activation": "gelu_erf", "num_registers": 1},
        {"rope_theta": 100.0, "activation": "swiglu", "position_embedding": "none"},
        {"rope_theta": 9.0, "activation": "gelu_erf", "rope_reference_grid": (8, 8)},
        {"resnet_layers": (), "patch_size": 2, **TIMM_RESNET},
        DINOV3 | {"activation": "gelu_erf"},
        DINOV3 | {"activation": "swiglu", "mlp_dim": 20, "qkv_bias": "none", "classifier": "gap"},
        DINOV3 | {"activation": "gelu_erf", "norm_epsilon": 1e-6, "mlp_norm": True},
        {"position_embedding": "relative", "activation": "gelu_erf", "qkv_bias": "query_value"},
        {
            **{"position_embedding": "relative", "activation": "swiglu", "mlp_norm": True},
            **{"classifier": "gap", "norm_after_pooling": True, "num_registers": 1},
            **{"qkv_bias": "query_value", "layer_scale_init": 0.1},
        },
        {"rope_theta": 10.0, "rope_frequencies": "mixed", "activation": "gelu_erf"},
        {
            **{"rope_theta": 9.0, "rope_offset": 1.0, "rope_reference_grid": (24, 24)},
            **{"pre_norm": True, "embedding_bias": False, "norm_epsilon": 1e-5},
            **{"classifier": "map", "num_registers": 2, "map_num_heads": 4, "map_mlp_dim": 40},
            **{"activation": "gelu_erf"},
        },
        {"norm": "rms_norm", "qk_norm": True, "attention_norm": True, "mlp_norm": True},
    ],
    ids=str,
)
def test_the_model_is_the_one_that_timm_would_make(change):
    params, model = random_params(**change)
    weights = describe(params, model)
    config, notes = make_timm_config(weights)
    assert notes == []
    tensors = to_timm(params, model=model, grid=(4, 4))
    # As a folder of timm is read, which knows nothing of this package.
    found = read_timm(tensors, json.loads(json.dumps(config)), None)
    inferred = infer_model(params)
    expected = {"position_embedding": "learned"} | inferred | model
    expected["patch_size"] = inferred["patch_size"]
    for key in MODEL_KEYS:
        ours, theirs = expected.get(key), found.model.get(key)
        if key == "position_embedding" and ours == "sincos2d":
            ours = "learned"
        if key == "layer_scale_init":  # Only whether there is one matters after training.
            ours, theirs = ours is None, theirs is None
        if key == "norm_epsilon" or (key == "activation" and ours is None):
            continue
        assert (theirs or None) == (ours or None), key
    assert found.class_names == NAMES
    assert found.preprocess == {**PREPROCESS, "mean": (0.4, 0.4, 0.4)}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("decode|resize(32, method='bilinear_antialias')", ("squash", 1.0, "bilinear")),
        ("decode|resize(32)", ("squash", 1.0, "bilinear")),
        ("decode|resize_small(40)|central_crop(32)", ("center", 0.8, "bilinear")),
        ("decode", ("squash", 1.0, "bilinear")),
    ],
)
def test_a_preparation_that_timm_has_not_is_noted(line, expected):
    config, notes = make_timm_config(describe(*random_params(), eval=line))
    images = config["pretrained_cfg"]
    assert (images["crop_mode"], images["crop_pct"], images["interpolation"]) == expected
    same = "antialias" in line
    assert [f"timm has no line that equals {line!r}" in note for note in notes] == [True][same:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swiglu"}, "swiglu"),
        ({"norm_epsilon": 1e-3}, "model.norm_epsilon=0.001: timm's models have 1e-06"),
        ({"resnet_layers": (1,), "patch_size": 2}, "timm has no such hybrid by name"),
    ],
)
def test_what_no_function_of_timm_makes_is_refused(change, message):
    params, model = random_params(**change)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make_timm_config(describe(params, model))


def test_the_layer_that_timm_lacks_is_left_out_with_its_head_and_a_note(tmp_path):
    params, model = random_params(representation_size=8)
    lines = convert(describe(params, model), tmp_path / "x.safetensors")
    (note,) = [line for line in lines if "pre_logits" in line]
    assert note.startswith("pre_logits, head: left out, since timm has no tanh layer")
    found = load_pretrained(str(tmp_path / "x.safetensors"))
    assert found.class_names is None
    expected = {k: x for k, x in params.items() if not k.startswith(("pre_logits/", "head/"))}
    assert found.params.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(found.params[path], x)
