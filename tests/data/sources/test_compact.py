# SPDX-License-Identifier: Apache-2.0
"""Columns in few arrays hold what lists of objects hold."""

import numpy as np
import pytest

from vit_jax.data.sources.compact import Codes, Ragged, TextLists, Texts

TEXTS = ["", "a", "héron/1.jpg", "gs://b/x", "\ud800", "", "é" * 300, "日本"]


def test_texts_are_those_that_were_appended():
    texts = Texts(TEXTS[:3])
    texts.append(iter(TEXTS[3:]))
    texts.append([])
    assert list(texts) == TEXTS
    assert len(texts) == len(TEXTS)
    assert texts.may_have("://")
    assert not texts.may_have(":///")
    with pytest.raises(IndexError):
        texts[len(TEXTS)]
    assert list(Texts()) == []


def test_codes_keep_values_of_different_types_apart():
    values = ["1", 1, True, 1.0, None, "a", [1], "a", 1, [1], "None"]
    codes = Codes()
    codes.append(values[:4], range(4))
    codes.append(values[4:], range(4, len(values)))
    found = [codes.values[code] for code in codes.codes]
    assert list(map(repr, found)) == list(map(repr, values))
    assert codes.rows == [0, 1, 2, 3, 4, 5, 6, 10]
    assert codes.codes.dtype == np.int32


def test_rows_of_several_values():
    rows = [[], [3], [], [1, 2], [4, 4, 4], []]
    ragged = Ragged(np.concatenate(rows).astype(np.int32), np.array([len(row) for row in rows]))
    assert len(ragged) == 6
    assert [row.tolist() for row in ragged] == rows
    assert ragged[-2].tolist() == [4, 4, 4]
    values, counts = ragged.select(np.array([4, 0, 3, 3, 1]))
    assert values.tolist() == [4, 4, 4, 1, 2, 1, 2, 3]
    assert counts.tolist() == [3, 0, 2, 2, 1]
    assert ragged.select(np.array([], int))[0].tolist() == []
    with pytest.raises(IndexError):
        ragged[6]


def test_lists_of_texts():
    lists, rows = TextLists(), [[], ["a", "é"], [""], [], ["b"] * 3]
    lists.append(rows[:2])
    lists.append(rows[2:])
    assert list(lists) == rows
    assert len(lists) == 5
