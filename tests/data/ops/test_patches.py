# SPDX-License-Identifier: Apache-2.0
"""Images of any size are resized to a budget of patches as in the original programs."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vit_jax.data.ops.patches import fit_budget, to_column, to_images
from vit_jax.data.ops.transforms import apply
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.models.patches import PatchBatch
from vit_jax.utils.errors import UserError

GOLDEN = Path(__file__).parents[2] / "testdata" / "any_resolution"


def run(line, image, seed=0):
    ops = parse_preprocess(line, key="preprocess")
    return apply(ops, {"image": image}, np.random.default_rng(seed))["image"]


def draw(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_sizes_are_those_of_timm_hugging_face_and_big_vision():
    rows = np.load(GOLDEN / "naflex_sizes_io.npz")["rows"]
    assert len(rows) == 54
    for height, width, size, budget, *chosen in rows.tolist():
        rows, columns = fit_budget(height, width, size=size, budget=budget)
        assert [rows * size, columns * size] * 3 == chosen, (height, width, size, budget)


@pytest.mark.parametrize("budget", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (1, 1), (3000, 4000), (17, 33)])
def test_no_image_has_more_patches_than_the_budget_and_each_has_one(shape, budget):
    rows, columns = fit_budget(*shape, size=16, budget=budget)
    assert 1 <= rows * columns <= budget


def test_patches_are_in_the_order_of_big_vision():
    with np.load(GOLDEN / "naflex_host_bv_io.npz") as io:
        want, pixels = io["patches"], io["patchified_input"]
        y, x = io["yidx"], io["xidx"]
    image = np.round((pixels + 1) * 127.5).astype(np.uint8)
    column = to_column(image, size=8, budget=30)
    patches, grids = PatchBatch.split_columns(jnp.asarray(column[None]))
    batch = PatchBatch.of_images(patches / 127.5 - 1, grids)
    np.testing.assert_allclose(batch.pixels[0, :24].reshape(24, -1), want, atol=1 / 127)
    assert np.asarray(batch.coordinates[0, :24]).tolist() == np.stack([y, x], 1).tolist()
    assert np.asarray(batch.grids).tolist() == [[[4, 6]]]
    assert np.asarray(batch.segments)[0].tolist() == [1] * 24 + [0] * 6


def test_an_image_is_resized_as_in_big_vision():
    with np.load(GOLDEN / "naflex_host_bv_io.npz") as io:
        image, want = io["image"], io["resized_to_20_patches_of_8"]
    assert want.shape == (32, 40, 3)
    assert fit_budget(*image.shape[:2], size=8, budget=20) == (4, 5)
    for i in range(3):  # Pillow resizes floats too, one channel at a time.
        channel = Image.fromarray(image[..., i]).resize((40, 32), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(np.asarray(channel), want[..., i], atol=1e-6)
    pixels = np.round((image + 1) * 127.5).astype(np.uint8)
    got = to_images(run("patches(8, 20)", pixels)[None])[0] / 127.5 - 1
    np.testing.assert_allclose(got, want, atol=2 / 127.5)


def test_a_column_holds_the_image_and_any_grid():
    for rows, columns in ((1, 300), (300, 1), (17, 17)):
        image = draw(rows * 4, columns * 4)
        column = to_column(image, size=4, budget=301)
        assert column.shape == (302 * 4, 4, 3)
        np.testing.assert_array_equal(to_images(column[None])[0], image)
        _, grids = PatchBatch.split_columns(jnp.asarray(column[None]))
        assert np.asarray(grids).tolist() == [[rows, columns]]


def test_a_random_part_is_a_function_of_the_generator_and_keeps_its_aspect():
    image = draw(60, 90)
    line = "inception_patches(4, 50, area_min=30)"
    one = run(line, image, seed=1)
    assert one.shape == (51 * 4, 4, 3)
    np.testing.assert_array_equal(one, run(line, image, seed=1))
    assert not np.array_equal(one, run(line, image, seed=2))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("patches(16, 0)", "budget=0"),
        ("patches(1, 16)", "at least 2 pixels"),
        ("patches(16, 70000)", "65,535 patches at most"),
        ("inception_patches(16, 64, area_min=0)", "area_min"),
    ],
)
def test_budgets_and_sizes_that_are_none_are_refused(line, words):
    with pytest.raises(UserError, match=words):
        parse_preprocess(line, key="data.preprocess")
