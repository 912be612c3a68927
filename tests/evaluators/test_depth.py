# SPDX-License-Identifier: Apache-2.0
"""Evaluation of depth: metrics of each image and their means, on any mesh."""

import dataclasses
import json

import cv2
import jax
import numpy as np
import pytest

from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.base import evaluate
from vit_jax.evaluators.depth import Depth
from vit_jax.evaluators.pixels import draw_examples
from vit_jax.models.variants import make_vit
from vit_jax.objectives.depth import make_depth
from vit_jax.parallel.mesh import make_mesh
from vit_jax.utils.errors import UserError

SIZES = {"patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
SPEC = DatasetSpec(
    name="digits_depth:16",
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
    # Some of the floor is too far to count.
    options = {"min_depth": 0.5, "max_depth": 5.5, "bins": 8}
    return make_depth(model=model, pixel_depth=True, image_shape=(16, 16, 3), **options)


@pytest.fixture(scope="module")
def params(objective):
    blank = {"image": np.zeros((1, 16, 16, 3), np.uint8)}
    return jax.jit(objective.init)(jax.random.key(0), blank)


def make(objective, devices=1, **options):
    mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
    return Depth(name="val", data=SPEC, objective=objective, mesh=mesh, **options)


def test_metrics_are_means_over_images_of_those_of_their_valid_pixels(objective, params, tmp_path):
    source = SPEC.open()
    images = np.stack([source[i]["image"] for i in range(len(source))])
    labels = np.stack([source[i]["label_map"] for i in range(len(source))]).astype(np.float64)
    predicted = np.asarray(jax.jit(objective.find_pixels)(params, images))[..., 0]
    rows = []
    for found, true in zip(predicted.astype(np.float64), labels, strict=True):
        valid = (true >= 0.5) & (true <= 5.5)
        assert 0 < valid.sum() < valid.size
        x, y = found[valid], true[valid]
        ratio = np.maximum(x / y, y / x)
        rows.append(
            {
                "rmse": np.sqrt(((x - y) ** 2).mean()),
                "abs_rel": (np.abs(x - y) / y).mean(),
                **{f"delta{i}": (ratio < 1.25**i).mean() for i in (1, 2, 3)},
            }
        )
    found = evaluate(make(objective), params, None, details=(tmp_path, 4))
    assert found["val/count"] == 13
    for name in rows[0]:
        expected = np.mean([row[name] for row in rows])
        np.testing.assert_allclose(found[f"val/{name}"], expected, rtol=1e-5)
    details = json.loads((tmp_path / "evals" / "val_4.json").read_text())
    scores = [row["rmse"] for row in details["images"]]
    assert scores == sorted(scores, reverse=True)
    assert details["pixel_depth"]["images"] == 13
    assert cv2.imread(str(tmp_path / "evals" / "val_4.png")).shape == (3 * 128, 13 * 128, 3)


def test_results_are_equal_on_any_mesh(objective, params):
    one, many = make(objective).run(params), make(objective, 8).run(params)
    assert one == pytest.approx(many, rel=1e-6)


def test_windows_flips_and_depths_of_their_own_size_are_options(objective, params):
    larger = dataclasses.replace(SPEC, preprocess="decode|resize_long(20)|pad_to(24)")
    evaluator = dataclasses.replace(
        make(objective), data=larger, window=16, stride=8, flip=True, label_size=(20, 18)
    )
    assert evaluator.data.blank()["label_map"].dtype == np.float32
    # Depths keep their own size, so as many pixels count as without the resizing.
    pixels = [e.summarize(_gather(e, params))[1] for e in (evaluator, make(objective))]
    assert pixels[0] == pixels[1]


def test_the_picture_has_images_of_any_aspect():
    def paint(label_map, predicted):
        return tuple(np.zeros((*x.shape, 3), np.uint8) for x in (label_map, predicted))

    examples = [
        (np.zeros((h, w, 3), np.uint8), np.ones((h, w)), np.ones((h, w)))
        for h, w in ((10, 40), (40, 10), (300, 200))
    ]
    picture = cv2.imdecode(np.frombuffer(draw_examples(examples, paint), np.uint8), 1)
    assert picture.shape == (3 * 128, 128 + 32 + 85, 3)
    assert (picture[32:128, :128] == 255).all()


def _gather(evaluator, params):
    def gather(params, batch):
        return evaluator.gather(params, batch)[0], batch["mask"]

    return [part for part, _ in evaluator.map_split(evaluator.jit(gather), params)]


def test_images_without_a_depth_do_not_count(objective, params):
    evaluator = make(objective)
    batch = {k: np.repeat(v[None], 2, axis=0) for k, v in SPEC.blank().items()}
    part, score, _ = jax.jit(evaluator.gather)(params, batch | {"mask": np.ones(2, np.float32)})
    assert np.isnan(score).all()
    # An error of 0 would be that of a perfect model.
    with pytest.raises(UserError, match=r"no pixel of test\[:13\] has a depth from 0.5 to 5.5 m"):
        evaluator.summarize([jax.tree.map(np.asarray, part)])


def test_data_without_depths_is_refused_in_one_line(objective):
    with pytest.raises(UserError, match="digits_masks:16 has no depth images"):
        dataclasses.replace(make(objective), data=dataclasses.replace(SPEC, name="digits_masks:16"))
