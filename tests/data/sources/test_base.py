# SPDX-License-Identifier: Apache-2.0
"""Datasets as listed records: their splits and labels."""

import dataclasses

import numpy as np
import pytest

from vit_jax.data.sources.base import Dataset, DatasetInfo, Records
from vit_jax.utils.errors import UserError


class Numbered(Records):
    def read(self, row):
        return b""

    def describe(self, row):
        return f"file[{row}]"


def dataset(labels, *, multi_label=False):
    """Four rows of three classes; `test` has the last two."""
    splits = {"train": np.arange(2), "test": np.arange(2, 4)}
    info = DatasetInfo(3, (None, None, 3), None, multi_label)
    return Dataset("mine:x", info, Numbered(), labels, splits)


SEVERAL = [np.array(labels, np.int32) for labels in ([], [0, 2], [1], [2])]
LABELS = {
    "too large": (np.array([0, 1, 2, 3]), "file[3] (row 4) has label 3"),
    "negative": (np.array([0, 1, -5, 2]), "file[2] (row 3) has label -5"),
    "missing": (np.array([0, 1, -1, -1]), "file[2] (row 3) has no label"),
    "unsigned": (np.array([0, 1, 2, 255], np.uint8), "file[3] (row 4) has label 255"),
    "64 bits": (np.array([0, 1, 2**40, 2]), "file[2] (row 3) has label 1099511627776"),
    "fractions": (np.array([0, 1, 2, 0.5]), "file[3] (row 4) has label 0.5"),
    "no number": (np.array([0, 1, np.nan, 0.5]), "file[2] (row 3) has label nan"),
    "texts": (np.array(["0", "1", "2", "0"]), "file[2] (row 3) has label 2"),
    "a list": ([0, 1, 2, 3], "file[3] (row 4) has label 3"),
    "several": ([*SEVERAL[:3], np.array([0, 3])], "file[3] (row 4) has label 3"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_out_of_range_are_refused_with_their_record(name):
    labels, words = LABELS[name]
    data = dataset(labels, multi_label=name == "several")
    with pytest.raises(UserError) as error:
        data.open("test", key="data.split")
    assert str(error.value) == (
        f"data.split='test' of mine:x: {words}; expected integers from 0 to 2"
    )
    if name != "texts":
        assert len(data.open("train", key="data.split")) == 2


def test_labels_in_range_are_as_they_were():
    rows = dataset(np.array([0, 1, 2.0, 0])).open("test", key="data.split")
    assert [rows.label(index) for index in range(2)] == [2, 0]
    several = dataset(SEVERAL, multi_label=True).open("all", key="data.split")
    np.testing.assert_array_equal(several.label(1), [1, 0, 1])
    none = dataset(SEVERAL[:1] * 4, multi_label=True).open("all", key="data.split")
    np.testing.assert_array_equal(none.label(1), [0, 0, 0])


def test_class_names_are_as_many_as_classes():
    info = dataclasses.replace(dataset(SEVERAL).info, class_names=("a", "b"))
    with pytest.raises(UserError, match="'mine:x' has 2 class names for 3 classes"):
        dataclasses.replace(dataset(SEVERAL), info=info)


def test_class_names_are_one_line_in_one_unicode_form():
    info = dataclasses.replace(dataset(SEVERAL).info, class_names=["e\u0301", "a\nb", 3])
    assert info.class_names == ("\u00e9", "a\\nb", "3")
