# SPDX-License-Identifier: Apache-2.0
"""Models for images of any size, in the layouts of timm, big_vision and Hugging Face."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from tests.models.compiled import compiled
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.naflex import read_naflex, to_patch_kernel
from vit_jax.checkpoint.pretrained.rebuild import check_complete
from vit_jax.checkpoint.pretrained.safetensors import read_safetensors
from vit_jax.models.patches import PatchBatch
from vit_jax.utils.errors import UserError

CASES = Path(__file__).parents[2] / "testdata" / "any_resolution"
TIMM = ["map", "gap_reg", "token_ar", "factorized"]


def read_io(case):
    with np.load(CASES / f"{case}_io.npz") as file:
        return dict(file)


def publish(folder, case, change=None, **options):
    """Writes a case as its program publishes it."""
    stated = json.loads((CASES / f"{case}.json").read_text())
    if case.startswith("naflex"):
        stated = {"architecture": "naflexvit_test", "model_args": stated["cfg"] | options}
    file = folder / "model.safetensors"
    shutil.copy(CASES / f"{case}.safetensors", file)
    if change is not None:
        changed = change(load_file(file))
        save_file({name: np.ascontiguousarray(x) for name, x in changed.items()}, file)
    (folder / "config.json").write_text(json.dumps(stated))
    return file


def to_rows(pixels, grids):
    side = round((pixels.shape[-1] / 3) ** 0.5)
    pixels = pixels.reshape(*pixels.shape[:2], side, side, 3)
    return PatchBatch.of_images(jnp.asarray(pixels), jnp.asarray(grids, jnp.int32))


def run(weights, *inputs):
    params = traverse_util.unflatten_dict(weights.params, sep="/")
    return compiled(check_complete(weights))({"params": params}, *inputs, train=False)


@pytest.mark.parametrize("name", ["embeds.pos_embed", "embeds.proj.bias", "blocks.1.attn.qkv.bias"])
def test_a_missing_tensor_is_named(name, tmp_path):
    def drop(tensors):
        return {key: x for key, x in tensors.items() if key != name}

    with pytest.raises(UserError, match=f"{name} is missing"):
        read_safetensors(publish(tmp_path, "naflex_timm_map", drop))


@pytest.mark.parametrize("case", TIMM)
def test_logits_and_features_are_those_of_timm(case, tmp_path):
    case = f"naflex_timm_{case}"
    weights, io = load_pretrained(str(publish(tmp_path, case))), read_io(case)
    assert weights.layout == "timm NaFlex safetensors"
    grids = (io["patch_coord"] * io["patch_valid"][..., None]).max(axis=1) + 1
    logits, out = run(weights, to_rows(io["patches"], grids))
    np.testing.assert_allclose(logits, io["logits"], atol=1e-5)
    prefix = out["encoded"].shape[1] - io["patches"].shape[1]
    valid = np.pad(io["patch_valid"], ((0, 0), (prefix, 0)), constant_values=True)[..., None]
    np.testing.assert_allclose(out["encoded"] * valid, io["features_masked"], atol=1e-5)
    logits, _ = run(weights, io["image"].transpose(0, 2, 3, 1))
    np.testing.assert_allclose(logits, io["image_logits"], atol=1e-5)


def test_embeddings_are_those_of_big_vision():
    io = read_io("siglip2_bv_naflex")
    weights = load_pretrained(str(CASES / "siglip2_bv_naflex.npz"))
    assert weights.model["image"]["posemb_grid"] == (4, 4)
    grids = np.stack([io["yidx"].max(axis=1), io["xidx"].max(axis=1)], axis=1) + 1
    zimg, ztxt, out = run(weights, to_rows(io["patches"], grids), io["text"])
    np.testing.assert_allclose(zimg, io["zimg"], atol=1e-5)
    np.testing.assert_allclose(ztxt, io["ztxt"], atol=1e-5)
    logits = out["scale"] * zimg @ ztxt.T + out["bias"]
    np.testing.assert_allclose(logits, io["logits"], atol=1e-4)


def test_embeddings_are_those_of_hugging_face(tmp_path):
    io = read_io("hf_siglip2_naflex")
    weights = load_pretrained(str(publish(tmp_path, "hf_siglip2_naflex")))
    rows = to_rows(io["pixel_values"], io["spatial_shapes"])
    zimg, ztxt, out = run(weights, rows, io["input_ids"])
    np.testing.assert_allclose(zimg, io["image_embeds"], atol=1e-5)
    np.testing.assert_allclose(ztxt, io["text_embeds"], atol=1e-5)
    logits = out["scale"] * zimg @ ztxt.T + out["bias"]
    np.testing.assert_allclose(logits, io["logits_per_image"], atol=1e-4)
    valid = io["pixel_attention_mask"][..., None] > 0
    encoded = np.where(valid, out["img"]["encoded"], 0)
    np.testing.assert_allclose(encoded, io["vision_last_hidden_masked"], atol=1e-5)


def test_a_model_without_config_is_read_as_timm_computes_it_by_default(tmp_path):
    save_file(load_file(CASES / "naflex_timm_map.safetensors"), tmp_path / "model.safetensors")
    weights = read_safetensors(tmp_path / "model.safetensors", num_heads=4)
    assert weights.model["posemb_resize"] == "bicubic"
    assert any("bicubic" in note for note in weights.notes)


@pytest.mark.parametrize(
    ("architecture", "activation"),
    [
        ("naflexvit_base_patch16_siglip.v2_webli", "gelu_tanh"),
        ("naflexvit_so400m_patch16_siglip", "gelu_tanh"),
        ("naflexvit_base_patch16_map", "gelu_erf"),
    ],
)
def test_the_name_of_siglip_shows_its_activation(architecture, activation):
    tensors = load_file(CASES / "naflex_timm_map.safetensors")
    weights = read_naflex(tensors, {"architecture": architecture}, 4)
    assert weights.model["activation"] == activation


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ({"rope_type": "axial"}, None, "rope_type"),
        ({"pos_embed_antialias": False}, None, "pos_embed_antialias"),
        ({}, lambda t: t | {"embeds.pos_embed": t["embeds.pos_embed"][0]}, "expected .1, rows"),
        ({}, lambda t: t | {"embeds.proj.weight": t["embeds.proj.weight"][:, :30]}, "a square"),
        ({}, lambda t: t | {"embeds.norm.weight": t["norm.weight"]}, "no model here has"),
    ],
)
def test_parts_that_no_model_here_has_are_refused(options, change, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_pretrained(str(publish(tmp_path, "naflex_timm_map", change, **options)))


def test_channels_of_a_patch_are_last_or_first():
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 5))
    np.testing.assert_array_equal(to_patch_kernel(kernel.reshape(48, 5)), kernel)
    first = kernel.transpose(2, 0, 1, 3).reshape(48, 5)
    np.testing.assert_array_equal(to_patch_kernel(first, first=True), kernel)
