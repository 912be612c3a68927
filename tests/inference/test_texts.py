# SPDX-License-Identifier: Apache-2.0
"""A loaded model of images and texts embeds both."""

import numpy as np
import pytest

from tests.checkpoint.pretrained.test_image_text import put, read_io
from tests.trained import write_towers
from vit_jax.inference.model import load_model
from vit_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return put(tmp_path_factory.mktemp("siglip"), "siglip_bv")


@pytest.fixture(scope="module")
def loaded(siglip):
    return load_model(siglip)


def test_texts_are_embedded_as_in_the_program_of_the_file(loaded):
    io = read_io("siglip_bv")
    np.testing.assert_allclose(loaded.text_embed(io["text"]), io["ztxt"], atol=1e-5)
    np.testing.assert_allclose(loaded.text_embed(io["text"][:1]), io["ztxt"][:1], atol=1e-5)
    np.testing.assert_allclose(loaded.texts.scale, io["t"][0], rtol=1e-6)
    np.testing.assert_allclose(loaded.texts.bias, io["b"][0], rtol=1e-6)


def test_images_are_embedded_as_unit_vectors_of_their_features(loaded):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    features = loaded.features(images)
    want = features / np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(loaded.image_embed(images), want, atol=1e-6)


def test_all_parameters_are_listed(loaded, siglip):
    with np.load(siglip) as file:
        assert sum(x.size for x in loaded.list_params().values()) == sum(
            file[key].size for key in file.files
        )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a dog", "the tokenizer of these weights is not known"),
        ([], "there are no texts"),
        (
            np.zeros((2, 5), int),
            r"texts are int64 \[2, 5\]: expected texts, or tokens",
        ),
        (np.full((1, 8), 97), "tokens are 97 to 97: expected 0 to 96"),
    ],
    ids=["unknown", "none", "length", "vocabulary"],
)
def test_wrong_texts_are_refused(texts, message, loaded):
    with pytest.raises(UserError, match=message):
        loaded.text_embed(texts)


def test_a_tokenizer_of_another_model_is_refused(siglip):
    with pytest.raises(UserError, match="of a vocabulary of 259; the model takes 8 of 97"):
        load_model(siglip, tokenizer="bytes(length=8)")


def test_it_has_no_classes(loaded):
    assert not loaded.classifies
    with pytest.raises(UserError, match=r"has no classes of its own: expected labels"):
        loaded(np.zeros((1, 32, 32, 3), np.uint8))


def test_one_tower_of_a_file_of_this_package_is_taken_alone(tmp_path):
    file = write_towers(tmp_path / "towers.npz")
    whole, image = load_model(file), load_model(f"{file}:img")
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_allclose(image.features(images, "logits"), whole.features(images, "logits"))
    assert (image.pixel_mean, image.preparation.line) == (0.4, "decode|resize(8, 8)")
    with pytest.raises(UserError, match="these weights are of a text tower alone"):
        load_model(f"{file}:txt")


def test_one_tower_alone_has_no_texts(siglip):
    images = load_model(f"{siglip}:img")
    with pytest.raises(UserError, match="it has no text tower"):
        images.text_embed("a dog")
    with pytest.raises(UserError, match=r"tokenizer='bytes\(length=8\)': .* has no text tower"):
        load_model(f"{siglip}:img", tokenizer="bytes(length=8)")
    with pytest.raises(UserError, match="of a text tower alone"):
        load_model(f"{siglip}:txt")
