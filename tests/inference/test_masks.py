# SPDX-License-Identifier: Apache-2.0
"""Masks that a model predicts: from Python, and as files."""

import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.trained import write_images
from vit_jax import predict, report
from vit_jax.inference.masks import find_classes
from vit_jax.inference.model import load_model
from vit_jax.objectives.dense import resize_to_masks
from vit_jax.utils.errors import UserError
from vit_jax.utils.palette import make_palette


@pytest.fixture(scope="module")
def model(segment_run):
    return load_model(segment_run)


def test_a_mask_has_the_size_of_its_image(model, tmp_path):
    path = tmp_path / "wide.png"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    mask = model(str(path))
    logits = np.asarray(model.start_pixels(np.repeat(model.preprocess(path)[None], 8, axis=0)))
    np.testing.assert_array_equal(mask.classes, find_classes(logits[0], (16, 16), (20, 30)))
    assert mask.path == str(path)
    assert mask.shares.sum() == pytest.approx(1)
    assert mask.top(1)[0][0] == model.segmentation.classes[np.argmax(mask.shares)]
    assert mask.overlay().size == (30, 20)
    mask.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as saved:
        assert saved.mode == "P"
        np.testing.assert_array_equal(saved, mask.classes)
        np.testing.assert_array_equal(saved.convert("RGB"), make_palette()[mask.classes])


def test_prepared_images_give_the_classes_of_the_evaluation(model):
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    params = {**model.params, "segmenter": model.dense_head}
    expected = jax.jit(model.segmentation.find_pixels)(params, images).argmax(-1)
    found = model(images)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 1


def test_larger_images_give_the_logits_of_the_evaluation(segment_run, model):
    larger = load_model(segment_run, preprocess="decode|resize(24)")
    images = np.random.default_rng(2).integers(0, 256, (8, 24, 24, 3), np.uint8)
    params = {**model.params, "segmenter": model.dense_head}
    # The objective is that of a run, whose position embeddings are those of 16x16 pixels.
    expected = jax.jit(model.dense.find_outputs)(params, images)
    np.testing.assert_allclose(larger.pixel_outputs(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(11, 17), (3, 4), (9, 2)])
def test_classes_are_those_of_bilinear_logits(size):
    logits = np.random.default_rng(0).normal(size=(8, 10, 3)).astype(np.float32)
    resized = jax.image.resize(logits, (*size, 3), "bilinear", antialias=False)
    np.testing.assert_array_equal(find_classes(logits, size), np.argmax(resized, axis=-1))


def test_masks_with_mirror_images_are_those_of_the_evaluator(model, tmp_path):
    # The mask has the size of the image, which the model sees at 16x16.
    pixels = np.random.default_rng(4).integers(0, 256, (9, 13, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    found = model(str(tmp_path / "one.png"), tta="flip").classes
    extent = np.array([[0, 0, 16, 16, 9, 13]], np.int32)
    resize = functools.partial(resize_to_masks, extent=extent, size=(9, 13))
    find = functools.partial(model.segmentation.find_pixels, flip=True, resize=resize)
    params = {**model.params, "segmenter": model.dense_head}
    expected = jax.jit(find)(params, model.preprocess(tmp_path / "one.png")[None])
    np.testing.assert_array_equal(found, expected[0].argmax(axis=-1))


def test_the_command_writes_shares_masks_and_overlays(segment_run, tmp_path):
    write_images(tmp_path / "images", 2, size=12)
    write_images(tmp_path / "images" / "more", 1, size=10)
    output, masks = tmp_path / "shares.jsonl", tmp_path / "masks"
    arguments = [f"--workdir={segment_run}", f"--output={output}", f"--masks={masks}", "--top_k=2"]
    assert predict.main([*arguments, str(tmp_path / "images")]) == 0
    names = sorted(path.name for path in masks.iterdir())
    assert names == sorted(
        f"{stem}{end}" for stem in ("00", "00_2", "01") for end in (".png", "_overlay.jpg")
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [list(row["predictions"][0]) for row in rows] == [["label", "class", "share"]] * 3
    with Image.open(masks / "00.png") as mask:
        counts = np.bincount(np.asarray(mask).ravel(), minlength=11)
    best = rows[0]["predictions"][0]
    assert best["share"] == pytest.approx(counts.max() / counts.sum(), abs=1e-6)
    assert best["label"] == counts.argmax()
    with pytest.raises(UserError, match=r"--masks=.* exists"):
        predict.main([*arguments[:1], f"--masks={masks}", str(tmp_path / "images")])


def test_no_folder_is_made_where_no_image_can_be_read(segment_run, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    masks = tmp_path / "masks"
    with pytest.raises(UserError, match="none of 1 images can be read"):
        predict.main([f"--workdir={segment_run}", f"--masks={masks}", str(tmp_path / "broken.png")])
    assert not masks.exists()


def test_the_table_has_no_classes_that_a_mask_lacks(segment_run, tmp_path, capsys):
    write_images(tmp_path / "images", 1, size=12)
    masks = tmp_path / "masks"
    arguments = [
        f"--workdir={segment_run}",
        "--top_k=11",
        f"--masks={masks}",
        str(tmp_path / "images"),
    ]
    assert predict.main(arguments) == 0
    output = capsys.readouterr()
    assert " 0.0%" not in output.out
    assert "1 mask, as PNG, and its overlay" in output.out + output.err


def test_the_report_leaves_pictures_to_the_evaluators(segment_run, capsys):
    report.main([f"--workdir={segment_run}"])
    assert "without pictures" not in "".join(capsys.readouterr())


def test_a_model_of_pixels_has_no_classes_of_images(model):
    with pytest.raises(UserError, match="finds the class of each pixel, and has no classes of"):
        model.check_classifies()
    assert model.features(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 16)
