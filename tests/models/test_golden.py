# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints load into the model and give the logits of the original code."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.models.compiled import compiled
from vit_jax.checkpoint.pretrained.adapt import adapt_params
from vit_jax.checkpoint.pretrained.npz import read_npz
from vit_jax.models.mixer import MlpMixer
from vit_jax.models.vit import VisionTransformer

GOLDEN = Path(__file__).parents[1] / "testdata" / "golden"
CASES = ["vit_token", "vit_gap", "vit_pre_logits", "hybrid_root", "hybrid_stages", "mixer"]
RESIZED = [("vit_token", 48), ("vit_token", 64), ("vit_gap", 48)]
POSEMB = "Transformer/posembed_input/pos_embedding"


def make_model(case):
    spec = json.loads((GOLDEN / f"{case}.json").read_text())
    config = spec["config"]
    patch_size = tuple(config["patches"]["size"])
    if spec["model_type"] == "Mixer":
        return MlpMixer(
            num_classes=spec["num_classes"],
            patch_size=patch_size,
            hidden_size=config["hidden_dim"],
            num_layers=config["num_blocks"],
            tokens_mlp_dim=config["tokens_mlp_dim"],
            channels_mlp_dim=config["channels_mlp_dim"],
        )
    stem = config.get("resnet")
    return VisionTransformer(
        num_classes=spec["num_classes"],
        patch_size=patch_size,
        resnet_layers=tuple(stem["num_layers"]) if stem else None,
        resnet_width=stem["width_factor"] if stem else 1.0,
        hidden_size=config["hidden_size"],
        num_layers=config["transformer"]["num_layers"],
        num_heads=config["transformer"]["num_heads"],
        mlp_dim=config["transformer"]["mlp_dim"],
        classifier=config["classifier"],
        representation_size=config["representation_size"],
    )


def load_io(case):
    with np.load(GOLDEN / f"{case}_io.npz") as file:
        return dict(file)


def nested(params):
    return traverse_util.unflatten_dict(params, sep="/")


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


@pytest.mark.parametrize("case", CASES)
def test_paths_and_shapes_are_those_of_the_file(case):
    init = functools.partial(make_model(case).init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), load_io(case)["image"])["params"]
    expected = {path: x.shape for path, x in read_npz(GOLDEN / f"{case}.npz").params.items()}
    assert {path: x.shape for path, x in flat(params).items()} == expected


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_original_code(case):
    io = load_io(case)
    params = nested(read_npz(GOLDEN / f"{case}.npz").params)
    with jax.default_matmul_precision("highest"):
        logits, _ = make_model(case).apply({"params": params}, io["image"], train=False)
    np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("case", "image_size"), RESIZED)
def test_a_file_is_adapted_to_another_image_size(case, image_size):
    model, source = make_model(case), read_npz(GOLDEN / f"{case}.npz")
    images = np.zeros((1, image_size, image_size, 3), np.float32)
    target = model.init(jax.random.key(0), images, train=False)["params"]
    grid = (image_size // model.patch_size[0], image_size // model.patch_size[1])

    params, notes = adapt_params(
        source, target, target_grid=grid, num_class_tokens=model.num_class_tokens
    )

    assert f"position embeddings: resized from 4x4 to {grid[0]}x{grid[1]}, bilinear" in notes
    expected = source.params | {POSEMB: load_io(case)[f"posemb_{image_size}"]}
    for path, x in flat(params).items():
        atol = 1e-6 if path == POSEMB else 0
        np.testing.assert_allclose(x, expected[path], rtol=0, atol=atol, err_msg=path)
    logits, _ = compiled(model)({"params": params}, images, train=False)
    assert np.all(np.isfinite(logits))
