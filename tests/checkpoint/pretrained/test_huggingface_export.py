# SPDX-License-Identifier: Apache-2.0
"""Files written for Hugging Face are those that its own classes write."""

import json
import re

import pytest

from tests.checkpoint.pretrained.test_safetensors import (
    CASES,
    GOLDEN,
    assert_same,
    random_params,
    raw_tensors,
    read_case,
)
from vit_jax.checkpoint.pretrained.huggingface import read_huggingface
from vit_jax.checkpoint.pretrained.huggingface_export import make_huggingface
from vit_jax.checkpoint.pretrained.weights import Weights

# It has two classifiers.
NAMES = [name for name in CASES if name.startswith("hf_") and name != "hf_deit"]
DINOV2 = {"layer_scale_init": 0.1, "classifier": "token_gap"}


@pytest.mark.parametrize("name", NAMES)
def test_what_huggingface_wrote_is_written_back(name):
    weights = read_case(name)
    tensors, config, processor, notes = make_huggingface(weights)
    assert_same(tensors, dict(raw_tensors(GOLDEN / name / "model.safetensors")[0]))
    theirs = json.loads((GOLDEN / name / "config.json").read_text())
    # They write few of the default values; those here are all that decide the function.
    unlike = {k: (v, theirs[k]) for k, v in config.items() if k in theirs and v != theirs[k]}
    assert unlike.keys() <= {"layerscale_value", "pos_embed_rescale", "label2id"}
    again = read_huggingface(tensors, json.loads(json.dumps(config)), processor or {}, None)
    assert_same(again.params, weights.params)
    assert again.model == weights.model
    assert again.preprocess == weights.preprocess
    assert notes == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "rms_norm"}, "ViTModel computes something else: model.norm='rms_norm'"),
        ({"activation": "swiglu"}, "model.activation='swiglu'"),
        ({"classifier": "map"}, "model.classifier='map' (there 'token')"),
        ({"num_registers": 2}, "model.num_registers=2 (there 0)"),
        ({"rope_theta": 9.0}, "DINOv3ViTModel computes something else: "),
        ({"patch_size": (4, 8)}, "patches of 4x8 pixels"),
        ({**DINOV2, "mlp_dim": 24}, "model.mlp_dim=24: Hugging Face's DINOv2 has whole multiples"),
        ({"position_embedding": "sincos2d"}, "position_embedding"),
    ],
)
def test_what_huggingface_cannot_express_is_refused(options, words):
    params, model = random_params(**options)
    with pytest.raises(ValueError, match=re.escape(words)):
        make_huggingface(Weights(params=params, layout="test", model=model))
