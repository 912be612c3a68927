# SPDX-License-Identifier: Apache-2.0
"""Patches of several sizes: kernels and positions are resized as in the original code."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.models.compiled import compiled
from tests.models.random_params import random_params
from vit_jax.checkpoint.pretrained.embedding import resize_patches
from vit_jax.checkpoint.pretrained.npz import read_npz
from vit_jax.models.patches import Layout, PatchBatch, interpolate_positions
from vit_jax.models.positions import resize_posemb
from vit_jax.models.resampling import axis_weights, kernel_matrix, resize_matrix
from vit_jax.models.variants import make_vit
from vit_jax.utils.errors import UserError

GOLDEN = Path(__file__).parents[1] / "testdata" / "any_resolution"
SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "num_classes": 3}
METHODS = ("bilinear", "bilinear_half_pixel", "bilinear_antialias", "bicubic")
METHODS += ("bicubic_no_antialias",)


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def test_kernels_are_resized_as_in_big_vision():
    io = load("flexi_resample_bv_io")
    for size in (4, 6, 12, 16):
        got = resize_patches(io["kernel"], (size, size))
        np.testing.assert_allclose(got, io[f"resampled_{size}x{size}"], atol=1e-5)


def test_kernels_are_resized_as_in_timm_by_each_rule():
    io = load("flexi_resample_io")
    rules = {"bicubic_aa": "bicubic", "bilinear_aa": "bilinear_antialias"}
    rules |= {"bilinear_noaa": "bilinear_half_pixel"}
    cases = [name for name in io if name.startswith("timm_")]
    assert len(cases) == 14
    for case in cases:
        rule, _, size = case.removeprefix("timm_").rpartition("_")
        height, width = map(int, size.split("x"))
        kernel = io["kernel"].transpose(2, 3, 1, 0)
        got = resize_patches(kernel, (height, width), method=rules[rule])
        np.testing.assert_allclose(got.transpose(3, 2, 0, 1), io[case], atol=1e-5)


@pytest.mark.parametrize("size", [(16, 12), (9, 16), (5, 9), (3, 20)])
def test_products_of_larger_patches_stay_and_one_axis_may_shrink(size):
    rng = np.random.default_rng(0)
    kernel, patch = rng.normal(size=(8, 8, 3, 5)), rng.normal(size=(8, 8, 3))
    got = resize_patches(kernel, size)
    assert np.abs(got).max() < 10 * np.abs(kernel).max()
    larger = np.einsum(
        "ri,cj,ijx->rcx",
        resize_matrix("bilinear_half_pixel", 8, size[0]),
        resize_matrix("bilinear_half_pixel", 8, size[1]),
        patch,
    )
    want = np.einsum("ijx,ijxf->f", patch, kernel)
    products = np.einsum("ijx,ijxf->f", larger, got)
    if min(size) >= 8:
        np.testing.assert_allclose(products, want, atol=1e-9)
    # Least squares: the residual is orthogonal to what a kernel of this size can give.
    for old, new in ((8, size[0]), (8, size[1])):
        matrix = resize_matrix("bilinear_half_pixel", old, new)
        residual = np.eye(old) - matrix.T @ kernel_matrix("bilinear_half_pixel", old, new)
        np.testing.assert_allclose(matrix @ residual, 0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_the_same_computed_on_a_device(method):
    for source, target in ((7, 5), (7, 16), (16, 16), (4, 1), (1, 3)):
        want = resize_matrix(method, source, target)
        got = axis_weights(method, jnp.arange(target), source, jnp.full(target, target), xp=jnp)
        np.testing.assert_allclose(got, want, atol=1e-6)
        np.testing.assert_allclose(want.sum(axis=1), 1, atol=1e-12)


def test_antialiased_positions_are_those_of_jax_image_resize():
    table = np.random.default_rng(0).normal(size=(1, 49, 4)).astype(np.float32)
    for grid in ((5, 5), (3, 11), (24, 7), (7, 7)):
        want = jax.image.resize(table.reshape(1, 7, 7, 4), (1, *grid, 4), "linear")
        got = resize_posemb(
            table,
            source_grid=(7, 7),
            target_grid=grid,
            num_prefix_tokens=0,
            method="bilinear_antialias",
        )
        np.testing.assert_allclose(got, np.reshape(want, got.shape), atol=3e-6)


def test_flexivit_gives_the_logits_of_big_vision_at_each_size():
    io, stated = load("flexi_bv_io"), json.loads((GOLDEN / "flexi_bv.json").read_text())
    weights = read_npz(GOLDEN / "flexi_bv.npz")
    assert weights.posemb_resize == "bilinear_antialias"
    params = traverse_util.unflatten_dict(weights.params, sep="/")
    names = {"hidden_size": "width", "num_layers": "depth"}
    sizes = {key: stated[names.get(key, key)] for key in (*names, "mlp_dim", "num_heads")}
    for side in (3, 4, 6, 12):
        model = make_vit(
            **sizes,
            patch_size=stated["image_size"] // side,
            kernel_size=tuple(stated["patch_size"]),
            posemb_grid=tuple(stated["posemb_size"]),
            num_classes=stated["num_classes"],
        )
        logits, _ = compiled(model)({"params": params}, io["image"], train=False)
        np.testing.assert_allclose(logits, io[f"logits_seqhw{side}"], atol=1e-5)


def test_the_stored_kernel_and_table_get_the_gradient_at_any_size():
    model = make_vit(patch_size=4, kernel_size=8, posemb_grid=(3, 3), **SMALL)
    images = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)
    params = random_params(model, images, train=False)
    assert params["embedding"]["kernel"].shape == (8, 8, 3, 16)
    assert params["Transformer"]["posembed_input"]["pos_embedding"].shape == (1, 10, 16)
    for size in (2, 4, 8, 16):
        at = model.at_patch_size(size)
        loss = jax.grad(lambda p, at=at: at.apply({"params": p}, images, train=False)[0].sum())
        grads = jax.jit(loss)(params)
        embedding, table = grads["embedding"]["kernel"], grads["Transformer"]["posembed_input"]
        assert np.abs(embedding).max() > 1e-4
        assert np.abs(table["pos_embedding"]).max() > 1e-4


def test_positions_of_each_image_are_those_of_its_own_grid():
    table = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    grids = np.array([[3, 6], [5, 4], [1, 9], [2, 2]], np.int32)
    batch = PatchBatch.of_images(jnp.zeros((4, 20, 1, 1, 3)), jnp.asarray(grids))
    for method in METHODS:
        got = interpolate_positions(jnp.asarray(table), Layout.of(batch), method=method)
        for row, grid in enumerate(grids):
            want = resize_posemb(
                table.reshape(1, 20, 3),
                source_grid=(5, 4),
                target_grid=tuple(grid),
                num_prefix_tokens=0,
                method=method,
            )[0]
            np.testing.assert_allclose(got[row, : len(want)], want, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_sizes": (2, 4)}, "expected model.posemb_grid"),
        ({"patch_sizes": (2, 4), "position_embedding": "relative"}, "expected another embedding"),
        ({"position_embedding": "factorized"}, "needs the grid"),
        ({"posemb_grid": (4, 4), "position_embedding": "sincos2d"}, "fit any grid"),
        ({"posemb_grid": (0, 4)}, "at least 1"),
        ({"kernel_size": 8, "resnet_layers": ()}, "without one"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        make_vit(patch_size=4, **(SMALL | options))
