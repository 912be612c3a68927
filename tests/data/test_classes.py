# SPDX-License-Identifier: Apache-2.0
"""Classes of two datasets are matched by name, and numbers by value."""

import numpy as np
import pytest

from tests.images import encode
from vit_jax.data.classes import Classes, match_labels
from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.utils.errors import UserError

STRINGS = tuple(sorted(map(str, range(12))))  # 0, 1, 10, 11, 2, ...


def classes(given, owner="b"):
    named = not isinstance(given, int)
    return Classes(len(given) if named else given, given if named else None, owner)


@pytest.mark.parametrize(
    ("data", "head", "labels"),
    [
        (("a", "b"), ("a", "b"), [0, 1]),
        (("b", "c"), ("a", "b", "c"), [1, 2]),
        (("c", "a", "b"), ("a", "b", "c"), [2, 0, 1]),
        (("crane", "crane", "x"), ("crane", "crane", "x"), [0, 1, 2]),
        (STRINGS, 12, [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]),
        (12, STRINGS, [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]),
        (("0", "10", "7"), 1000, [0, 10, 7]),
        (4, 12, [0, 1, 2, 3]),
        (3, STRINGS, [0, 1, 4]),
        (("07", "10"), STRINGS, [9, 2]),
        (("1", "2", "x"), ("0", "1", "2", "x", "y"), [1, 2, 3]),
        (3, ("cat", "dog", "eel"), [0, 1, 2]),
        (("cat", "dog", "eel"), 3, [0, 1, 2]),
        (STRINGS, tuple("abcdefghijkl"), [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]),
        (tuple("abcdefghijkl"), STRINGS, [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]),
    ],
)
def test_a_class_gets_the_label_that_its_name_or_number_has(data, head, labels):
    found, note = match_labels(classes(data, "a"), classes(head), key="k")
    assert found.tolist() == labels
    assert found.dtype == np.int32
    if labels != list(range(len(labels))):
        assert note.startswith("a: ")


@pytest.mark.parametrize(
    ("data", "head", "words"),
    [
        (
            ("cat", "dgo"),
            ("cat", "dog"),
            ["a has 2 classes ('cat', 'dgo')", "lacks 'dgo'", "mean 'dog'"],
        ),
        (("a", "b", "c"), ("a", "b"), ["lacks 'c'"]),
        (("x", "y", "z"), ("a", "b"), ["lacks 'x' and 2 more"]),
        (("Cat", "dog"), ("cat", "dog"), ["lacks 'Cat'"]),
        (2, ("a", "b", "c"), ["a has 2 classes without names (0, 1)", "expected names on both"]),
        (("a", "b"), 3, ["b has 3 classes without names (0, 1, 2)"]),
        (tuple(map(str, range(1, 11))), 10, ["'1', '2', '3'"]),
        (10, tuple(map(str, range(1, 11))), ["without names"]),
        (("1", "2"), ("a", "b"), ["lacks '1'"]),
        (("crane",), ("crane", "crane", "x"), ["2 are called 'crane'"]),
    ],
)
def test_classes_without_their_counterpart_are_refused(data, head, words):
    with pytest.raises(UserError) as error:
        match_labels(classes(data, "a"), classes(head), key="evals.val")
    for word in ("evals.val: a ", *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def write_rows(path, header, rows):
    for value in range(len(rows)):
        (path / f"{value}.png").write_bytes(encode(value))
    lines = [f"image,{header}", *(f"{value}.png,{row}" for value, row in enumerate(rows))]
    (path / "list.csv").write_text("\n".join(lines))
    return DatasetSpec(f"manifest:{path}/list.csv", "all", "decode|resize(8)", 4, None, "evals.val")


def label_of_grey(spec):
    batch = next(eval_batches(spec))
    rows = zip(batch["image"], batch["label"].tolist(), batch["mask"], strict=True)
    return {int(image[0, 0, 0]): label for image, label, mask in rows if mask}


def test_examples_have_the_labels_of_the_other_classes(tmp_path):
    spec = write_rows(tmp_path, "label", ["dog", "eel", "dog"])
    run = Classes(3, ("eel", "cat", "dog"), "the run")
    matched, note = spec.match(run, key="k")
    assert "2 of 2 labels" in note
    assert matched.info.class_names == ("eel", "cat", "dog")
    assert label_of_grey(matched) == {0: 2, 1: 0, 2: 2}
    assert matched.open().file_name(0).endswith(".png")
    again, note = matched.match(run, key="k")
    assert (label_of_grey(again), note) == ({0: 2, 1: 0, 2: 2}, "")


def test_several_labels_of_an_example_are_moved_too(tmp_path):
    spec = write_rows(tmp_path, "labels", ["dog|eel", "", "eel"])
    matched, _ = spec.match(Classes(4, ("eel", "cat", "dog", "fox"), "the run"), key="k")
    assert label_of_grey(matched) == {0: [1, 0, 1, 0], 1: [0, 0, 0, 0], 2: [1, 0, 0, 0]}
    assert matched.blank()["label"].shape == (4,)
