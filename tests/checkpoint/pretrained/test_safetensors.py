# SPDX-License-Identifier: Apache-2.0
"""Files of timm and Hugging Face give their logits here, and files written here are timm's."""

import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import traverse_util

from tests.models.compiled import compiled
from vit_jax.checkpoint.pretrained.convert import convert
from vit_jax.checkpoint.pretrained.rebuild import fill_model, rebuild_model
from vit_jax.checkpoint.pretrained.safetensors import (
    read_safetensors,
    read_tensors,
    write_safetensors,
    write_tensors,
)
from vit_jax.checkpoint.pretrained.timm_config import make_timm_config
from vit_jax.checkpoint.pretrained.timm_tensors import to_timm
from vit_jax.checkpoint.pretrained.weights import RELATIVE, Weights
from vit_jax.data.ops.transforms import apply
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.models.positions import resize_biases
from vit_jax.models.variants import MODELS as MAKERS
from vit_jax.utils.errors import UserError

GOLDEN = Path(__file__).parents[2] / "testdata" / "torch"
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
# Attention has a bias for each distance between patches, for one size of images.
BEIT = {"timm_beit", "timm_beit_token"}
# Its MLPs over patches are for one number of these.
MIXERS = {"timm_mixer", "timm_mixer_gated"}
# Of timm's ways to write the same parameters, those that differ from that of `write_safetensors`:
# no biases, a class token that is not used, channels in another order, projections that are not one
# matrix.
ONE_WAY = {"timm_vit_average", "timm_eva_rope_ape", "timm_eva", "timm_eva02"}
# Attention depends on positions by parameters, or columns come first.
POSITIONED = sorted(BEIT | {"timm_rope_mixed", "timm_rope_mixed_ape", "timm_pe"})
WRITTEN_BACK = [name for name in CASES if name.startswith("timm") and name not in ONE_WAY]
POSEMB = "Transformer/posembed_input/pos_embedding"


def read_case(name):
    return read_safetensors(GOLDEN / name / "model.safetensors")


def raw_tensors(path):
    return read_tensors(epath.Path(path))


def copy_weights(name, folder):
    """Copies the weights alone, without the files beside them."""
    return shutil.copy(GOLDEN / name / "model.safetensors", folder / "any_name.safetensors")


def make(model, num_classes):
    return MAKERS[model["name"]](
        **{k: v for k, v in model.items() if k != "name"}, num_classes=num_classes
    )


def run(model, params, image, num_classes):
    vit = make(model, num_classes)
    params = {path: np.asarray(x, np.float32) for path, x in params.items()}
    nested = traverse_util.unflatten_dict(params, sep="/")
    init = jax.eval_shape(lambda x: vit.init(jax.random.key(0), x, train=False), image)["params"]
    expected = {k: x.shape for k, x in traverse_util.flatten_dict(init, sep="/").items()}
    assert {path: x.shape for path, x in params.items()} == expected
    with jax.default_matmul_precision("highest"):
        return compiled(vit)({"params": nested}, image, train=False)[1]


def random_params(seed=0, **model):
    """Returns `(params, model)` of a tiny model with all parameters random."""
    sizes = {
        "name": "vit",
        "patch_size": 8,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "mlp_dim": 24,
    }
    model = sizes | model
    vit = make(model, 3)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    init = jax.eval_shape(lambda x: vit.init(jax.random.key(0), x, train=False), images)["params"]
    rng = np.random.default_rng(seed)
    shapes = {k: x.shape for k, x in traverse_util.flatten_dict(init, sep="/").items()}
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}, model


def write(path, params, model, **preprocess):
    weights = Weights(params=params, layout="test", model=model, preprocess=preprocess)
    write_safetensors(path, weights)
    return path


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        np.testing.assert_array_equal(actual[name], x, err_msg=name)


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_original_code(name):
    weights = read_case(name)
    check_outputs(name, weights, weights.params, "")


def test_relative_positions_at_another_size_are_those_of_timm():
    weights = read_case("timm_beit_token")
    params, notes = fill_model(rebuild_model(weights), weights, (48, 40, 3))
    assert "relative positions: resized from 4x4 to 6x5 patches" in notes
    with np.load(GOLDEN / "timm_beit_token" / "io.npz") as file:
        image = file["other_image"]
    with np.load(GOLDEN / "biases.npz") as file:
        expected = file["logits"]
    out = run(weights.model, traverse_util.flatten_dict(params, sep="/"), image, 5)
    np.testing.assert_allclose(out["logits"], expected, rtol=0, atol=1e-5)


def test_relative_positions_of_an_oblong_are_resized_by_their_own_grid(tmp_path):
    path = f"Transformer/encoderblock_1/MultiHeadDotProductAttention_0/{RELATIVE}"
    weights = read_case("timm_beit")
    params, notes = fill_model(rebuild_model(weights), weights, (24, 32, 3))
    assert "relative positions: resized from 4x3 to 3x4 patches" in notes
    resized = traverse_util.flatten_dict(params, sep="/")[path]
    expected = resize_biases(weights.params[path], source_grid=(4, 3), target_grid=(3, 4))
    np.testing.assert_array_equal(resized, expected)
    assert not np.array_equal(resized, weights.params[path])
    unknown = read_safetensors(describe("timm_beit", tmp_path, pretrained_cfg={}))
    message = refusal(lambda: fill_model(rebuild_model(unknown), unknown, (24, 32, 3)))
    assert "of no square" in message
    assert "pretrained_cfg.input_size" in message


def test_parameters_that_weights_lack_are_not_made_up():
    weights = read_case("timm_beit")
    model, shape = rebuild_model(weights), (32, 24, 3)
    message = refusal(lambda: fill_model(model, weights, shape, dont_load=("head/.*",)))
    assert "2 parameters of the model are not in these weights: head/bias, head/kernel" in message
    held = ("head/bias", "head/kernel")
    params, _ = fill_model(model, weights, shape, held=held, dont_load=("head/.*",))
    assert np.isnan(params["head"]["kernel"]).all()


@pytest.mark.parametrize("name", sorted(BEIT))
def test_biases_by_distance_are_converted(name, tmp_path):
    weights = read_case(name)
    (*_, last) = convert(weights, tmp_path / "x.npz")
    assert last.startswith("read back: every parameter is the same")


@pytest.mark.parametrize("name", sorted(set(CASES) - BEIT - MIXERS))
def test_outputs_at_another_size_are_those_of_the_original_code(name):
    weights = read_case(name)
    params, notes = fill_model(rebuild_model(weights), weights, (48, 40, 3))
    learned = weights.model["position_embedding"] == "learned"
    assert learned == any(re.search("resized from 4x[34] to 6x5, bicubic", x) for x in notes)
    check_outputs(name, weights, traverse_util.flatten_dict(params, sep="/"), "other_")


def check_outputs(name, weights, params, prefix):
    with np.load(GOLDEN / name / "io.npz") as file:
        found = {key: file[key] for key in file.files if key.startswith("other_") == bool(prefix)}
    io = {key.removeprefix(prefix): x for key, x in found.items()}
    image, classes = io.pop("image"), io["logits"].shape[-1] if "logits" in io else 0
    out = run(weights.model, params, image, classes)
    if weights.model.get("distillation_token"):  # The published logits are of the first head.
        io["class_logits"] = io.pop("logits")
        head = [weights.params[f"head_dist/{x}"] for x in ("kernel", "bias")]
        second = out["encoded"][:, 1] @ head[0] + head[1]
        io["logits"] = (io["class_logits"] + second) / 2
    for key, expected in io.items():
        atol = 1e-5
        np.testing.assert_allclose(out[key], expected, rtol=0, atol=atol, err_msg=key)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("timm_vit", "timm safetensors"),
        ("timm_hybrid", "timm hybrid safetensors"),
        ("timm_mixer", "timm Mixer safetensors"),
        ("hf_vit", "Hugging Face ViT safetensors"),
        ("hf_deit", "Hugging Face DeiT safetensors"),
        ("hf_dinov2", "Hugging Face DINOv2 safetensors"),
        ("hf_dinov2_registers", "Hugging Face DINOv2 with registers safetensors"),
    ],
)
def test_the_layout_is_known_by_the_tensor_names(name, layout, tmp_path):
    assert read_safetensors(copy_weights(name, tmp_path), num_heads=4).layout == layout


@pytest.mark.parametrize("name", WRITTEN_BACK)
def test_what_timm_wrote_is_written_back(name, tmp_path):
    weights = read_case(name)
    path = write(tmp_path / "model.safetensors", weights.params, weights.model)
    expected, _ = raw_tensors(GOLDEN / name / "model.safetensors")
    expected = dict(expected)
    if name == "timm_vit_registers":  # Positions of registers: they are part of the registers here.
        slots, expected["pos_embed"] = np.split(expected["pos_embed"], [2], axis=1)
        expected["reg_token"] = expected["reg_token"] + slots
    if name == "timm_pe":  # The position of the class token is a part of it here.
        slot, expected["pos_embed"] = np.split(expected["pos_embed"], [1], axis=1)
        expected["cls_token"] = expected["cls_token"] + slot
    if name == "timm_rope_mixed_ape":
        expected["pos_embed"] = np.pad(expected["pos_embed"], ((0, 0), (1, 0), (0, 0)))
    if name == "timm_vit_no_embed_class":  # Without registers the class token has a slot here.
        expected["pos_embed"] = np.pad(expected["pos_embed"], ((0, 0), (1, 0), (0, 0)))
        for i in range(2):
            expected[f"blocks.{i}.attn.qkv.bias"] = np.zeros(96, np.float32)
    assert_same(raw_tensors(path)[0], expected)


@pytest.mark.parametrize("name", POSITIONED)
def test_positions_in_the_blocks_are_read_from_what_is_written(name, tmp_path):
    weights = read_case(name)
    own = read_safetensors(
        write(tmp_path / "own", weights.params, weights.model, mean=0.5, std=0.5)
    )
    assert_same(own.params, weights.params)
    assert make(own.model, 5) == make(weights.model, 5)
    assert own.notes == ()
    # As timm reads the exported folder, which knows nothing of this package.
    config, _ = make_timm_config(weights)
    tensors = to_timm(weights.params, model=weights.model, grid=None)
    write_tensors(tmp_path / "model.safetensors", tensors, metadata={})
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = read_safetensors(tmp_path / "model.safetensors")
    # Without a reference grid, timm has that of the images, which is the same function.
    assert_same(again.params, weights.params)
    assert make(again.model, 5) == make(weights.model, 5)
    check_outputs(name, again, again.params, "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classifier": "gap"}, "model.norm_after_pooling=None"),
        ({"classifier": "gap", "norm_after_pooling": True}, "model.num_registers=None"),
        ({"num_registers": 1}, "model.num_registers=1"),
        ({"classifier": "map"}, "model.classifier=map"),
        ({"qk_norm": True}, "model.qk_norm=True"),
        ({"rope_theta": 9.0}, "model.rope_theta=9.0"),
        ({"norm": "rms_norm"}, "model.norm=rms_norm"),
        ({"activation": "quick_gelu"}, "quick_gelu"),
        ({}, "model.qkv_bias='query_value'"),
    ],
)
def test_relative_positions_beside_what_timm_lacks_are_refused(change, words, tmp_path):
    options = {"position_embedding": "relative", "activation": "gelu_erf"} | change
    message = refusal(write, tmp_path / "x", *random_params(**options))
    assert words in message
    assert "Beit" not in message


MODELS = {
    "token": {},
    "gap": {"classifier": "gap", "norm_after_pooling": True, "norm_epsilon": 1e-12},
    "map": {"classifier": "map", "num_registers": 2, "activation": "gelu_erf"},
    "unpooled": {"classifier": "unpooled"},
    "token_unpooled": {"classifier": "token_unpooled"},
    "swiglu": {"activation": "swiglu", "qk_norm": True, "layer_scale_init": 0.1},
    "oblong": {"patch_size": (4, 8)},
    "rope": {
        "classifier": "gap",
        "rope_theta": 100.0,
        "position_embedding": "none",
        "num_registers": 1,
        "activation": "gelu_erf",
        "layer_scale_init": 0.1,
    },
    "dinov3": {
        "rope_theta": 100.0,
        "rope_coordinates": "centered",
        "position_embedding": "none",
        "num_registers": 4,
        "activation": "swiglu",
        "qkv_bias": "query_value",
        "layer_scale_init": 0.1,
        "norm_epsilon": 1e-5,
    },
    "inner_norms": {"attention_norm": True, "mlp_norm": True, "qkv_bias": "query_value"},
    "rms_norm": {"norm": "rms_norm", "qk_norm": True, "qkv_bias": "none"},
    "relative": {
        "position_embedding": "relative",
        "activation": "swiglu",
        "mlp_norm": True,
        "qkv_bias": "query_value",
    },
    "mixed": {
        "rope_theta": 10.0,
        "rope_frequencies": "mixed",
        "classifier": "gap",
        "num_registers": 3,
        "activation": "gelu_erf",
    },
    "perception": {
        "rope_theta": 100.0,
        "rope_offset": 1.0,
        "pre_norm": True,
        "embedding_bias": False,
        "classifier": "map",
        "num_registers": 2,
        "map_num_heads": 4,
        "map_mlp_dim": 40,
        "activation": "gelu_erf",
        "norm_epsilon": 1e-5,
    },
    "hybrid": {"resnet_layers": (1, 2), "resnet_width": 0.5, "patch_size": 1},
    "stem": {"resnet_layers": (), "patch_size": 2},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_written_file_gives_the_same_parameters_and_model(name, tmp_path):
    params, model = random_params(**MODELS[name])
    preprocess = {"mean": 0.5, "std": (0.5, 0.4, 0.3), "image_size": (32, 32), "eval": "decode"}
    path = write(tmp_path / "x.safetensors", params, model | {"dropout_rate": 0.1}, **preprocess)
    weights = read_safetensors(path)
    assert_same(weights.params, params)
    assert weights.layout == "vit_jax safetensors"
    assert weights.preprocess == preprocess
    assert weights.notes == ()
    assert make(weights.model, 3) == make(model, 3)


def test_bfloat16_stays_bfloat16(tmp_path):
    params, model = random_params()
    params = {path: x.astype(jnp.bfloat16) for path, x in params.items()}
    assert_same(read_safetensors(write(tmp_path / "x", params, model)).params, params)
    assert {x.dtype for x in read_case("timm_vit_bfloat16").params.values()} == {
        np.dtype(jnp.bfloat16)
    }


@pytest.mark.parametrize(
    "change",
    [
        {"num_registers": 2},
        {"position_embedding": "sincos2d"},
        {"position_embedding": "sincos2d", "num_registers": 2},
    ],
    ids=["registers", "sincos2d", "both"],
)
def test_merged_position_embeddings_leave_the_function_as_it_is(change, tmp_path):
    params, model = random_params(**change)
    path = write(tmp_path / "x", params, model, image_size=(32, 32))
    weights = read_safetensors(path)
    image = np.random.default_rng(1).normal(size=(1, 32, 32, 3)).astype(np.float32)
    before = run(model, params, image, 3)["encoded"]
    after = run(weights.model, weights.params, image, 3)["encoded"]
    np.testing.assert_array_equal(after, before)
    again, _ = raw_tensors(write(tmp_path / "y", weights.params, weights.model))
    assert_same(again, raw_tensors(path)[0])


def test_biases_of_keys_are_left_out_where_timm_has_none(tmp_path):
    params, model = random_params(**MODELS["rope"])
    names, _ = raw_tensors(write(tmp_path / "x", params, model))
    assert "blocks.0.attn.qkv.bias" in names
    params |= {k: np.zeros_like(x) for k, x in params.items() if k.endswith("/key/bias")}
    path = write(tmp_path / "y", params, model)
    names, _ = raw_tensors(path)
    assert "blocks.0.attn.qkv.bias" not in names
    assert names["blocks.0.attn.q_bias"].shape == (16,)
    assert_same(read_safetensors(path).params, params)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"representation_size": 8}, "pre_logits"),
        ({"rope_theta": 100.0}, "model.activation"),
        ({"untied_norm": True, "num_registers": 1}, "model.untied_norm"),
        ({"rope_theta": 9.0, "activation": "swiglu", "resnet_layers": (), "patch_size": 2}, "hyb"),
        ({"classifier": "map", "activation": "swiglu"}, "SwiGLU"),
        ({"position_embedding": "sincos2d"}, "preprocess.image_size"),
    ],
)
def test_what_timm_cannot_express_is_refused(change, words, tmp_path):
    params, model = random_params(**change)
    message = refusal(write, tmp_path / "x.safetensors", params, model)
    assert words in message
    assert not list(tmp_path.iterdir())


def test_unknown_parameters_are_not_written(tmp_path):
    params, model = random_params()
    params["txt/head/kernel"] = np.zeros((2, 2), np.float32)
    assert "txt/head/kernel" in refusal(write, tmp_path / "x", params, model)


def test_a_missing_parameter_is_named(tmp_path):
    params, model = random_params()
    path = "Transformer/encoderblock_1/MultiHeadDotProductAttention_0/key/bias"
    del params[path]
    assert path in refusal(write, tmp_path / "x", params, model)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    params, model = random_params()
    path = write(tmp_path / "x.safetensors", params, model)
    before = path.read_bytes()

    def fail(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    params["head/bias"] = params["head/bias"] + 1
    assert "No space left" in refusal(write, path, params, model)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_beit3_has_norms_of_another_epsilon(tmp_path):
    for architecture, epsilon in [("beit3_base_patch16_224", 1e-5), ("vit_base_patch16_224", 1e-6)]:
        path = describe(
            "timm_vit", tmp_path, architecture=architecture, model_args={"num_heads": 4}
        )
        assert read_safetensors(path).model["norm_epsilon"] == epsilon


def test_settings_come_from_the_files_beside_the_weights():
    weights = read_case("timm_vit_map")
    assert weights.model["activation"] == "gelu_tanh"  # As this architecture of timm has it.
    assert weights.preprocess == {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "image_size": (32, 32),
        "eval": "decode|resize_small(35, method='bicubic_antialias', rounding='down')"
        "|central_crop(32, rounding='nearest')",
    }
    assert weights.notes == ()
    weights = read_case("hf_vit_pooler")
    assert weights.model["activation"] == "gelu_tanh"
    assert weights.model["norm_epsilon"] == 1e-3
    assert weights.preprocess["mean"] == (0.5, 0.5, 0.5)
    assert weights.preprocess["eval"] == "decode|resize(32, 32, method='bilinear_antialias')"


@pytest.mark.parametrize(
    ("name", "epsilon"), [("timm_vit", 1e-6), ("hf_vit", 1e-12), ("hf_dinov2", 1e-6)]
)
def test_settings_that_nothing_states_are_noted(name, epsilon, tmp_path):
    weights = read_safetensors(copy_weights(name, tmp_path), num_heads=2)
    assert weights.model["num_heads"] == 2
    assert weights.model["norm_epsilon"] == epsilon
    assert weights.model["activation"] == "gelu_erf"
    assert weights.preprocess == {"image_size": (32, 32)}
    assert any("activation='gelu_erf'" in note and str(epsilon) in note for note in weights.notes)
    assert any("mean and std" in note for note in weights.notes)


def test_heads_of_a_width_are_usual_or_noted(tmp_path):
    def heads(width, depth):
        params, model = random_params(hidden_size=width, num_layers=depth)
        tensors, _ = raw_tensors(write(tmp_path / "own", params, model))
        write_tensors(tmp_path / "x", tensors, metadata={})
        weights = read_safetensors(tmp_path / "x")
        return weights.model["num_heads"], [n for n in weights.notes if "num_heads" in n]

    for width, expected in ((192, 3), (128, 2)):
        found, (note,) = heads(width, 1)
        assert found == expected
        assert f"no config.json names the model: assuming num_heads={expected}," in note
    with pytest.raises(UserError, match="num_heads"):
        heads(16, 1)


def test_preprocessing_with_a_crop_is_described(tmp_path):
    path = copy_weights("hf_dinov2", tmp_path)
    settings = {"size": {"shortest_edge": 256}, "do_center_crop": True, "resample": 3}
    settings |= {"crop_size": {"height": 224, "width": 224}, "do_normalize": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    weights = read_safetensors(path, num_heads=4)
    assert weights.preprocess == {
        "mean": 0.0,
        "std": 1.0,
        "image_size": (224, 224),
        "eval": "decode|resize_small(256, method='bicubic_antialias', rounding='down')"
        "|central_crop(224)",
    }


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"rescale_factor": 1 / 255}, 0.25, 0.5),
        ({"rescale_factor": 1 / 127.5}, 0.125, 0.25),
        ({"do_rescale": False}, 0.25 / 255, 0.5 / 255),
        ({"do_rescale": False, "rescale_factor": 1 / 255}, 0.25 / 255, 0.5 / 255),
        ({"do_normalize": False, "do_rescale": False}, 0, 1 / 255),
        ({"do_normalize": False, "rescale_factor": 1 / 127.5}, 0, 0.5),
    ],
)
@pytest.mark.parametrize("one", [False, True])
def test_colours_are_scaled_as_the_processor_scales_pixels(settings, mean, std, one, tmp_path):
    path = copy_weights("hf_vit", tmp_path)
    colors = {f"image_{k}": x if one else [x] * 3 for k, x in (("mean", 0.25), ("std", 0.5))}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(colors | settings))
    preprocess = read_safetensors(path, num_heads=4).preprocess
    np.testing.assert_allclose(preprocess["mean"], mean)
    np.testing.assert_allclose(preprocess["std"], std)


EVALUATION = GOLDEN / "evaluation.npz"
DESCRIPTIONS = json.loads((GOLDEN / "evaluation.json").read_text())


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_images_are_evaluated_as_the_original_code_prepares_them(case, tmp_path):
    path = copy_weights("timm_vit" if case.startswith("timm") else "hf_vit", tmp_path)
    for name, content in DESCRIPTIONS[case].items():
        if name == "config":  # The position embeddings of these weights are of another size.
            content = content | {"model_args": {"img_size": 32}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    weights = read_safetensors(path, num_heads=4)
    with np.load(EVALUATION) as golden:
        image, expected = golden["image"], golden[case]
    ops = parse_preprocess(weights.preprocess["eval"], key="eval")[1:]  # It is decoded.
    found = apply(ops, {"image": image}, np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(found, expected)
    assert weights.preprocess["image_size"] == expected.shape[:2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config", {"interpolation": "hamming"}, "'hamming' interpolation"),
        ("config", {"crop_mode": "border"}, "crop_mode='border'"),
        ("config", {"input_size": [3, 32, 48]}, "crop_mode='center' for 32x48"),
        ("config", {"crop_pct": 1.2}, "padded"),
        ("processor", {"resample": 4}, "'box' interpolation"),
        ("processor", {"size": {"shortest_edge": 32}}, "shorter side of 32"),
        ("processor", {"size": {"max_height": 32, "max_width": 32}}, "max_height"),
        ("processor", {"do_center_crop": True, "crop_size": 64}, "padded"),
        ("processor", {"do_resize": False}, "not resized (do_resize)"),
        ("processor", {"do_pad": True}, "do_pad=True"),
        ("processor", {"do_flip_channel_order": True}, "do_flip_channel_order=True"),
        ("processor", {"resample": ["bicubic"]}, "['bicubic'] interpolation"),
        ("config", {"interpolation": ["bicubic"]}, "['bicubic'] interpolation"),
    ],
)
def test_images_that_no_line_prepares_are_noted(name, content, words, tmp_path):
    path = copy_weights("timm_vit" if name == "config" else "hf_vit", tmp_path)
    if name == "config":
        images = {"input_size": [3, 32, 32]} | content
        content = {"architecture": "x", "model_args": {"img_size": 32}, "pretrained_cfg": images}
        (tmp_path / "config.json").write_text(json.dumps(content))
    else:
        content = {"size": {"height": 32, "width": 32}} | content
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    weights = read_safetensors(path, num_heads=4)
    assert "eval" not in weights.preprocess
    (note,) = [note for note in weights.notes if note.startswith("images: ")]
    assert words in note
    assert "no operation here does" in note


def test_other_programs_files_beside_the_weights_do_not_matter(tmp_path):
    path = copy_weights("timm_vit", tmp_path)
    alone = read_safetensors(path, num_heads=4)
    (tmp_path / "config.json").write_text('{"model": {"variant": "B/16"}, "model_args": 3}')
    assert read_safetensors(path, num_heads=4).model == alone.model


def write_grid(folder, *, slots, name="timm_vit", grid=(4, 6), config=None, extra=None):
    """Writes a case with another grid of position embeddings; returns the path and those."""
    tensors, _ = raw_tensors(GOLDEN / name / "model.safetensors")
    key = next(k for k in tensors if k.endswith(("pos_embed", "position_embeddings")))
    shape = (1, slots + grid[0] * grid[1], 32)
    posemb = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    write_tensors(folder / "x.safetensors", tensors | {key: posemb} | (extra or {}), metadata={})
    (folder / "config.json").unlink(missing_ok=True)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "x.safetensors", posemb


TIMM = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 32, 48]}}
DEIT3 = {"architecture": "deit3_small_patch16_224"}
REG = {"reg_token": np.zeros((1, 3, 32), np.float32)}


@pytest.mark.parametrize(
    ("case", "config"),
    [
        # 25 is also 5x5, 28 is 4x7, 12 + 4 is 4x4, and 36 is 4x9: only the description shows which.
        ({"slots": 1}, TIMM),
        ({"slots": 0}, TIMM),
        ({"slots": 4, "extra": REG}, TIMM),
        ({"slots": 4, "grid": (3, 4), "extra": REG}, TIMM | {"model_args": {"img_size": [24, 32]}}),
        ({"slots": 0, "extra": REG}, TIMM),
        ({"slots": 1, "grid": (4, 9)}, TIMM | {"model_args": {"img_size": [32, 72]}}),
        ({"slots": 0, "grid": (5, 5)}, DEIT3),
        ({"slots": 1, "grid": (5, 5)}, {"architecture": "x", "model_args": {"img_size": 40}}),
        ({"slots": 2, "name": "timm_deit_distilled"}, TIMM),
        ({"slots": 1, "name": "hf_vit"}, {"model_type": "vit", "image_size": [32, 48]}),
        ({"slots": 2, "name": "hf_deit"}, {"model_type": "deit", "image_size": [32, 48]}),
        ({"slots": 0, "name": "hf_ijepa"}, {"model_type": "ijepa", "image_size": [32, 48]}),
        ({"slots": 0, "name": "hf_ijepa", "grid": (5, 5)}, None),
    ],
)
def test_the_grid_of_positions_is_that_of_the_description(case, config, tmp_path):
    path, posemb = write_grid(tmp_path, config=config, **case)
    weights = read_safetensors(path, num_heads=4)
    assert weights.posemb_grid == case.get("grid", (4, 6))
    tokens = sum(name in weights.params for name in ("cls", "dist"))
    found = weights.params[POSEMB]
    np.testing.assert_array_equal(found[:, tokens:], posemb[:, case["slots"] :])
    slots = posemb[:, :tokens] if case["slots"] else np.zeros_like(found[:, :tokens])
    np.testing.assert_array_equal(found[:, :tokens], slots)
    # What is written says so too.
    write_safetensors(tmp_path / "again.safetensors", weights)
    again = read_safetensors(tmp_path / "again.safetensors")
    assert (again.posemb_grid, again.posemb_resize) == (weights.posemb_grid, weights.posemb_resize)


@pytest.mark.parametrize(
    ("case", "config", "key"),
    [
        ({"slots": 1}, None, "pretrained_cfg.input_size in a config.json beside"),
        ({"slots": 0, "grid": (5, 5)}, None, "pretrained_cfg.input_size in a config.json beside"),
        ({"slots": 0, "grid": (4, 4), "extra": REG}, None, "pretrained_cfg.input_size"),
        ({"slots": 1}, {"architecture": "x"}, "pretrained_cfg.input_size in config.json"),
        ({"slots": 3}, TIMM, "pretrained_cfg.input_size in config.json is 32x48, which makes 4x6"),
        ({"slots": 1}, DEIT3 | {"model_args": {"img_size": 48}}, "model_args.img_size"),
        ({"slots": 1}, DEIT3 | {"model_args": {"no_embed_class": False}}, "input_size"),
        ({"slots": 1, "grid": (6, 6)}, TIMM, "32x48, which makes 4x6 patches"),
        ({"slots": 1, "name": "hf_vit"}, None, "image_size in config.json"),
        ({"slots": 0, "name": "hf_ijepa"}, None, "image_size in config.json"),
        (
            {"slots": 1, "name": "hf_vit"},
            {"model_type": "vit", "image_size": 40},
            "image_size in config.json is 40x40, which makes 5x5 patches",
        ),
    ],
)
def test_a_grid_of_positions_that_nothing_shows_is_asked_for(case, config, key, tmp_path):
    path, posemb = write_grid(tmp_path, config=config, **case)
    message = refusal(read_safetensors, path, num_heads=4)
    assert f"{posemb.shape[1]} position embeddings" in message
    assert key in message


def test_a_square_of_positions_is_assumed_with_a_note(tmp_path):
    path, _ = write_grid(tmp_path, slots=1, grid=(5, 5))
    weights = read_safetensors(path, num_heads=4)
    assert weights.posemb_grid == (5, 5)
    assert any("5x5 patches; nothing states the size" in note for note in weights.notes)


def test_positions_are_resized_by_the_rule_of_their_project():
    def rule(name):
        return read_case(name).posemb_resize

    assert rule("timm_vit") == rule("hf_dinov2_registers") == "bicubic"
    assert {rule(f"hf_{name}") for name in ("vit", "deit", "dinov2", "ijepa")} == {
        "bicubic_no_antialias"
    }


def test_flexivit_is_resized_without_antialiasing(tmp_path):
    config = {"architecture": "flexivit_small.1200ep_in1k"}
    path, _ = write_grid(tmp_path, slots=0, grid=(4, 4), config=config)
    assert read_safetensors(path, num_heads=4).posemb_resize == "bilinear_half_pixel"


def test_a_reference_grid_of_rotary_embeddings_is_that_of_the_architecture(tmp_path):
    path = copy_weights("timm_eva_rope", tmp_path)
    config = {"architecture": "vit_medium_patch16_rope_reg1_gap_256"}
    for options, expected in [({}, (16, 16)), ({"ref_feat_shape": [24, 12]}, (24, 12))]:
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": options}))
        assert read_safetensors(path, num_heads=2).model["rope_reference_grid"] == expected
    assert read_case("timm_eva_rope_ape").model["rope_reference_grid"] is None


def test_layers_that_no_model_here_has_are_dropped_with_a_note():
    weights = read_case("hf_dinov2")
    # An objective that masks patches starts from it.
    assert weights.objective_params["mask_token"].shape == (1, 1, 32)
    assert "mask_token" not in weights.params
    assert any("cls" in note for note in read_case("timm_vit_average").notes)


def test_heads_that_read_other_features_are_dropped_with_a_note(tmp_path):
    tensors, _ = raw_tensors(GOLDEN / "hf_ijepa" / "model.safetensors")
    tensors |= {"classifier.weight": np.zeros((3, 64), np.float32)}
    write_tensors(tmp_path / "x", tensors, metadata={})
    weights = read_safetensors(tmp_path / "x", num_heads=4)
    assert "head/kernel" not in weights.params
    assert any("head" in note and "dropped" in note for note in weights.notes)

    tensors, _ = raw_tensors(GOLDEN / "hf_dinov2" / "model.safetensors")
    tensors |= {"classifier.weight": np.zeros((3, 32), np.float32)}
    tensors |= {"classifier.bias": np.zeros(3, np.float32)}
    tensors |= {"pooler.dense.weight": np.zeros((32, 32), np.float32)}
    write_tensors(tmp_path / "x", tensors, metadata={})
    weights = read_safetensors(tmp_path / "x", num_heads=4)
    assert "head/kernel" in weights.params
    assert "pre_logits/kernel" not in weights.params
    assert any("pre_logits" in note and "dropped" in note for note in weights.notes)


def test_unknown_tensors_keep_their_names(tmp_path):
    for name, odd in [("timm_vit", "blocks.0.mlp.odd.weight"), ("hf_vit", "neck.norm.weight")]:
        tensors, _ = raw_tensors(GOLDEN / name / "model.safetensors")
        tensors[odd] = np.arange(3, dtype=np.float32)
        write_tensors(tmp_path / "x", tensors, metadata={})
        weights = read_safetensors(tmp_path / "x", num_heads=4)
        np.testing.assert_array_equal(weights.params[odd], tensors[odd])


def test_pixels_that_make_no_patch_are_left_out_with_a_note(tmp_path):
    images = {"input_size": [3, 35, 38]}
    weights = read_safetensors(describe("timm_vit", tmp_path, pretrained_cfg=images))
    assert any("the last 3 rows and 6 columns" in note for note in weights.notes)
    assert weights.preprocess["image_size"] == (35, 38)
    whole = read_case("timm_vit")
    image = np.random.default_rng(0).normal(size=(1, 35, 38, 3)).astype(np.float32)
    got = run(weights.model, weights.params, image, 5)["logits"]
    want = run(whole.model, whole.params, image[:, :32, :32], 5)["logits"]
    np.testing.assert_array_equal(got, want)


def test_names_of_the_original_dinov2_are_those_of_timm(tmp_path):
    tensors, _ = raw_tensors(GOLDEN / "timm_vit_swiglu" / "model.safetensors")
    renamed = {
        name.replace("reg_token", "register_tokens").replace("fc1", "w12").replace("fc2", "w3"): x
        for name, x in tensors.items()
    }
    # Of the tokens, only the class token has a position there; its is zero in this layout.
    renamed["pos_embed"] = np.pad(renamed["pos_embed"], ((0, 0), (1, 0), (0, 0)))
    write_tensors(tmp_path / "x", renamed, metadata={})
    assert_same(
        read_safetensors(tmp_path / "x", num_heads=4).params, read_case("timm_vit_swiglu").params
    )


@pytest.mark.parametrize(
    ("name", "changes", "config", "words"),
    [
        ("timm_vit", {"norm_pre.weight": (32,)}, {}, "norm_pre"),
        ("timm_eva_rope", {"rope.freqs": (2, 2)}, {}, "rope.freqs"),
        ("timm_beit", {"pos_embed": (1, 13, 32)}, {}, "both position embeddings"),
        (
            "timm_beit",
            {"rel_pos_bias.relative_position_bias_table": (1, 4)},
            {},
            "one bias",
        ),
        ("timm_pe", {}, {"architecture": "vit_pe_lang_large_patch14_448"}, "no norm behind"),
        ("timm_vit", {"patch_embed.norm.weight": (32,)}, {}, "a norm of the patches"),
        ("timm_vit", {"blocks.0.attn.lambda_q1": (32,)}, {}, "differential attention"),
        ("timm_eva_rope", {"cls_token": (1, 1, 32)}, {}, "config.json"),
        ("timm_eva_rope", {"pos_embed": (1, 24, 32)}, {}, "config.json"),
        ("timm_eva_rope", {}, {"architecture": "vit_base_patch16_sapiens2"}, "share keys"),
        ("timm_eva_rope", {}, {"architecture": "eva02_enormous_patch14_clip_224"}, "norms behind"),
        (
            "timm_vit_map",
            {"reg_token": (1, 2, 32)},
            {"architecture": "x", "model_args": {"no_embed_class": True}},
            "registers",
        ),
        ("timm_vit", {}, {"architecture": "vit_base_patch16_rpn_224"}, "rpn"),
        ("timm_vit", {}, {"architecture": "x", "global_pool": "max"}, "global_pool='max'"),
        (
            "timm_vit",
            {},
            {"architecture": "x", "model_args": {"act_layer": "relu"}},
            "act_layer='relu'",
        ),
        ("hf_vit", {}, {"model_type": "vit", "hidden_act": "relu"}, "hidden_act='relu'"),
        ("hf_vit", {}, {"model_type": "vit", "pooler_act": "gelu"}, "pooler_act='gelu'"),
    ],
)
def test_models_that_are_not_here_are_refused(name, changes, config, words, tmp_path):
    tensors, _ = raw_tensors(GOLDEN / name / "model.safetensors")
    tensors |= {k: np.zeros(shape, np.float32) for k, shape in changes.items()}
    write_tensors(tmp_path / "x.safetensors", tensors, metadata={})
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(read_safetensors, tmp_path / "x.safetensors", num_heads=4)
    assert words in message
    assert str(tmp_path) in message


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "words"),
    [
        ("timm_vit", "blocks.0.attn.qkv.weight", (95, 32), "expected [96, 32]"),
        ("timm_vit", "blocks.1.attn.qkv.weight", (96,), "expected 2 axes"),
        ("timm_vit", "blocks.1.attn.qkv.bias", (95,), "expected [96]"),
        ("timm_vit", "blocks.1.attn.proj.weight", (31, 32), "expected [32, 32]"),
        ("timm_vit", "cls_token", (32,), "expected [1, length, width]"),
        ("timm_vit", "pos_embed", (1, 17, 31), "expected [1, length, 32]"),
        ("timm_vit_swiglu", "blocks.0.mlp.fc1.weight", (64,), "expected 2 axes"),
        ("timm_vit_map", "attn_pool.kv.weight", (63, 32), "expected [64, 32]"),
        ("timm_eva02", "blocks.0.attn.k_proj.weight", (31, 32), "expected [32, 32]"),
        ("timm_eva02", "blocks.0.mlp.fc1_x.bias", (1,), "expected [64]"),
        (
            "hf_vit",
            "vit.encoder.layer.1.attention.attention.key.weight",
            (33, 32),
            "expected [32, 32]",
        ),
        ("hf_vit", "vit.embeddings.patch_embeddings.projection.weight", (32,), "expected 4 axes"),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named(name, tensor, shape, words, tmp_path):
    tensors, _ = raw_tensors(GOLDEN / name / "model.safetensors")
    assert tensor in tensors
    path = describe(name, tmp_path)
    write_tensors(Path(path), tensors | {tensor: np.zeros(shape, np.float32)}, metadata={})
    message = refusal(read_safetensors, path)
    assert f"{tensor} is {list(shape)}: {words}" in message


# Layers and tokens that zeros, or a model without them, could take the place of.
DEMANDED = re.compile(
    r"query|key|value|[qkv]_(proj|bias)|qkv|(attn\.proj|o_proj|dense|fc\d|weights_\w+|down_proj|patch_\w+"
    r"|projection)\.bias|fc1_[gx]|(gate|up)_proj|head(_dist)?\.bias|classifier\.bias|attn_pool\.(q|kv)\.bias"
    r"|pos_embed|position_embeddings|cls_token|reg_token"
)
# Those that are refused in other words than that they are missing.
IN_OTHER_WORDS = re.compile(r"cls_token|pos_embed|blocks\.0\.attn\.(qkv|q_proj)\.weight")


@pytest.mark.parametrize("name", sorted(set(CASES) - MIXERS))
def test_no_zeros_take_the_place_of_a_missing_tensor(name, tmp_path):
    tensors, _ = raw_tensors(GOLDEN / name / "model.safetensors")
    path = describe(name, tmp_path)
    # Of the only block, no biases of queries, keys and values are those of a model without.
    alone = "blocks.0.attn.qkv.bias" if "hybrid" in name else ""
    for missing in (x for x in tensors if DEMANDED.search(x) and x != alone):
        kept = {key: x for key, x in tensors.items() if key != missing}
        write_tensors(Path(path), kept, metadata={})
        message = refusal(read_safetensors, path)
        assert f"{missing} is missing;" in message or IN_OTHER_WORDS.search(missing), message


@pytest.mark.parametrize(
    ("name", "absent", "refused"),
    [
        ("timm_vit", r"attn\.qkv\.bias", False),
        ("timm_vit", r"(proj|fc1|fc2)\.bias", True),  # Those of the patches are in front.
        ("timm_vit", r"blocks\.\d\.(attn\.proj|mlp\.fc\d)\.bias", False),
        ("timm_vit", r"attn\.proj\.bias", True),
        ("timm_eva", r"attn\.[qv]_bias", False),
        ("timm_eva", r"attn\.q_bias", True),
        ("hf_vit", r"attention\.(query|key|value)\.bias", True),
        ("hf_vit", r"attention\.key\.bias", True),
        ("hf_dinov3", r"attention\.[qv]_proj\.bias", True),
    ],
)
def test_biases_are_absent_in_all_blocks_where_such_models_exist(name, absent, refused, tmp_path):
    tensors, _ = raw_tensors(GOLDEN / name / "model.safetensors")
    path = describe(name, tmp_path)
    kept = {key: x for key, x in tensors.items() if not re.search(absent, key)}
    write_tensors(Path(path), kept, metadata={})
    if refused:
        assert re.search(r"(is|and \d more tensors are) missing;", refusal(read_safetensors, path))
    else:
        assert read_safetensors(path).params.keys() <= read_case(name).params.keys()


def test_the_description_states_which_biases_of_huggingface_are_absent(tmp_path):
    for name, absent, changes in [
        ("hf_vit", "query|key|value", {"qkv_bias": False}),
        ("hf_dinov3", "o_proj", {"proj_bias": False}),
    ]:
        tensors, _ = raw_tensors(GOLDEN / name / "model.safetensors")
        path = describe(name, tmp_path, **changes)
        kept = {k: x for k, x in tensors.items() if not re.search(rf"({absent})\.bias", k)}
        write_tensors(Path(path), kept, metadata={})
        assert read_safetensors(path).params.keys() == read_case(name).params.keys()


def test_models_without_a_last_norm_are_refused_by_what_they_lack(tmp_path):
    tensors, _ = raw_tensors(GOLDEN / "timm_vit_registers" / "model.safetensors")
    tensors = {name: x for name, x in tensors.items() if not name.startswith(("norm.", "fc_norm."))}
    write_tensors(tmp_path / "model.safetensors", tensors, metadata={})
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_radio_v3"}')
    message = refusal(read_safetensors, tmp_path / "model.safetensors")
    assert "'vit_base_patch16_radio_v3': it has no norm behind the blocks" in message


def describe(name, folder, **changes):
    """Copies the weights with a changed config.json; `model_args` are added to those there."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    if "model_args" in changes:
        changes["model_args"] = config.get("model_args", {}) | changes["model_args"]
    (folder / "config.json").write_text(json.dumps(config | changes))
    return copy_weights(name, folder)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm_vit_registers", {"pool_include_prefix": True}, "pool_include_prefix=True"),
        ("timm_vit_average", {"pool_include_prefix": True}, "pool_include_prefix=True"),
        ("timm_vit", {"global_pool": "avgmax"}, "global_pool='avgmax'"),
        ("timm_vit", {"norm_layer": "rmsnorm"}, "norm_layer='rmsnorm'"),
        ("timm_vit", {"act_layer": "silu"}, "act_layer='silu'"),
        ("timm_vit_swiglu", {"act_layer": "gelu"}, "act_layer='gelu'"),
        ("timm_vit", {"attn_layer": "diff"}, "attn_layer='diff'"),
        ("timm_vit", {"num_heads": 5}, "5 attention heads do not divide the width of 32"),
        ("timm_vit", {"num_heads": "4"}, "'4' attention heads"),
        ("timm_vit", {"embed_dim": 64}, "embed_dim=64 in config.json, but the tensors have 32"),
        ("timm_vit", {"depth": 3}, "depth=3 in config.json, but the tensors have 2"),
        ("timm_vit_map", {"attn_pool_num_heads": 5}, "5 heads of attention pooling"),
        ("timm_eva_rope", {"rope_rotate_half": "no"}, "rope_rotate_half='no'"),
        ("timm_eva_rope", {"rope_grid_offset": "far"}, "rope_grid_offset='far'"),
        ("timm_eva_rope", {"rope_type": "mrope"}, "rope_type='mrope'"),
        ("timm_eva_rope", {"use_post_norm": True}, "use_post_norm=True"),
        ("timm_vit", {"window_size": 7}, "model_args.window_size=7 in config.json is unknown here"),
        ("timm_vit", {"new\nline": ["long"] * 99}, "is unknown here"),
        ("hf_vit", {"rope_theta": 100.0}, "rope_theta=100.0 in config.json is unknown here"),
        ("hf_vit", {"use_mean_pooling": True}, "use_mean_pooling=True"),
        ("hf_vit", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("hf_vit", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("hf_vit", {"is_decoder": True}, "is_decoder=True"),
        ("hf_vit", {"problem_type": "ranking"}, "problem_type='ranking'"),
        ("hf_vit", {"hidden_size": 48}, "hidden_size=48 in config.json, but the tensors have 32"),
        ("hf_vit", {"num_hidden_layers": 12}, "num_hidden_layers=12"),
        ("hf_vit", {"patch_size": 16}, "patch_size=16"),
        ("hf_vit", {"num_attention_heads": 5}, "5 attention heads"),
        ("hf_vit", {"model_type": "beit"}, "model_type='beit' in config.json: expected one of vit"),
        ("hf_vit", {"model_type": "dpt"}, "model_type='dpt'"),
        ("hf_vit", {"id2label": {"a": "b"}}, "id2label"),
    ],
)
def test_each_argument_that_changes_the_function_is_used_or_refused(name, options, words, tmp_path):
    changes = {"model_args": options} if name.startswith("timm") else options
    message = refusal(read_safetensors, describe(name, tmp_path, **changes))
    assert words in message
    assert "config.json" in message or "attention heads" in message


TIMM_CONTRADICTIONS = {
    "timm_vit": [
        ({"class_token": False}, "the tensors show class_token=True"),
        ({"reg_tokens": 4}, "the tensors have 0"),
        ({"num_reg_tokens": 1}, "the tensors have 0"),
        ({"distilled": True}, "the tensors show distilled=False"),
        ({"init_values": 1e-5}, "the tensors have no layer scale"),
        ({"qk_norm": True}, "the tensors show qk_norm=False"),
        ({"qkv_bias": False}, "the tensors show qkv_bias=True"),
        ({"proj_bias": False}, "the tensors show proj_bias=True"),
        ({"scale_attn_norm": True}, "the tensors show scale_attn_norm=False"),
        ({"scale_mlp_norm": True}, "the tensors show scale_mlp_norm=False"),
        ({"swiglu_mlp": True}, "the tensors show swiglu_mlp=False"),
        ({"pre_norm": True}, "the tensors show pre_norm=False"),
        ({"final_norm": False}, "the tensors show final_norm=True"),
        ({"fc_norm": True}, "the tensors show fc_norm=False"),
        ({"embed_norm_layer": "layernorm"}, "the tensors have no norm in patch_embed"),
        ({"pos_embed": "none"}, "the tensors have position embeddings"),
        ({"pos_embed": ""}, "the tensors have position embeddings"),
        ({"pos_embed": "sincos"}, "expected none or learn"),
        ({"use_abs_pos_emb": False}, "the tensors show use_abs_pos_emb=True"),
        ({"no_embed_class": True}, "the tensors have 1 position embeddings in front"),
        ({"in_chans": 1}, "the tensors have 3"),
        ({"patch_size": 16}, "the tensors have 8x8"),
        ({"patch_size": [8, 4]}, "the tensors have 8x8"),
        ({"mlp_ratio": 4}, "the tensors have 2.0"),
        ({"mlp_ratio": "2"}, "the tensors have 2.0"),
        ({"mlp_ratio": 1e308}, "the tensors have 2.0"),
        ({"num_classes": 7}, "the tensors have 5"),
        ({"num_heads": 0}, "correct num_heads"),
        ({"global_pool": "map"}, "the tensors have no attention pooling"),
        ({"img_size": "32"}, "expected an integer above 0, or two"),
    ],
    "timm_vit_swiglu": [
        ({"init_values": 0.0, "reg_tokens": 3, "mlp_ratio": 4.0}, "the tensors have 1.0"),
        ({"swiglu_mlp": False}, "the tensors show swiglu_mlp=True"),
        ({"reg_tokens": 4}, "the tensors have 3"),
    ],
    "timm_vit_map": [
        ({"global_pool": "avg"}, "the tensors have attention pooling"),
        ({"global_pool": "token"}, "the tensors have no class token"),
        ({"class_token": True}, "the tensors show class_token=False"),
        ({"attn_pool_mlp_ratio": 4}, "the tensors have 2.0"),
    ],
    "timm_vit_average": [({"fc_norm": False}, "the tensors show fc_norm=True")],
    "timm_vit_no_embed_class": [({"qkv_bias": True}, "the tensors show qkv_bias=False")],
    "timm_eva_rope": [
        ({"pos_embed": "learn"}, "the tensors have no position embeddings"),
        ({"num_reg_tokens": 4}, "the tensors have 1"),
        ({"rope_temperature": "hot"}, "expected a number above 0"),
        ({"ref_feat_shape": [16]}, "expected an integer above 0, or two"),
    ],
    "timm_beit": [
        ({"num_heads": 8}, "the tensors have 4"),
        ({"use_rel_pos_bias": False}, "use_rel_pos_bias=True"),
    ],
    "timm_rope_mixed": [({"rope_type": "cat"}, "but the tensors have mixed")],
    "timm_hybrid": [({"in_chans": 256}, "the tensors have 3")],
}


@pytest.mark.parametrize("name", TIMM_CONTRADICTIONS)
def test_arguments_of_timm_that_contradict_the_tensors_are_refused(name, tmp_path):
    for options, words in TIMM_CONTRADICTIONS[name]:
        message = refusal(read_safetensors, describe(name, tmp_path, model_args=options))
        assert words in message
        assert any(key in message for key in options)
        assert "config.json" in message


def test_heads_that_norms_of_queries_contradict_are_refused(tmp_path):
    tensors, _ = raw_tensors(GOLDEN / "timm_vit" / "model.safetensors")
    norms = {f"blocks.{i}.attn.{x}_norm.weight": np.ones(8, "f") for i in range(2) for x in "qk"}
    path = describe("timm_vit", tmp_path, model_args={"num_heads": 2, "qk_norm": True})
    write_tensors(Path(path), tensors | norms, metadata={})
    message = refusal(read_safetensors, path)
    assert "model_args.num_heads=2 in config.json, but the tensors have 4" in message


HF_CONTRADICTIONS = {
    "hf_vit": [
        ({"num_labels": 7}, "the tensors have 5"),
        ({"num_register_tokens": 4}, "the tensors have 0"),
        ({"intermediate_size": 128}, "the tensors have 64"),
        ({"mlp_ratio": 4}, "the tensors have layers of 64 units"),
        ({"use_swiglu_ffn": True}, "the tensors show use_swiglu_ffn=False"),
        ({"qkv_bias": False}, "the tensors show qkv_bias=True"),
        ({"layerscale_value": 1.0}, "the tensors have no layer scale"),
        ({"num_channels": 1}, "the tensors have 3"),
        ({"patch_size": [8, 4]}, "the tensors have 8x8"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"model_type": "dinov2"}, "the tensors have those of a ViT"),
        ({"model_type": "deit"}, "the tensors have those of a ViT"),
        ({"id2label": {str(i): ["a"] for i in range(5)}}, "expected class names"),
        ({"id2label": "abcde"}, "expected class names"),
        ({"layer_norm_eps": "small"}, "expected a number of 0 or more"),
        ({"image_size": "32"}, "expected an integer above 0, or two"),
    ],
    "hf_vit_pooler": [({"pooler_output_size": 32}, "the tensors have 24")],
    "hf_deit": [({"model_type": "vit"}, "the tensors have those of a DeiT")],
    "hf_dinov2": [({"mlp_ratio": 4}, "the tensors have layers of 64 units")],
    "hf_dinov2_registers": [
        ({"num_register_tokens": 4}, "the tensors have 3"),
        ({"use_swiglu_ffn": False}, "the tensors show use_swiglu_ffn=True"),
        ({"mlp_ratio": 4}, "the tensors have layers of 48 units"),
    ],
}


@pytest.mark.parametrize("name", HF_CONTRADICTIONS)
def test_keys_of_huggingface_that_contradict_the_tensors_are_refused(name, tmp_path):
    for changes, words in HF_CONTRADICTIONS[name]:
        message = refusal(read_safetensors, describe(name, tmp_path, **changes))
        assert words in message
        assert any(key in message for key in changes)
        assert "config.json" in message


def test_what_agrees_with_the_tensors_is_read(tmp_path):
    common = {"class_token": True, "in_chans": 3, "mlp_ratio": 2.0, "patch_size": [8, 8]}
    common |= {"qkv_bias": True, "num_classes": 5, "embed_dim": 32}
    for name, options in [
        ("timm_vit", common | {"pos_embed": "learn", "init_values": None, "qk_norm": False}),
        ("timm_vit", common | {"reg_tokens": 0, "pre_norm": False, "no_embed_class": False}),
        ("timm_vit_swiglu", {"mlp_ratio": 2.0, "reg_tokens": 3, "init_values": 1e-5}),
        ("timm_vit_map", {"class_token": False, "global_pool": "map", "attn_pool_mlp_ratio": 2}),
        ("timm_hybrid", common | {"patch_size": 1}),
        ("timm_eva_rope", {"use_abs_pos_emb": False, "num_reg_tokens": 1, "init_values": 0.1}),
    ]:
        weights = read_safetensors(describe(name, tmp_path, model_args=options))
        assert weights.model == read_case(name).model
    for name, changes in [
        ("hf_vit", {"patch_size": [8, 8], "num_labels": 5, "qkv_bias": True}),
        ("hf_dinov2_registers", {"num_register_tokens": 3, "mlp_ratio": 2.0}),
    ]:
        assert_same(
            read_safetensors(describe(name, tmp_path, **changes)).params, read_case(name).params
        )
    params, model = random_params(patch_size=(4, 8))
    tensors, _ = raw_tensors(write(tmp_path / "own", params, model))
    path = describe("timm_vit", tmp_path, num_classes=3, pretrained_cfg=None)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] = {"patch_size": [4, 8], "num_heads": 2, "img_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(Path(path), tensors, metadata={})
    assert read_safetensors(path).model["patch_size"] == (4, 8)


def test_sizes_beside_the_arguments_of_timm_are_compared(tmp_path):
    for changes in ({"num_classes": 7}, {"num_features": 768}, {"pretrained_cfg": 5}):
        message = refusal(read_safetensors, describe("timm_vit", tmp_path, **changes))
        assert f"{next(iter(changes))}=" in message


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("timm_vit", "blocks."),
        ("timm_mixer", "blocks."),
        ("hf_vit", "vit.encoder.layer."),
        ("hf_dinov2_registers", "encoder.layer."),
        ("timm_hybrid", "patch_embed.backbone.stages."),
    ],
)
def test_an_absent_block_is_named(name, stem, tmp_path):
    tensors, _ = raw_tensors(GOLDEN / name / "model.safetensors")
    for numbers, absent in [((0, 2), 1), ((1, 2), 0), ((0, 10**9), 1)]:
        renamed = {
            re.sub(
                rf"^{re.escape(stem)}(\d)\.", lambda m, n=numbers: f"{stem}{n[int(m[1])]}.", key
            ): x
            for key, x in tensors.items()
        }
        write_tensors(tmp_path / "x", renamed, metadata={})
        message = refusal(read_safetensors, tmp_path / "x", num_heads=4)
        assert f"it has {stem}{numbers[1]}, but nothing of {stem}{absent}:" in message


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({"crop_pct": "0.9"}, "crop_pct='0.9' in config.json: expected a number such as 0.875"),
        ({"crop_pct": -1}, "crop_pct=-1"),
        ({"crop_pct": 0}, "crop_pct=0"),
        ({"crop_pct": 1e-300}, "crop_pct=1e-300"),
        ({"crop_pct": True}, "crop_pct=True"),
        ({"input_size": 32}, "input_size=32"),
        ({"input_size": [32, 32]}, "expected channels, height and width"),
        ({"input_size": [3, 32, 0]}, "expected an integer above 0"),
        ({"mean": "half"}, "mean is 'half'"),
        ({"std": 0}, "std is 0; expected a number above 0"),
        ({"mean": [0.5, 0.5]}, "mean is (0.5, 0.5); expected one number, or one for each of the 3"),
    ],
)
def test_images_of_timm_that_make_no_sense_are_refused(images, words, tmp_path):
    config = json.loads((GOLDEN / "timm_vit" / "config.json").read_text())
    path = describe("timm_vit", tmp_path, pretrained_cfg=config["pretrained_cfg"] | images)
    assert words in refusal(read_safetensors, path)


def test_one_number_is_the_mean_of_all_channels(tmp_path):
    config = json.loads((GOLDEN / "timm_vit" / "config.json").read_text())
    images = config["pretrained_cfg"] | {"mean": 0.5, "std": 0.25}
    preprocess = read_safetensors(describe("timm_vit", tmp_path, pretrained_cfg=images)).preprocess
    assert (preprocess["mean"], preprocess["std"]) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": {"shortest_edge": "256"}}, "size.shortest_edge in preprocessor_config.json"),
        ({"size": "large"}, "size in preprocessor_config.json is 'large'"),
        ({"size": 32, "do_center_crop": True, "crop_size": [1, 2, 3]}, "crop_size in preproc"),
        ({"rescale_factor": "1/255"}, "rescale_factor='1/255' in preprocessor_config.json"),
        ({"image_mean": ["a"] * 3, "image_std": [1] * 3}, "image_mean=('a', 'a', 'a')"),
    ],
)
def test_images_of_huggingface_that_make_no_sense_are_refused(settings, words, tmp_path):
    path = copy_weights("hf_vit", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert words in refusal(read_safetensors, path, num_heads=4)


def test_arguments_that_models_here_have_are_used(tmp_path):
    def read(name, **options):
        return read_safetensors(describe(name, tmp_path, model_args=options))

    assert read("timm_eva_rope_ape", rope_temperature=50).model["rope_theta"] == 50.0
    query = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    swapped = read("timm_eva_rope", rope_grid_indexing="xy").params[query]
    np.testing.assert_array_equal(
        np.roll(swapped, 8, axis=-1), read_case("timm_eva_rope").params[query]
    )
    assert read("timm_eva_rope", use_rot_pos_emb=False).model["rope_theta"] is None
    assert read("timm_vit", global_pool="").model["classifier"] == "token_unpooled"
    assert read("timm_vit", act_layer="gelu_tanh").model["activation"] == "gelu_tanh"
    assert read("timm_vit", num_heads=2, drop_path_rate=0.1, act_layer=None).model["num_heads"] == 2
    tensors, _ = raw_tensors(GOLDEN / "timm_vit_map" / "model.safetensors")
    path = describe("timm_vit_map", tmp_path, model_args={"pool_include_prefix": True})
    write_tensors(Path(path), tensors | {"reg_token": np.ones((1, 2, 32), "f")}, metadata={})
    assert read_safetensors(path).model["num_registers"] == 2


@pytest.mark.parametrize(
    ("architecture", "num_heads"),
    [
        ("vit_base_patch16_gap_224", 16),
        ("vit_base_patch16_gap_224.tag", 16),
        ("vit_giantopt_patch16_siglip_gap_256", 16),
        ("deit3_huge_patch14_224", 16),
        ("flexivit_large", 16),
        ("test_vit", 2),
        ("vit_medium_patch16_gap_256", 8),
    ],
)
def test_a_name_implies_the_heads_at_any_width(architecture, num_heads, tmp_path):
    path = describe("timm_vit", tmp_path, architecture=architecture)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = read_safetensors(path)
    assert weights.model["num_heads"] == num_heads
    assert not [note for note in weights.notes if "num_heads" in note]


def test_what_an_unknown_name_leaves_open_is_noted(tmp_path):
    path = describe("timm_vit", tmp_path, architecture="vit_new_patch8_32")
    (note,) = [note for note in read_safetensors(path).notes if "unknown here" in note]
    assert note == (
        "architecture 'vit_new_patch8_32' is unknown here: assuming activation='gelu_erf', "
        "norm_epsilon=1e-06, the defaults of timm"
    )


def test_class_names_come_from_the_description(tmp_path):
    def read(name, **changes):
        weights = read_safetensors(describe(name, tmp_path, **changes))
        return weights.class_names, [note for note in weights.notes if "class names" in note]

    names = ("tench", "hammer\u0065\u0301", "crane", "crane", "x,\ny")
    expected = ("tench", "hammer\u00e9", "crane", "crane", r"x,\ny"), []
    by_label = {str(i): name for i, name in reversed(list(enumerate(names)))}
    assert read("hf_vit", id2label=by_label) == expected
    assert read("hf_deit", id2label=by_label) == expected
    assert read("timm_vit", label_names=names) == expected
    assert read("timm_vit", label_names=by_label) == expected
    assert read("timm_vit", pretrained_cfg={"label_names": names}) == expected
    assert read("timm_vit", labels=names) == expected
    assert read("hf_vit", id2label={str(i): f"LABEL_{i}" for i in range(5)}) == (None, [])
    assert read("hf_vit", id2label=None) == (None, [])
    assert read("hf_dinov2", id2label={"0": "a"}) == (None, [])  # It has no head.
    note = "class names: id2label in config.json has 2 names, and the head 5 classes: not used"
    assert read("hf_vit", id2label={"0": "a", "1": "b"}) == (None, [note])


def test_the_kind_of_problem_decides_what_the_head_means(tmp_path):
    def read(kind):
        return read_safetensors(describe("hf_vit", tmp_path, problem_type=kind))

    assert read("multi_label_classification").loss == "sigmoid"
    assert read("single_label_classification").loss == "softmax"
    assert read(None).loss is None
    regression = read("regression")
    assert "head/kernel" not in regression.params
    assert regression.class_names is None
    assert any("regression" in note and "dropped" in note for note in regression.notes)


def test_decoders_of_pre_training_are_dropped_with_a_note(tmp_path):
    for name, odd in (("timm_vit", "decoder_blocks.0.norm1.bias"), ("hf_vit", "decoder.0.weight")):
        tensors, _ = raw_tensors(GOLDEN / name / "model.safetensors")
        write_tensors(tmp_path / "x", tensors | {odd: np.ones(3, np.float32)}, metadata={})
        weights = read_safetensors(tmp_path / "x", num_heads=4)
        assert_same(weights.params, read_case(name).params)
        assert "decoder: only for pre-training: dropped" in weights.notes


@pytest.mark.parametrize(
    "name", ["timm_vit", "timm_hybrid", "timm_mixer", "hf_vit", "hf_deit", "hf_dinov2"]
)
def test_wrapped_weights_are_read(name, tmp_path):
    tensors, _ = raw_tensors(GOLDEN / name / "model.safetensors")
    wrapped = {f"module._orig_mod.{n}": x for n, x in tensors.items()}
    path = describe(name, tmp_path)
    write_tensors(Path(path), wrapped, metadata={})
    weights = read_safetensors(path)
    assert_same(weights.params, read_case(name).params)
    assert any("wrappers removed" in note for note in weights.notes)


def test_rotary_embeddings_without_config_are_timms_with_a_note(tmp_path):
    weights = read_safetensors(copy_weights("timm_eva_rope", tmp_path), num_heads=2)
    assert weights.model == read_case("timm_eva_rope").model
    assert any("rope_theta" in note for note in weights.notes)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def header(text):
    return struct.pack("<Q", len(text)) + text


ENTRY = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a whole safetensors file"),
        (b"<!DOCTYPE html><html>...</html>", "<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\n", "version https"),
        (b"PK\x03\x04" + bytes(60), "not a whole safetensors file"),
        (header(b"{not json}"), "not a whole safetensors file"),
        (header(b"[1, 2]  "), "not a whole safetensors file"),
        (header(ENTRY) + bytes(7), "not fully covered"),
        (header(ENTRY) + bytes(9), "not fully covered"),
        (header(ENTRY.replace(b"[2]", b"[3]")) + bytes(8), "not a whole safetensors file"),
        (header(ENTRY.replace(b"0,8", b"8,16")) + bytes(16), "invalid offset for tensor `x`"),
        (header(ENTRY.replace(b"F32", b"F8_E4M3").replace(b",8", b",2")) + bytes(2), "F8_E4M3"),
        (header(b'{"__metadata__":{"vit_jax":"{"}}'), "Expecting"),
        (header(ENTRY) + bytes(8), "1 tensors such as x"),
    ],
)
def test_bad_files_are_refused(content, words, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    message = refusal(read_safetensors, path)
    assert words in message
    assert str(path) in message
    assert "expected the whole .safetensors file" in message


def test_a_pickle_is_refused_and_not_run(tmp_path):
    path, trap = tmp_path / "x.safetensors", tmp_path / "trap"
    path.write_bytes(pickle.dumps(Trap(trap)))
    refusal(read_safetensors, path)
    assert not trap.exists()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(kept, tmp_path):
    content = (GOLDEN / "timm_vit" / "model.safetensors").read_bytes()
    (tmp_path / "x").write_bytes(content[: int(kept * len(content))])
    refusal(read_safetensors, tmp_path / "x")


def test_a_missing_file_is_named(tmp_path):
    assert "no such file" in refusal(read_safetensors, tmp_path / "x.safetensors")
