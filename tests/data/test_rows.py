# SPDX-License-Identifier: Apache-2.0
"""Several images in a row: which ones is arithmetic, and next to no patch is padding."""

import dataclasses

import numpy as np
import pytest

from vit_jax.data.ops.patches import Patches, to_column
from vit_jax.data.pipeline import DatasetSpec, read_step, train_batches
from vit_jax.data.rows import Packing, Row, blank_row, unpack
from vit_jax.utils.errors import UserError

PACKING = Packing(images_per_row=4, size_spread=3.0, drop_patches=(0.0, 0.5))


def spec(data_dir, **options):
    given = {
        "name": "digits",
        "split": "train",
        "preprocess": "decode|resize(12, 20)|inception_patches(4, 48)",
        "batch_size": 16,
        "key": "data",
        "packing": PACKING,
    }
    return DatasetSpec(**(given | {"data_dir": data_dir, "num_threads": 0} | options))


def test_shares_add_up_to_the_row_and_are_of_all_sizes():
    packing = Packing(images_per_row=4, size_spread=6.0, drop_patches=(0.1, 0.3))
    sides = []
    for seed in range(300):
        drawn = list(packing.draw(1000, np.random.default_rng(seed)))
        places, shares, rates = map(np.array, zip(*drawn, strict=True))
        assert sorted(places) == [0, 1, 2, 3]
        assert shares.sum() == 1000
        assert (np.diff(shares) <= 0).all()
        assert (rates >= 0.1).all()
        assert (rates <= 0.3).all()
        sides += list(shares**0.5)
    # A place in the row says nothing about the size.
    first = [next(packing.draw(1000, np.random.default_rng(s)))[0] for s in range(400)]
    assert np.bincount(first).min() > 60
    # The mean square of uniform sides from 1 to 6 is 43/3, and the mean side 3.5.
    assert np.mean(sides) / np.mean(np.square(sides)) ** 0.5 == pytest.approx(
        3.5 / (43 / 3) ** 0.5, rel=0.02
    )


def test_equal_shares_without_spread():
    drawn = list(Packing(images_per_row=3).draw(96, np.random.default_rng(0)))
    assert [share for _, share, _ in drawn] == [32, 32, 32]
    assert [rate for *_, rate in drawn] == [0, 0, 0]


@pytest.mark.parametrize("aspects", ["like ImageNet", "extreme"])
def test_at_least_95_percent_of_patches_are_real(aspects):
    """Sides as of photographs, most of them 4:3 and 3:4; or of panoramas and scans."""
    rng, used, rows = np.random.default_rng(0), 0, 40
    packing = Packing(images_per_row=4, size_spread=6.0)
    for seed in range(rows):
        row, rest = Row(blank_row(np.zeros((1025 * 2, 2, 3), np.uint8), 4)), 0
        row_rng = np.random.default_rng(seed)
        for place, share, rate in packing.draw(1024, row_rng):
            height = int(np.clip(rng.normal(400, 100), 60, 900))
            aspect = rng.choice([0.75, 0.67, 1.0, 1.33, 1.5]) * rng.uniform(0.95, 1.05)
            if aspects == "extreme":
                aspect = rng.choice([0.1, 0.3, 1.0, 4.0, 12.0])
            image = np.zeros((height, max(int(height * aspect), 1), 3), np.uint8)
            op = Patches(2, share + rest, "nearest")
            taken = row.add(place, op.change(image), share + rest, rate, row_rng)
            rest += share - taken
        used += (row.features["places"][:, 0] > 0).sum()
    assert used / (1024 * rows) > (0.99 if aspects == "like ImageNet" else 0.95)


def test_each_image_is_in_its_row_with_its_places():
    images = [np.random.default_rng(i).integers(0, 256, (4, 6, 3), np.uint8) for i in range(2)]
    row, rng = Row(blank_row(np.zeros((9 * 2, 2, 3), np.uint8), 3)), np.random.default_rng(0)
    assert row.add(1, to_column(images[1], size=2, budget=6), 6, 0.0, rng) == 6
    small = to_column(images[0][:2, :4], size=2, budget=2)
    assert row.add(0, small, 2, 0.0, rng) == 2
    places, grids = row.features["places"], row.features["grids"]
    assert places[:, 0].tolist() == [2] * 6 + [1] * 2
    assert places[:6, 1:].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert grids.tolist() == [[1, 2], [2, 3], [1, 1]]
    shown = unpack({name: x[None] for name, x in row.features.items()})
    np.testing.assert_array_equal(shown[1], images[1])
    np.testing.assert_array_equal(shown[0, :2, :4], images[0][:2, :4])
    assert not shown[0, 2:].any()


def test_patches_that_are_left_out_keep_the_places_of_the_others():
    image = np.random.default_rng(0).integers(1, 256, (8, 8, 3), np.uint8)
    row = Row(blank_row(np.zeros((17 * 2, 2, 3), np.uint8), 2))
    rng = np.random.default_rng(1)
    assert row.add(0, to_column(image, size=2, budget=16), 16, 0.25, rng) == 12
    shown = unpack({name: x[None] for name, x in row.features.items()})[0]
    kept = shown.any(axis=2)
    np.testing.assert_array_equal(shown[kept], image[kept])
    assert kept.sum() == 12 * 4
    assert row.features["grids"][0].tolist() == [4, 4]


def test_any_step_can_be_first_and_any_number_of_hosts_has_the_same_rows(data_dir):
    data = spec(data_dir)
    batches = train_batches(data, seed=0, step=0)
    first = [next(batches) for _ in range(3)]
    assert first[0]["image"].shape == (4, 49 * 4, 4, 3)
    assert first[0]["label"].shape == (4, 4)
    later = train_batches(data, seed=0, step=2)
    halves = [
        next(train_batches(data, seed=0, step=2, shards=(i,), num_shards=2)) for i in range(2)
    ]
    threads = dataclasses.replace(data, num_threads=3)
    others = [
        next(later),
        {name: np.concatenate([half[name] for half in halves]) for name in halves[0]},
        next(train_batches(threads, seed=0, step=2)),
        read_step(data, seed=0, step=2)[0],
    ]
    for other in others:
        for name, value in first[2].items():
            np.testing.assert_array_equal(other[name], value)


def test_the_images_of_a_batch_are_those_of_its_positions(data_dir):
    alone = spec(data_dir, packing=Packing())
    want = next(train_batches(alone, seed=0, step=1))["label"]
    batch = next(train_batches(spec(data_dir), seed=0, step=1))
    np.testing.assert_array_equal(batch["label"].ravel(), want)
    assert (batch["places"][..., 0] > 0).mean() > 0.95


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preprocess": "decode|resize(8)"}, "to end in"),
        ({"batch_size": 18}, "does not divide data.batch_size=18"),
        ({"views": (("more", 1, "decode|resize(8)"),)}, "with data.views"),
        ({"budgets": ((8, 8),)}, "with data.budgets"),
        ({"packing": Packing(images_per_row=8, size_spread=9.0)}, "smallest image would have"),
        (
            {"packing": Packing(images_per_row=2, drop_patches=(0.0, 0.9999))},
            "patches at most",
        ),
    ],
)
def test_what_can_not_share_rows_is_refused(data_dir, options, words):
    with pytest.raises(UserError, match=words):
        spec(data_dir, **options).check_packing()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images_per_row": 0}, "expected 1 or more"),
        ({"images_per_row": 2, "size_spread": 0.5}, "expected 1 or more"),
        ({"images_per_row": 2, "drop_patches": (0.5, 0.2)}, "such as"),
        ({"size_spread": 2.0}, "2 or more images in a row"),
        ({"drop_patches": (0.0, 0.2)}, "2 or more images in a row"),
    ],
)
def test_numbers_out_of_range_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Packing(**options)
