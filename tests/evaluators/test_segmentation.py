# SPDX-License-Identifier: Apache-2.0
"""Evaluation of segmentation: exact sums over all images, on any mesh."""

import dataclasses
import json

import cv2
import jax
import numpy as np
import pytest

from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.base import evaluate
from vit_jax.evaluators.segmentation import Segmentation, class_iou, describe_confusion
from vit_jax.models.variants import make_vit
from vit_jax.objectives.segmentation import make_segmentation
from vit_jax.parallel.mesh import make_mesh
from vit_jax.utils.errors import UserError

SIZES = {"patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
SPEC = DatasetSpec(
    name="digits_masks:16",
    split="test[:13]",
    preprocess="decode",
    batch_size=8,
    data_dir=None,
    key="evals.val",
    num_threads=0,
)


@pytest.fixture(scope="module")
def objective():
    model = make_vit(num_classes=0, **SIZES)
    classes = SPEC.info.pixel_classes
    return make_segmentation(model=model, pixel_classes=classes, image_shape=(16, 16, 3))


@pytest.fixture(scope="module")
def params(objective):
    blank = {"image": np.zeros((1, 16, 16, 3), np.uint8)}
    given = jax.jit(objective.init)(jax.random.key(0), blank)
    # Such that several classes are predicted.
    head = given["segmenter"]["classifier"]
    return given | {
        "segmenter": given["segmenter"] | {"classifier": head | {"kernel": head["kernel"] * 100}}
    }


def make(objective, devices=1, **options):
    mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
    return Segmentation(name="val", data=SPEC, objective=objective, mesh=mesh, **options)


def confuse(labels, predicted, count):
    """The number of pixels by label and prediction, one by one."""
    confusion = np.zeros((count, count), np.int64)
    for label, one in zip(labels.ravel(), predicted.ravel(), strict=True):
        if label != 255:
            confusion[label, one] += 1
    return confusion


def test_metrics_are_those_of_the_pixels_of_all_images(objective, params, tmp_path):
    source = SPEC.open()
    images = np.stack([source[i]["image"] for i in range(len(source))])
    labels = np.stack([source[i]["label_map"] for i in range(len(source))])
    predicted = np.asarray(jax.jit(objective.find_pixels)(params, images).argmax(-1))
    confusion = confuse(labels, predicted, 11)
    hits = np.diag(confusion).astype(float)
    unions = confusion.sum(0) + confusion.sum(1) - hits
    iou = hits[unions > 0] / unions[unions > 0]
    expected = {"val/miou": iou.mean(), "val/pixel_accuracy": hits.sum() / confusion.sum()}
    found = evaluate(make(objective), params, None, details=(tmp_path, 4))
    assert found["val/count"] == 13
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12)
    details = json.loads((tmp_path / "evals" / "val_4.json").read_text())
    np.testing.assert_array_equal(details["confusion"], confusion)
    assert [row["name"] for row in details["pixel_classes"][:2]] == ["background", "zero"]
    scores = [row["miou"] for row in details["images"]]
    assert scores == sorted(scores)
    one = np.nanmean(class_iou(np.stack([confuse(labels[3], predicted[3], 11)])))
    listed = {row["image"]: row["miou"] for row in details["images"]}
    np.testing.assert_allclose(listed[source.describe(3)], one, rtol=1e-6)
    picture = cv2.imread(str(tmp_path / "evals" / "val_4.png"))
    assert picture.shape == (3 * 128, 13 * 128, 3)


def test_results_are_equal_on_any_mesh(objective, params):
    one, many = make(objective).run(params), make(objective, 8).run(params)
    assert one == many


def test_windows_and_flips_are_options(objective, params):
    larger = dataclasses.replace(SPEC, preprocess="decode|resize(24)")
    evaluator = dataclasses.replace(make(objective), data=larger, window=16, stride=8, flip=True)
    assert 0 <= evaluator.run(params)["miou"] <= 1


def test_masks_of_their_own_size_give_equal_results_where_images_keep_theirs(objective, params):
    own = dataclasses.replace(make(objective), label_size=(20, 18))
    np.testing.assert_allclose(own.run(params)["miou"], make(objective).run(params)["miou"])
    smaller = dataclasses.replace(SPEC, preprocess="decode|resize_long(12)|pad_to(16)")
    padded = dataclasses.replace(own, data=smaller)
    batch = padded.data.blank()
    assert batch["label_map"].shape == (20, 18)
    assert padded.run(params)["count"] == 13


def test_a_class_that_is_nowhere_does_not_count():
    confusion = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    np.testing.assert_allclose(class_iou(confusion), [3 / 6, 4 / 7, np.nan])
    found = describe_confusion(confusion)
    np.testing.assert_allclose(found["miou"], (3 / 6 + 4 / 7) / 2)
    np.testing.assert_allclose(found["pixel_accuracy"], 7 / 10)
    np.testing.assert_allclose(found["mean_class_accuracy"], (3 / 4 + 4 / 6) / 2)
    assert set(describe_confusion(0 * confusion).values()) == {0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "evals.val.window=0: expected pixels, or None"),
        ({"stride": 4}, r"evals.val.stride=4: expected 1 to evals.val.window=None"),
        ({"window": 10}, "10"),
        ({"data": dataclasses.replace(SPEC, preprocess="decode|resize(18)")}, "18"),
        ({"data": dataclasses.replace(SPEC, preprocess="decode|keep('image')")}, "label_map"),
        ({"label_size": (0, 4)}, r"label_size=\(0, 4\): expected \(height, width\)"),
        (
            {"label_size": (9, 9), "data": dataclasses.replace(SPEC, preprocess="decode|flip_lr")},
            "expected operations that resize and pad",
        ),
        ({"data": dataclasses.replace(SPEC, name="blank:3,16", split="train")}, "no classes"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(objective, options, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(make(objective), **options)


def test_relative_positions_are_of_one_grid(objective):
    model = make_vit(num_classes=0, position_embedding="relative", **SIZES)
    evaluator = make(dataclasses.replace(objective, model=model))
    assert dataclasses.replace(evaluator, window=16)
    larger = dataclasses.replace(SPEC, preprocess="decode|resize(24)")
    assert dataclasses.replace(evaluator, data=larger, window=16)
    for options, grid in (({"window": 8}, "2x2"), ({"data": larger}, "6x6")):
        message = f"has biases for 4x4 patches, and .* pixels have {grid}: expected 16x16 pixels"
        with pytest.raises(UserError, match=message):
            dataclasses.replace(evaluator, **options)
