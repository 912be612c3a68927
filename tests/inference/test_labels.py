# SPDX-License-Identifier: Apache-2.0
"""A model of images and texts classifies by labels that are given as texts."""

import numpy as np
import pytest

from tests.trained import write_images, write_model, write_towers
from vit_jax.inference.model import load_model
from vit_jax.utils.errors import UserError

LABELS = ["a cat", "a dog", "Zürich, at night"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_towers(tmp_path_factory.mktemp("towers") / "towers.npz"))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)


def expected_logits(model, images, prompts_of):
    """By the embeddings, in float64: `prompts_of` has the prompts of each class."""
    zimg = model.image_embed(images).astype(np.float64)
    vectors = [model.text_embed(prompts).astype(np.float64).mean(0) for prompts in prompts_of]
    vectors = np.stack([v / np.linalg.norm(v) for v in vectors])
    return np.exp(2.0) * zimg @ vectors.T - 1.0


def test_classes_are_those_of_the_most_similar_texts(model, images):
    assert model.loss == "sigmoid"  # For it has a bias.
    found = model(images, labels=LABELS)
    logits = expected_logits(model, images, [[label] for label in LABELS])
    np.testing.assert_allclose(found.logits, logits, atol=1e-4)
    np.testing.assert_allclose(found.probabilities, 1 / (1 + np.exp(-logits)), atol=1e-5)
    assert found.top(1)[:, 0].tolist() == logits.argmax(axis=1).tolist()


def test_prompts_of_several_templates_are_averaged(model, images, tmp_path):
    templates = ("a photo of {}", "{}, again")
    prompts = [[t.replace("{}", label) for t in templates] for label in LABELS[:2]]
    logits = expected_logits(model, images, prompts)
    found = model(images, labels=LABELS[:2], templates=templates)
    np.testing.assert_allclose(found.logits, logits, atol=1e-4)
    (tmp_path / "templates.txt").write_text("\n".join(templates))
    by_file = model(images, labels=LABELS[:2], templates=str(tmp_path / "templates.txt"))
    np.testing.assert_array_equal(by_file.logits, found.logits)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("", r"^text is empty: expected a text$"),
        (" \t\n", r"^text is empty"),
        ("a\x1b[31mcat", r"^text, 'a.*cat', has line breaks or control characters"),
        ("two\nlines", "has line breaks"),
        ("a cat\x00", "control characters"),
        (["a cat", ""], r"^text 2 is empty"),
        (("a cat", "a\u202edog"), r"^text 2, .* control characters"),
        ("dog " * 300_000, r"^text, 'dog .*\.\.\.' \(1,199,999 .* at most 1,000 characters$"),
    ],
    ids=["empty", "blank", "escape", "lines", "zero", "list", "tuple", "megabyte"],
)
def test_texts_to_embed_follow_the_rule_of_labels(model, texts, message):
    with pytest.raises(UserError, match=message):
        model.text_embed(texts)


def test_white_space_around_a_text_and_its_unicode_form_do_not_count(model):
    found = model.text_embed(["Zürich", " Zu\u0308rich\n"])
    np.testing.assert_array_equal(found[0], found[1])


def test_mirror_images_average_the_logits(model, images):
    both = model(images, labels=LABELS).logits + model(images[:, :, ::-1], labels=LABELS).logits
    np.testing.assert_allclose(model(images, labels=LABELS, tta="flip").logits, both / 2, atol=1e-5)


def test_files_have_names_and_labels_are_embedded_once(model, tmp_path):
    paths = write_images(tmp_path / "photos", 2)
    classes = model.embed_labels(LABELS)
    found = model(tmp_path / "photos", labels=classes)
    assert [image.path for image in found] == [str(path) for path in paths]
    assert {name for name, _ in found[0].top(3)} == set(LABELS)
    one = model(paths[0], labels=LABELS)
    np.testing.assert_allclose(one.logits, found[0].logits, atol=1e-5)
    with pytest.raises(UserError, match="templates: the labels are embedded already"):
        model(paths[0], labels=classes, templates="photo")


def test_one_label_is_enough_for_a_sigmoid_only(model, images):
    one = model(images, labels=["a cat"]).probabilities
    two = model(images, labels=["a cat", "a dog"]).probabilities
    np.testing.assert_allclose(one[:, 0], two[:, 0], atol=1e-6)
    shares = load_model(model.source, loss="softmax")
    with pytest.raises(UserError, match="labels: 'a cat' is the only one: expected at least two"):
        shares(images, labels=["a cat"])


def test_the_embedding_is_a_layer(model, images):
    assert "image_embed" in model.layers
    np.testing.assert_allclose(
        model.features(images, "image_embed"), model.image_embed(images), atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.norm(model.image_embed(images), axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ("a cat", None, "labels: 'a cat': expected a list of texts"),
        (3, None, "labels: 3: expected a list of texts"),
        (["a cat", 3], None, r"labels: \['a cat', 3\]: expected a list of texts"),
        ([], None, "labels: there are none"),
        (["a cat", " "], None, "labels: text 2 is empty"),
        (["a cat", "a dog", "a cat "], None, "labels: 'a cat' is given twice"),
        (["caf\u00e9", "cafe\u0301"], None, "is given twice"),
        (["a\x1b[31mcat", "b"], None, r"text 1, 'a\\x1b\[31mcat', has line breaks or control"),
        (["a\ncat", "b"], None, r"text 1, 'a\\ncat', has line breaks"),
        (["a cat", "x" * 24], None, "has more tokens than the 24 that the model reads"),
        (
            ["a cat", "x" * 10**6],
            None,
            r"'x{60}\.\.\.' \(1,000,000 characters\): expected",
        ),
        (["a cat", "b"], "a photo of the animal {}", "'a photo of the animal a cat' has more tok"),
        (["a cat", "b"], "photoss", "templates='photoss': expected a file, .* did you mean"),
        (["a cat", "b"], "none.txt", "templates='none.txt' can't be read"),
        (["a cat", "b"], 3, "templates=3: expected a text or several"),
        (["a cat", "b"], ["a {}", 3], r"templates=\['a {}', 3\]: expected a text or several"),
        (None, "photo", "templates='photo': expected labels"),
        (None, None, "has no classes of its own: expected labels"),
    ],
)
def test_wrong_labels_are_refused(labels, templates, message, model, images):
    with pytest.raises(UserError, match=message):
        model(images, labels=labels, templates=templates)


def test_texts_with_the_same_tokens_are_refused(tmp_path, images):
    """A tokenizer in lower case does not distinguish them."""
    model = load_model(
        write_towers(tmp_path / "towers.npz"), tokenizer="bytes(length=24, clean='lower')"
    )
    with pytest.raises(UserError, match="'A cat' and 'a cat' have the same tokens"):
        model(images, labels=["A cat", "b", "a cat"])


def test_a_classifier_takes_no_labels(tmp_path, images):
    model = load_model(write_model(tmp_path / "vit.npz"))
    with pytest.raises(UserError, match=r"labels: .*vit.npz: it has no text tower"):
        model(images, labels=LABELS)
