# SPDX-License-Identifier: Apache-2.0
"""Robustness sets, corruptions and trust, against plain numpy and scikit-learn."""

import dataclasses
import json

import cv2
import jax
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from vit_jax.data.classes import Classes
from vit_jax.data.ops.corruptions import Corrupt
from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.evaluators import metrics
from vit_jax.evaluators.corruptions import Corruptions
from vit_jax.evaluators.subset import Subset
from vit_jax.evaluators.trust import Trust, count_covered
from vit_jax.parallel.mesh import make_mesh
from vit_jax.utils.errors import UserError

RNG = np.random.default_rng(4)
PARAMS = RNG.normal(size=(192, 10)).astype(np.float32)
WNIDS = tuple(f"n{number:08d}" for number in range(10))
# Folders of three classes; sorted, they are labels 0, 1, 2, and 2, 5, 7 in the model.
OURS = (2, 5, 7)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Logits as a product of the pixels with the parameters."""

    classifies = True

    def predict(self, params, batch):
        pixels = batch["image"].reshape(len(batch["image"]), -1) / 255
        return {"logits": pixels @ params, "pre_logits": pixels}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Drawn images in folders, the pixels by class, and a second folder of other images."""
    folder = tmp_path_factory.mktemp("images")
    pixels = {}
    for label in OURS:
        (folder / "a" / WNIDS[label]).mkdir(parents=True)
        pixels[label] = RNG.integers(0, 256, (6, 8, 8, 3), np.uint8)
        for i, image in enumerate(pixels[label]):
            cv2.imwrite(f"{folder}/a/{WNIDS[label]}/{i}.png", image[..., ::-1])
    (folder / "other" / "x").mkdir(parents=True)
    for i in range(12):
        image = np.full((8, 8, 3), 20 * i, np.uint8)
        cv2.imwrite(f"{folder}/other/x/{i}.png", image)
    return folder, pixels


def make(kind, folder, **options):
    data = DatasetSpec(f"folder:{folder}", "all", "decode|resize(8)", 8, None, "evals.val")
    mesh = make_mesh(devices=jax.devices()[:2])
    return kind(name="val", data=data, objective=Linear(), mesh=mesh, **options)


def logits_of(pixels):
    flat = pixels.reshape(len(pixels), -1).astype(np.float64) / 255
    return flat @ PARAMS.astype(np.float64)


def test_the_most_likely_class_is_searched_for_among_those_of_the_data(images):
    folder, pixels = images
    evaluator, note = make(Subset, folder / "a").match(Classes(10, WNIDS, "weights"), key="k")
    assert "3 classes are 3 of 10 in weights" in note
    hits = [np.array(OURS)[logits_of(x)[:, OURS].argmax(1)] == label for label, x in pixels.items()]
    results = evaluator.run(PARAMS)
    assert results["count"] == 18
    np.testing.assert_allclose(results["top1"], np.mean(hits))
    assert "top5" not in results  # 3 classes


def test_a_map_gives_the_classes_of_the_model_by_number_or_name(images, tmp_path):
    folder, pixels = images
    path = tmp_path / "map.json"
    path.write_text(json.dumps({WNIDS[2]: [2, 9], WNIDS[5]: 5, WNIDS[7]: [7]}))
    evaluator, _ = make(Subset, folder / "a", class_map=str(path)).match(
        Classes(10, None, "weights"), key="k"
    )
    hits = []
    for place, label in enumerate(OURS):
        z = logits_of(pixels[label])
        scores = np.stack([z[:, [2, 9]].max(1), z[:, 5], z[:, 7]], 1)
        hits.append(scores.argmax(1) == place)
    np.testing.assert_allclose(evaluator.run(PARAMS)["top1"], np.mean(hits))

    names = tmp_path / "names.txt"
    names.write_text("\n".join(WNIDS))
    by_names, _ = make(Subset, folder / "a", class_map=str(names)).match(
        Classes(10, None, "weights"), key="k"
    )
    np.testing.assert_array_equal(by_names._groups, [[2], [5], [7]])


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ({WNIDS[2]: 2}, "lacks 'n00000005' and 1 more"),
        ({WNIDS[2]: 2, WNIDS[5]: 10, WNIDS[7]: 7}, "'n00000005' is 10: expected 0 to 9"),
        ({WNIDS[2]: 2, WNIDS[5]: "cat", WNIDS[7]: 7}, "is 'cat', which is no class"),
        ({WNIDS[2]: 2, WNIDS[5]: 2, WNIDS[7]: 7}, "are both class 2"),
        ({WNIDS[2]: 2, WNIDS[5]: [], WNIDS[7]: 7}, "has no classes"),
        ([1, 2], "expected an object"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_in_a_line(images, tmp_path, content, want):
    path = tmp_path / "map.json"
    path.write_text(json.dumps(content))
    evaluator = make(Subset, images[0] / "a", class_map=str(path))
    with pytest.raises(UserError, match=want) as error:
        evaluator.match(Classes(10, WNIDS, "weights"), key="k")
    assert "\n" not in str(error.value)


def test_classes_that_the_weights_lack_are_refused(images):
    with pytest.raises(UserError, match=r"lacks 'n00000005'.*evals\.val\.class_map"):
        make(Subset, images[0] / "a").match(Classes(5, WNIDS[:5], "weights"), key="evals.val")


def test_corruptions_are_those_of_the_position_in_the_split(images):
    folder, _ = images
    options = {"kinds": ("gaussian_noise", "contrast"), "severities": (1, 5)}
    evaluator = make(Corruptions, folder / "a", baseline="alexnet", **options)
    evaluator, _ = evaluator.match(Classes(10, WNIDS, "weights"), key="k")
    results = evaluator.run(PARAMS)
    assert results == evaluator.run(PARAMS)
    line = evaluator._corrupted("contrast", 5)
    batches = list(eval_batches(line))
    clean = list(eval_batches(evaluator.data))
    hits = []
    for got, was in zip(batches, clean, strict=True):
        seen = got["mask"] > 0
        for image, before in zip(got["image"][seen], was["image"][seen], strict=True):
            op = Corrupt("contrast", 5)
            np.testing.assert_array_equal(image, op.change(before, np.random.default_rng(0)))
        hits += list(logits_of(got["image"][seen]).argmax(1) == got["label"][seen])
    one = make(Corruptions, folder / "a", kinds=("contrast",), severities=(5,))
    one, _ = one.match(Classes(10, WNIDS, "weights"), key="k")
    assert one.run(PARAMS)["top1"] == np.mean(hits)
    errors = {kind: 1 - results[f"{kind}_top1"] for kind in options["kinds"]}
    want = 100 * np.mean([errors["gaussian_noise"] / 0.886, errors["contrast"] / 0.853])
    np.testing.assert_allclose(results["mce"], want)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"kinds": ("gausian_noise",)}, "unknown corruption 'gausian_noise'.*gaussian_noise"),
        ({"kinds": ("frost",)}, "needs photographs"),
        ({"severities": (0,)}, "severities=.*some of 1 to 5"),
        ({"baseline": "nowhere.json"}, "expected 'alexnet' or a JSON file"),
    ],
)
def test_corruptions_that_are_not_there_are_refused(images, options, want):
    with pytest.raises(UserError, match=want):
        make(Corruptions, images[0] / "a", **options)


def test_trust_is_measured_as_in_numpy(images, tmp_path):
    folder, pixels = images
    table = tmp_path / "groups.csv"
    rows = [f"{WNIDS[label]}/{i}.png,{'even' if i % 2 == 0 else 'odd'}" for label in OURS
            for i in range(6)]  # fmt: skip
    table.write_text("\n".join(["image,place", *rows]))
    evaluator = make(
        Trust, folder / "a", groups=f"{table}:place", outlier_data=f"folder:{folder}/other",
        outlier_split="all", train_split="train", k=3, coverages=(0.5,),
    )  # fmt: skip
    evaluator, _ = evaluator.match(Classes(10, WNIDS, "weights"), key="k")
    evaluator.open()
    results = evaluator.run(PARAMS)
    z = np.concatenate([logits_of(x) for x in pixels.values()])
    labels = np.repeat(OURS, 6)
    hits = z.argmax(1) == labels
    even = np.tile([True, False], 9)
    assert results["group_even_top1"] == hits[even].mean()
    assert results["worst_group_top1"] == min(hits[even].mean(), hits[~even].mean())
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    order = np.argsort(-p.max(1))
    np.testing.assert_allclose(results["top1_at_50"], hits[order][:9].mean())
    flat = np.stack([np.full((8, 8, 3), 20 * i, np.uint8) for i in range(12)])
    other = logits_of(flat)
    inside = np.r_[np.ones(18), np.zeros(12)]
    for name, score in (
        ("max_logit", lambda x: x.max(1)),
        ("energy", lambda x: np.log(np.exp(x).sum(1))),
    ):
        scores = np.r_[score(z), score(other)]
        np.testing.assert_allclose(results[f"{name}_auroc"], roc_auc_score(inside, scores))
    assert 0 <= results["knn_auroc"] <= 1
    assert set(evaluator.metrics) <= set(results) | {"top5"}

    def loss(temperature):
        scaled = z / temperature
        total = np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(18), labels]
        return total.mean()

    best = results["temperature"]
    np.testing.assert_allclose(results["scaled_loss"], loss(best), rtol=1e-5)
    assert loss(best) <= min(map(loss, np.geomspace(0.01, 100, 200))) + 1e-9


def test_an_image_without_a_group_is_named(images, tmp_path):
    table = tmp_path / "groups.csv"
    table.write_text("image,place\nn00000002/0.png,a\n")
    for groups, want in (
        (f"{table}:place", "has no row for"),
        (f"{table}:town", "expected 'town'"),
        ("missing.csv:place", "can't be read"),
    ):
        with pytest.raises(UserError, match=want):
            make(Trust, images[0] / "a", groups=groups).open()


def test_risk_falls_with_coverage_of_ties_in_no_order():
    confidence = np.array([0.9, 0.8, 0.8, 0.1])
    hits = np.array([1, 1, 0, 0])
    np.testing.assert_allclose(metrics.risks(confidence, hits), [0, 0.25, 1 / 3, 0.5])
    np.testing.assert_allclose(metrics.area_under_risk(confidence, hits), (0.25 + 1 / 3 + 0.5) / 4)


def test_a_share_of_images_is_counted_as_written():
    cases = [(0.55, 100, 55), (0.07, 100, 7), (0.56, 25, 14), (0.5, 9, 5), (0.001, 10, 1)]
    assert [count_covered(share, count) for share, count, _ in cases] == [n for *_, n in cases]


def test_the_temperature_of_scaled_logits_is_their_scale():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (4000, 5))
    gumbel = -np.log(-np.log(rng.random(z.shape)))
    labels = (z + gumbel).argmax(1)  # Drawn from softmax(z).
    one = metrics.fit_temperature(z, labels)
    np.testing.assert_allclose(one, 1, rtol=0.06)
    np.testing.assert_allclose(metrics.fit_temperature(3 * z, labels), 3 * one, rtol=1e-5)
    # Without a wrong one, lower is always better, also where float32 has no smaller number.
    least = metrics.fit_temperature(np.float32([[9, 0], [0, 8]]), np.array([0, 1]))
    np.testing.assert_allclose(least, metrics.TEMPERATURES[0], rtol=1e-3)
