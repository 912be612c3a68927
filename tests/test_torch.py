# SPDX-License-Identifier: Apache-2.0
"""PyTorch's timm computes the same logits, with weights from here and weights to here.

It needs an interpreter that has torch and timm: `make verify-torch` makes one.
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.trained import write_images, write_model
from vit_jax.checkpoint.pretrained.safetensors import read_safetensors, write_safetensors
from vit_jax.checkpoint.pretrained.timm_tensors import TIMM_RESNET
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.export.__main__ import main as export
from vit_jax.inference.model import load_model
from vit_jax.models.variants import make_vit

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / os.environ.get("TORCH_PYTHON", "build/torch/bin/python")
CLASSES = 11
# Nothing in these files of timm states what must be known of rotary embeddings, of pooling, and of
# the tokens that have position embeddings.
REFUSED = [("rope_token", "theirs"), ("map", "theirs"), ("swiglu", "theirs")]

# The arguments of the model here, the image size, and timm's model: a function and its arguments.
CASES = {
    "vit": (
        {"variant": "Ti/16", "activation": "gelu_erf"},
        224,
        ("timm.create_model", {"model_name": "vit_tiny_patch16_224"}),
    ),
    "rope": (
        {
            "variant": "Ti/16",
            "num_layers": 4,
            "classifier": "gap",
            "norm_after_pooling": True,
            "position_embedding": "none",
            "rope_theta": 10_000.0,
            "rope_reference_grid": (16, 16),
            "num_registers": 4,
            "layer_scale_init": 0.5,
            "activation": "gelu_erf",
        },
        160,
        (
            "timm.models.eva.Eva",
            {
                "img_size": 160,
                "embed_dim": 192,
                "depth": 4,
                "num_heads": 3,
                "attn_type": "rope",
                "class_token": False,
                "num_reg_tokens": 4,
                "init_values": 0.5,
                "use_abs_pos_emb": False,
                "use_rot_pos_emb": True,
                "ref_feat_shape": 16,
            },
        ),
    ),
    "rope_token": (
        {
            "variant": "Ti/16",
            "num_layers": 2,
            "mlp_dim": 384,
            "rope_theta": 100.0,
            "num_registers": 2,
            "activation": "swiglu",
            "qk_norm": True,
        },
        96,
        (
            "timm.models.eva.Eva",
            {
                "img_size": 96,
                "embed_dim": 192,
                "depth": 2,
                "num_heads": 3,
                "mlp_ratio": 2,
                "swiglu_mlp": True,
                "qk_norm": True,
                "attn_type": "rope",
                "global_pool": "token",
                "num_reg_tokens": 2,
                "no_embed_class": True,
                "use_rot_pos_emb": True,
                "rope_temperature": 100.0,
            },
        ),
    ),
    "swiglu": (
        {
            "variant": "Ti/16",
            "num_layers": 2,
            "mlp_dim": 192,
            "num_registers": 3,
            "activation": "swiglu",
            "qk_norm": True,
            "layer_scale_init": 0.5,
        },
        96,
        (
            "timm.models.vision_transformer.VisionTransformer",
            {
                "img_size": 96,
                "embed_dim": 192,
                "depth": 2,
                "num_heads": 3,
                "mlp_ratio": 2,
                "mlp_layer": "SwiGLUPacked",
                "act_layer": "silu",
                "qk_norm": True,
                "init_values": 0.5,
                "reg_tokens": 3,
                "no_embed_class": True,
            },
        ),
    ),
    "map": (
        {"variant": "Ti/16", "num_layers": 2, "classifier": "map", "num_registers": 2},
        96,
        (
            "timm.models.vision_transformer.VisionTransformer",
            {
                "img_size": 96,
                "embed_dim": 192,
                "depth": 2,
                "num_heads": 3,
                "act_layer": "gelu_tanh",
                "class_token": False,
                "global_pool": "map",
                "pool_include_prefix": True,
                "reg_tokens": 2,
                "no_embed_class": True,
            },
        ),
    ),
    "hybrid_stem": (
        {"variant": "R+Ti/16", "activation": "gelu_erf", **TIMM_RESNET},
        224,
        ("timm.create_model", {"model_name": "vit_tiny_r_s16_p8_224"}),
    ),
    "hybrid": (
        {
            "variant": "R26+S/32",
            "num_layers": 2,
            "hidden_size": 192,
            "mlp_dim": 768,
            "num_heads": 3,
            "resnet_width": 0.5,
            **TIMM_RESNET,
            "activation": "gelu_erf",
        },
        224,
        (
            "timm.models.vision_transformer.VisionTransformer",
            {
                "img_size": 224,
                "patch_size": 1,
                "embed_dim": 192,
                "depth": 2,
                "num_heads": 3,
                "backbone": {"layers": [2, 2, 2, 2], "width_factor": 0.5},
            },
        ),
    ),
}


def random_params(model, image_size):
    """Returns parameters of a model; scales lie around 1, the rest around 0."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32)
    init = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    rng = np.random.default_rng(0)
    return {
        path: rng.normal(float(path.endswith("/scale")), 0.05, x.shape).astype(np.float32)
        for path, x in traverse_util.flatten_dict(init["params"], sep="/").items()
    }


def logits(model, params, image):
    nested = traverse_util.unflatten_dict(dict(params), sep="/")
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p, x: model.apply({"params": p}, x, train=False)[0])(nested, image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What timm computes for all cases: see `tests/testdata/run_timm.py`."""
    if not PYTHON.exists():
        pytest.skip(f"no {PYTHON}, an interpreter with torch and timm; `make verify-torch` runs it")
    folder = tmp_path_factory.mktemp("torch")
    specs = {}
    for name, (options, size, (function, arguments)) in CASES.items():
        (folder / name).mkdir()
        image = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
        np.save(folder / name / "image.npy", image)
        params = random_params(make_vit(**options, num_classes=CLASSES), size)
        weights = Weights(params=params, layout="test", model=options)
        write_safetensors(folder / name / "ours.safetensors", weights)
        specs[name] = (function, arguments | {"num_classes": CLASSES})
    (folder / "cases.json").write_text(json.dumps(specs))
    script = ROOT / "tests" / "testdata" / "run_timm.py"
    subprocess.run([PYTHON, script, folder], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source"),
    [(n, s) for n in CASES for s in ("ours", "theirs") if (n, s) not in REFUSED],
)
def test_logits_are_those_of_timm(name, source, folder):
    options, _, _ = CASES[name]
    case = folder / name
    weights = read_safetensors(case / f"{source}.safetensors")
    if name == "rope":  # Nothing beside timm's file says so.
        for key in ("rope_theta", "rope_reference_grid"):
            assert weights.model[key] == options[key]
    arguments = {k: v for k, v in weights.model.items() if k != "name"}
    model = make_vit(**arguments, num_classes=CLASSES)
    found = logits(model, weights.params, np.load(case / "image.npy"))
    expected = np.load(case / f"{source}.npy")
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


# Models of 8x8 pixels that `vit_jax.export` writes, with changes to `tests.trained.VIT`.
EXPORTED = {
    "token": {},
    "erf": {"activation": "gelu_erf", "layer_scale_init": 0.1, "qk_norm": True},
    "registers": {"num_registers": 2},
    "gap": {"classifier": "gap", "position_embedding": "sincos2d"},
    "gap_norm": {"classifier": "gap", "norm_after_pooling": True},
    "map": {"classifier": "map", "num_registers": 2},
    "distilled": {"distillation_token": True},
    "rope": {"rope_theta": 50.0, "activation": "gelu_erf", "num_registers": 1},
    "rope_grid": {
        "rope_theta": 100.0,
        "rope_reference_grid": (4, 4),
        "activation": "gelu_erf",
        "layer_scale_init": 0.1,
    },
    "rope_swiglu": {
        "rope_theta": 100.0,
        "activation": "swiglu",
        "position_embedding": "none",
        "classifier": "gap",
    },
    "pre_logits": {"representation_size": 12},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders that were exported, and in each what timm and transformers make of it."""
    if not PYTHON.exists():
        pytest.skip(f"no {PYTHON}, an interpreter with torch and timm; `make verify-torch` runs it")
    place = tmp_path_factory.mktemp("exported")
    (place / "names.txt").write_text("ant\nbee\nça va\n")
    write_images(place / "images", 2)
    for name, changes in EXPORTED.items():
        write_model(place / f"{name}.npz", **changes)
        labels = [f"--labels={place / 'names.txt'}"]
        source = [f"--checkpoint={place / name}.npz", *labels]
        export([*source, "--to=safetensors", f"--output={place / name}"])
    script = ROOT / "tests" / "testdata" / "run_timm_folders.py"
    subprocess.run([PYTHON, script, place, *EXPORTED], check=True)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_folder_is_a_model_of_timm_and_transformers(name, exported):
    model = load_model(exported / f"{name}.npz")
    images = [model.preprocess(exported / "images" / f"{i:02}.png") for i in range(2)]
    found = json.loads((exported / name / "timm.json").read_text())
    if name == "pre_logits":
        expected = model.features(images, "encoded")[:, 0]
        np.testing.assert_allclose(found["features"], expected, atol=1e-4)
        return
    expected = model(images).logits
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found["timm"], expected, atol=1e-4)
    np.testing.assert_allclose(found["transformers"], expected, atol=1e-4)
    assert found["id2label"] == {"0": "ant", "1": "bee", "2": "ça va"}
    assert found["names"] == ["ant", "bee", "ça va"]
