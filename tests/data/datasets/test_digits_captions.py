# SPDX-License-Identifier: Apache-2.0
"""The digits with captions: places, captions, and what TFDS prepares from them."""

import collections

import cv2
import numpy as np
import tensorflow_datasets as tfds

from vit_jax.data.datasets.digits import table
from vit_jax.data.datasets.digits_captions import captions
from vit_jax.data.sources import open_source


def test_each_class_is_about_as_often_at_each_place():
    labels = table.load_digits()[1]
    places = captions.find_places(labels)
    counts = collections.Counter(zip(labels.tolist(), map(tuple, places.tolist()), strict=True))
    assert len(counts) == 90
    assert set(counts.values()) <= {19, 20, 21}


def test_a_digit_keeps_its_pixels_at_its_place():
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    canvas = captions.draw(image, np.array([0, 2]))
    assert canvas.shape == (12, 12)
    np.testing.assert_array_equal(canvas[:8, 4:], image)
    assert canvas.sum() == image.sum()


def test_captions_state_the_digit_and_its_place():
    assert captions.describe(7, np.array([1, 0])) == (
        "a photo of the digit seven, shifted left",
        "the number seven, moved left",
        "a handwritten seven at the left",
    )
    assert captions.describe(3, np.array([2, 2])) == (
        "a photo of the digit three, shifted down and right",
        "the number three, moved down and right",
        "a handwritten three at the bottom right",
    )
    assert captions.describe(0, np.array([1, 1])) == (
        "a photo of the digit zero, in the middle",
        "the number zero, centred",
        "a handwritten zero in the middle",
    )
    every = {
        text for d in range(10) for p in range(9) for text in captions.describe(d, divmod(p, 3))
    }
    assert len(every) == 270
    assert max(map(len, every)) < 64


def test_records_have_image_label_and_captions(captions_dir):
    images, labels = table.load_digits()
    images, places = table.to_uint8_range(images), captions.find_places(labels)
    source = open_source("digits_captions", "test", data_dir=captions_dir, key="split")
    stored = tfds.data_source("digits_captions", split="test", data_dir=captions_dir)
    assert len(source) == 360
    for index in (0, 17, 359):
        row, record = int(stored[index]["id"]), source[index]
        pixels = cv2.imdecode(np.frombuffer(record["image"], np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(pixels, captions.draw(images[row], places[row]))
        assert record["label"] == labels[row]
        texts = captions.describe(int(labels[row]), places[row])
        assert record["text"] == source.captions(index) == texts


def test_digits_to_train_on_are_at_all_places_and_in_no_other_split(captions_dir):
    rows = {
        split: [
            int(r["id"])
            for r in tfds.data_source("digits_captions", split=split, data_dir=captions_dir)
        ]
        for split in ("train", "validation", "test")
    }
    assert {s: len(ids) for s, ids in rows.items()} == {
        "train": 9 * 1294,
        "validation": 143,
        "test": 360,
    }
    assert set(collections.Counter(rows["train"]).values()) == {9}
    assert not set(rows["train"]) & {*rows["validation"], *rows["test"]}
