# SPDX-License-Identifier: Apache-2.0
"""CLIP and SigLIP in every layout, against the values of the programs that wrote them."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import traverse_util

from tests.models.compiled import compiled
from tests.models.random_params import random_params
from vit_jax.checkpoint.pretrained.adapt import adapt_params, check_arguments
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.rebuild import check_complete, rebuild_model
from vit_jax.checkpoint.pretrained.safetensors import read_tensors, write_tensors
from vit_jax.checkpoint.pretrained.timm_tensors import to_timm
from vit_jax.models.variants import make_two_towers, make_vit
from vit_jax.utils.errors import UserError

CASES = Path(__file__).parents[2] / "testdata" / "image_text"
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 20,
        "quick_gelu": True,
        "vision_cfg": {
            **{"image_size": 24, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
            "mlp_ratio": 2.0,
        },
        "text_cfg": {
            **{"context_length": 10, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2},
            "mlp_ratio": 2.0,
        },
    },
    "preprocess_cfg": {"size": 24, "mean": [0.5] * 3, "std": [0.2] * 3, "resize_mode": "squash"},
}


def read_io(case):
    with np.load(CASES / f"{case}_io.npz") as file:
        return dict(file)


def nested(params):
    return traverse_util.unflatten_dict(dict(params), sep="/")


def put(folder, case, *, config=None, change=None):
    """Writes a case as its program publishes it."""
    folder.mkdir(exist_ok=True)
    if case.endswith("_bv"):
        shutil.copy(CASES / f"{case}.npz", folder / f"{case}.npz")
        return folder / f"{case}.npz"
    tensors, _ = read_tensors(epath.Path(CASES / f"{case}.safetensors"))
    write_tensors(folder / "model.safetensors", (change or dict)(tensors), metadata={})
    if case.startswith("open_clip"):
        stated = OPEN_CLIP if config is None else config
        (folder / "open_clip_config.json").write_text(json.dumps(stated))
    else:
        stated = json.loads((CASES / f"{case}.json").read_text()) if config is None else config
        (folder / "config.json").write_text(json.dumps(stated))
    return folder / "model.safetensors"


def images_and_tokens(io):
    images = io["pixel_values"] if "pixel_values" in io else io["image"]
    tokens = io["input_ids"] if "input_ids" in io else io["text"]
    return images if images.shape[-1] == 3 else images.transpose(0, 2, 3, 1), tokens


def embed(weights, io):
    model = rebuild_model(weights)
    return compiled(model)({"params": nested(weights.params)}, *images_and_tokens(io), train=False)


EMBEDDINGS = {
    "siglip_bv": ("zimg", "ztxt"),
    "siglip2_bv": ("zimg", "ztxt"),
    "lit_bv": ("zimg", "ztxt"),
    "hf_clip": ("image_embeds", "text_embeds"),
    "hf_clip_gelu": ("image_embeds", "text_embeds"),
    "hf_siglip": ("image_embeds", "text_embeds"),
    "open_clip": ("image_features", "text_features"),
}
LAYOUTS = {
    "hf_clip": "Hugging Face CLIP safetensors",
    "hf_siglip": "Hugging Face SigLIP safetensors",
    "open_clip": "open_clip CLIP safetensors",
    "siglip2_bv": "big_vision npz",
}


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_embeddings_are_those_of_the_program(case, tmp_path):
    weights, io = load_pretrained(str(put(tmp_path, case))), read_io(case)
    assert weights.layout == LAYOUTS.get(case, weights.layout)
    check_complete(weights)
    zimg, ztxt, out = embed(weights, io)
    image, text = EMBEDDINGS[case]
    np.testing.assert_allclose(zimg, io[image], atol=1e-5)
    np.testing.assert_allclose(ztxt, io[text], atol=1e-5)
    logits = out["scale"] * zimg @ ztxt.T + out["bias"]
    if "logits_per_image" in io:
        np.testing.assert_allclose(logits, io["logits_per_image"], atol=1e-4)


@pytest.mark.parametrize("case", ["hf_clip", "hf_clip_gelu"])
def test_gradients_of_the_loss_are_those_of_the_program(case, tmp_path):
    weights, io = load_pretrained(str(put(tmp_path, case))), read_io(case)
    model, inputs = rebuild_model(weights), images_and_tokens(io)

    def loss(params):
        zimg, ztxt, out = model.apply({"params": params}, *inputs, train=True)
        logits = out["scale"] * zimg @ ztxt.T
        rows, columns = (jnp.diag(jax.nn.log_softmax(logits, axis)) for axis in (1, 0))
        return -(rows.mean() + columns.mean()) / 2

    value, grads = jax.jit(jax.value_and_grad(loss))(nested(weights.params))
    close = {"atol": 1e-5, "rtol": 1e-4}
    np.testing.assert_allclose(value, io["loss"], rtol=1e-5)
    np.testing.assert_allclose(grads["t"][0], io["grad_logit_scale"], **close)
    np.testing.assert_allclose(grads["img"]["cls"][0, 0], io["grad_class_embedding"], **close)
    head = grads["txt"]["head"]["kernel"]
    np.testing.assert_allclose(head.T, io["grad_text_projection"], **close)


def test_siglip_of_open_clip_has_an_image_tower_of_timm(tmp_path):
    hf = put(tmp_path / "hf", "hf_siglip")
    images = load_pretrained(f"{hf}:img")
    trunk = to_timm(images.params, model=images.model, grid=(4, 4))
    pair = {name: read_tensors(epath.Path(hf))[0][name] for name in ("logit_scale", "logit_bias")}
    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    text |= {"norm_kwargs": {"eps": 1e-6}}
    # A name of timm that stands for 4 heads.
    vision = {"image_size": 32, "timm_model_name": "vit_wee_patch8_siglip", "timm_pool": "map"}
    file = put(
        tmp_path / "open_clip",
        "open_clip_siglip_text",
        config={"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}},
        change=lambda tensors: {
            **{f"visual.trunk.{name}": x for name, x in trunk.items()},
            **{f"text.{name}": x for name, x in tensors.items()},
            **pair,
        },
    )
    weights = load_pretrained(str(file))
    assert any("activation='gelu_tanh', of the training" in note for note in weights.notes)
    io = read_io("hf_siglip") | {"input_ids": read_io("open_clip_siglip_text")["text"]}
    zimg, ztxt, out = embed(weights, io)
    np.testing.assert_allclose(zimg, io["image_embeds"], atol=1e-5)
    features = read_io("open_clip_siglip_text")["features"]
    want = features / np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(ztxt, want, atol=1e-5)
    assert out["bias"] != 0


@pytest.mark.parametrize("part", ["img", "visual", "vision_model"])
def test_an_image_tower_alone_becomes_a_classifier(part, tmp_path):
    case = "hf_clip"
    weights = load_pretrained(f"{put(tmp_path, case)}:{part}")
    assert weights.model["name"] == "vit"
    model = make_vit(
        **{k: v for k, v in weights.model.items() if k not in ("name", "head_bias")},
        num_classes=3,
    )
    check_arguments(weights, model)
    images, _ = images_and_tokens(read_io(case))
    target = random_params(model, images, train=False)
    params, notes = adapt_params(weights, target, target_grid=(3, 3), num_class_tokens=1)
    assert "head: 20 classes in the file, 3 here: re-initialised" in notes
    _, out = compiled(model)({"params": params}, images, train=False)
    features = compiled(rebuild_model(weights))(
        {"params": nested(weights.params)}, images, train=False
    )
    np.testing.assert_allclose(out["pre_logits"], features[1]["pre_logits"], atol=1e-6)


def test_an_image_tower_of_clip_in_timm_computes_the_same(tmp_path):
    images = load_pretrained(f"{put(tmp_path / 'hf', 'hf_clip')}:img")
    headless = {p: x for p, x in images.params.items() if not p.startswith("head/")}
    with pytest.raises(ValueError, match="timm's head has a bias"):
        to_timm(images.params, model=images.model, grid=(3, 3))
    folder = tmp_path / "timm"
    folder.mkdir()
    model = {k: v for k, v in images.model.items() if k != "head_bias"}
    tensors = to_timm(headless, model=model, grid=(3, 3))
    assert "norm_pre.weight" in tensors
    assert "patch_embed.proj.bias" not in tensors
    write_tensors(folder / "model.safetensors", tensors, metadata={})
    stated = {"num_heads": 4, "img_size": 24, "pre_norm": True, "mlp_ratio": 64 / 48}
    config = {"architecture": "vit_base_patch8_clip_quickgelu_224", "num_classes": 0}
    (folder / "config.json").write_text(json.dumps(config | {"model_args": stated}))
    weights = load_pretrained(str(folder))
    assert weights.model["activation"] == "quick_gelu"
    assert weights.model["norm_epsilon"] == 1e-5
    io = read_io("hf_clip")
    apply = rebuild_model(weights).apply
    out = apply({"params": nested(weights.params)}, images_and_tokens(io)[0], train=False)[1]
    z = out["pre_logits"] @ images.params["head/kernel"]
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    np.testing.assert_allclose(z, io["image_embeds"], atol=1e-5)
    (folder / "config.json").write_text(json.dumps(config | {"model_args": {"pre_norm": False}}))
    with pytest.raises(UserError, match="pre_norm=False"):
        load_pretrained(str(folder))


SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 68}
SIGLIP = {
    "image": SIZES | {"patch_size": 8, "classifier": "map"},
    "text": SIZES | {"vocab_size": 99, "context_length": 8},
    "bias_init": -10.0,
}


def fit(weights, model, **options):
    images, tokens = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 8), jnp.int32)
    target = random_params(model, images, tokens, train=False)
    check_arguments(weights, model)
    params, notes = adapt_params(weights, target, target_grid=(4, 4), num_class_tokens=0, **options)
    flat = traverse_util.flatten_dict(params, sep="/")
    return flat, traverse_util.flatten_dict(target, sep="/"), notes


@pytest.mark.parametrize("part", ["img", "txt"])
def test_one_tower_of_a_file_starts_that_tower_of_a_run(part, tmp_path):
    weights = load_pretrained(f"{put(tmp_path, 'hf_siglip')}:{part}")
    params, initial, notes = fit(weights, make_two_towers(**SIGLIP))
    others = "b, t, txt" if part == "img" else "b, img, t"
    assert f"{part}: from the file; {others}: initialised" in notes
    for path, value in params.items():
        own = path.removeprefix(f"{part}/")
        want = weights.params[own] if path.startswith(part) else initial[path]
        np.testing.assert_array_equal(value, want, err_msg=path)


def test_scanned_towers_take_the_same_weights(tmp_path):
    weights = load_pretrained(str(put(tmp_path, "hf_siglip")))
    model = make_two_towers(**SIGLIP | {"text": SIGLIP["text"] | {"scan": True}})
    params, _, _ = fit(weights, model)
    path = "Transformer/encoderblock{}/LayerNorm_0/scale"
    stacked = params["txt/" + path.format("")]
    for i in range(2):
        np.testing.assert_array_equal(stacked[i], weights.params["txt/" + path.format(f"_{i}")])
        assert "img/" + path.format(f"_{i}") in params


def test_a_part_can_be_left_out(tmp_path):
    weights = load_pretrained(str(put(tmp_path, "hf_siglip")))
    params, initial, notes = fit(weights, make_two_towers(**SIGLIP), dont_load=("txt/.*", "t|b"))
    assert "t: not loaded: initialised" in notes
    for path in ("t", "b", "txt/head/kernel", "txt/Embed_0/embedding"):
        np.testing.assert_array_equal(params[path], initial[path])
    np.testing.assert_array_equal(
        params["img/embedding/bias"], weights.params["img/embedding/bias"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"activation": "gelu_erf"}}, "--config.model.text.activation=gelu_tanh"),
        ({"text": {"causal": True}}, "text.causal=False .here True."),
        ({"image": {"norm_epsilon": 1e-5}}, "--config.model.image.norm_epsilon=1e-06"),
        ({"text": {"pooling": "first"}}, "--config.model.text.pooling=last"),
        ({"text": {"num_layers": 1}}, "txt/Transformer/encoderblock_1/.* is not in the model"),
        ({"text": {"vocab_size": 98}}, r"txt/Embed_0/embedding is \(99, 32\) in the file"),
    ],
)
def test_another_model_is_refused_with_the_override_that_fits(changes, message, tmp_path):
    weights = load_pretrained(str(put(tmp_path, "hf_siglip")))
    args = {k: {**v, **changes.get(k, {})} if k in changes else v for k, v in SIGLIP.items()}
    model = make_two_towers(**args)
    with pytest.raises(UserError, match=message):
        fit(weights, model)


def test_towers_are_not_a_classifier(tmp_path):
    weights = load_pretrained(str(put(tmp_path, "hf_siglip")))
    model = make_vit(num_classes=3, patch_size=8, classifier="map", **SIZES)
    target = random_params(model, jnp.zeros((1, 32, 32, 3)), train=False)
    with pytest.raises(UserError, match="name the one to take, as in FILE:img"):
        adapt_params(weights, target, target_grid=(4, 4), num_class_tokens=0)
    text = load_pretrained(f"{tmp_path}/model.safetensors:txt")
    with pytest.raises(UserError, match=r"only model.name='two_towers'"):
        adapt_params(text, target, target_grid=(4, 4), num_class_tokens=0)


def without(name):
    return lambda tensors: {k: x for k, x in tensors.items() if k != name}


def adding(**more):
    return lambda tensors: tensors | more


@pytest.mark.parametrize(
    ("case", "config", "change", "message"),
    [
        ("hf_clip", None, adding(extra=np.ones(3, np.float32)), "extra among them"),
        ("hf_clip", None, without("logit_scale"), "it has no logit_scale"),
        *(
            ("hf_siglip", None, without(name), f"{name} is missing")
            for name in (
                "text_model.head.bias",
                "vision_model.embeddings.patch_embedding.bias",
            )
        ),
        ("hf_clip", {"model_type": "siglip"}, None, "the tensors are those of a CLIP"),
        ("hf_clip", {"text_config": {"hidden_act": "relu"}}, None, "hidden_act='relu'"),
        ("hf_clip", {"text_config": {"vocab_size": 98}}, None, "text_config.vocab_size=98"),
        ("hf_clip", {"text_config": {"strange": 1}}, None, "text_config.strange=1"),
        ("hf_clip", {"vision_config": {"image_size": 32}}, None, "not those of 4x4 patches"),
        ("hf_clip", {"text_config": {"num_attention_heads": 5}}, None, "5 attention heads"),
        ("hf_siglip", {"vision_config": {"vision_use_head": False}}, None, "expected True"),
        ("open_clip", {"text_cfg": {"pool_type": "mean"}}, None, "pool_type='mean'"),
        ("open_clip", {"vision_cfg": {"layers": 3}}, None, "vision_cfg.layers=3"),
        ("open_clip", {"vision_cfg": {"attentional_pool": True}}, None, "attentional_pool=True"),
    ],
)
def test_a_file_of_something_else_is_refused(case, config, change, message, tmp_path):
    if config is not None:
        stated = (
            OPEN_CLIP if case == "open_clip" else json.loads((CASES / f"{case}.json").read_text())
        )
        inner = stated["model_cfg"] if case == "open_clip" else stated
        inner = {
            k: {**v, **config[k]} if isinstance(v, dict) and k in config else config.get(k, v)
            for k, v in inner.items()
        }
        config = {**stated, "model_cfg": inner} if case == "open_clip" else inner
    file = put(tmp_path, case, config=config, change=change)
    with pytest.raises(UserError, match=message):
        load_pretrained(str(file))


def test_patches_of_any_resolution_need_a_table_of_positions(tmp_path):
    with np.load(CASES / "siglip2_bv.npz") as file:
        params = dict(file)
    params["params/img/embedding/kernel"] = params["params/img/embedding/kernel"].reshape(192, -1)
    np.savez(tmp_path / "naflex.npz", **params)
    with pytest.raises(UserError, match="of any resolution"):
        load_pretrained(str(tmp_path / "naflex.npz"))


def test_what_no_file_states_is_assumed_and_noted(tmp_path):
    images = put(
        tmp_path,
        "open_clip",
        config={},
        change=lambda t: {name: x for name, x in t.items() if name.startswith("visual.")},
    )
    weights = load_pretrained(str(images))
    notes = " | ".join(weights.notes)
    assert "img: no open_clip_config.json states activation='quick_gelu'" in notes
    assert weights.model["num_heads"] == 1  # 64 channels each
    file = put(tmp_path / "hf", "hf_clip", config={})
    with pytest.raises(UserError, match="how many attention heads share the width of 48"):
        load_pretrained(str(file))
