# SPDX-License-Identifier: Apache-2.0
"""Prompts of classes, and their average against values of big_vision."""

from pathlib import Path

import numpy as np
import pytest

from vit_jax.evaluators.prompts import (
    TEMPLATES,
    average_prompts,
    find_class_names,
    find_templates,
    write_prompts,
)
from vit_jax.utils.errors import UserError

GOLDEN = np.load(Path(__file__).parent.parent / "testdata/contrastive/zero_shot_io.npz")


def test_class_vectors_and_predictions_are_those_of_big_vision():
    classes = average_prompts(GOLDEN["prompt_embeddings"], GOLDEN["prompt_labels"], 5)
    np.testing.assert_allclose(classes, GOLDEN["class_embeddings"], rtol=1e-5, atol=1e-6)
    predicted = (GOLDEN["images"] @ classes.T).argmax(axis=1)
    np.testing.assert_array_equal(predicted, GOLDEN["predictions"])


def test_prompts_of_any_length_count_the_same():
    short, long = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 9.0]])
    labels = np.array([0, 0])
    np.testing.assert_allclose(average_prompts(short, labels, 1), [[0.5**0.5, 0.5**0.5]], rtol=1e-6)
    np.testing.assert_array_equal(
        average_prompts(short, labels, 1), average_prompts(long, labels, 1)
    )


def test_templates_are_a_list_by_name_a_file_one_or_several(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {}\nno {} here\n\n")
    assert find_templates(str(file), key="k") == ("a {}", "no {} here")
    assert find_templates("a dark {}", key="k") == ("a dark {}",)
    assert find_templates(["a {}", "{}"], key="k") == ("a {}", "{}")
    assert find_templates("photos", key="k") == TEMPLATES["photos"]
    for templates in TEMPLATES.values():
        assert find_templates(templates, key="k") == templates


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "k=(): expected at least one template"),
        (("a {}", "a cat"), "k: 'a cat': expected {} once, for the name of the class"),
        ("{} and {}", "k: '{} and {}': expected {} once"),
        ("photso", "k='photso': expected a file, a template with {}"),
        ("missing.txt", "k='missing.txt' can't be read: No such file"),
        ("FILE", "line 2 is empty: expected a template a line"),
    ],
)
def test_wrong_templates_are_refused_in_one_line(given, message, tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {}\n\nthe {}\n")
    with pytest.raises(UserError) as e:
        find_templates(str(file) if given == "FILE" else given, key="k")
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_names_of_classes_come_from_the_data_a_file_or_the_config(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("a\nb\n")
    options = {"count": 2, "owner": "birds", "key": "k"}
    assert find_class_names(None, ("x", "y"), **options) == ("x", "y")
    assert find_class_names(str(file), ("x", "y"), **options) == ("a", "b")
    assert find_class_names(["c", "d"], None, **options) == ("c", "d")
    assert write_prompts(("a", "b{}"), ("{}", "the {}!")) == ["a", "the a!", "b{}", "the b{}!"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "k=None: birds has no class names: expected a text file with one a line"),
        (("a",), "k: 1 names for the 2 classes of birds: expected one each"),
        (("a", " "), "k: class 1 has no name, so no prompt"),
        ("missing.txt", "k='missing.txt' can't be read"),
    ],
)
def test_classes_without_a_prompt_are_refused(given, message):
    with pytest.raises(UserError) as e:
        find_class_names(given, None, count=2, owner="birds", key="k")
    assert message in str(e.value)


def test_numbers_of_wordnet_are_no_names():
    ids = ("n01440764", "n01443537")
    with pytest.raises(UserError, match="names its classes by numbers of WordNet such as 'n0144"):
        find_class_names(None, ids, count=2, owner="imagenet2012", key="k")
    assert find_class_names(ids, None, count=2, owner="imagenet2012", key="k") == ids
