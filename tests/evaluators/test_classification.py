# SPDX-License-Identifier: Apache-2.0
"""Metrics of a split, against plain numpy and scikit-learn over the same split."""

import csv
import dataclasses
import itertools
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    log_loss,
    recall_score,
    top_k_accuracy_score,
)

from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.data.sources.tfds import TfdsSource
from vit_jax.evaluators.classification import Classification
from vit_jax.evaluators.metrics import accuracy_by_class, average_precisions
from vit_jax.parallel.mesh import make_mesh
from vit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Linear:
    """Logits as a product of the pixels with the parameters."""

    dtype: str = "float32"
    classifies = True

    def predict(self, params, batch):
        pixels = batch["image"].reshape(len(batch["image"]), -1) / 255
        return {"logits": (pixels @ params).astype(self.dtype)}


PARAMS = np.random.default_rng(4).normal(size=(192, 10)).astype(np.float32)


def evaluator(data_dir, *, batch_size=16, name="digits", split="test[:50]", real=None, **mesh):
    data = DatasetSpec(name, split, "decode|resize(8)", batch_size, data_dir, "evals.val")
    mesh = make_mesh(**mesh)
    return Classification(name="val", data=data, objective=Linear(), mesh=mesh, real_json=real)


def batch_sums(params, batch, *, objective):
    mesh = make_mesh(devices=jax.devices()[:1])
    evaluation = Classification(name="val", data=None, objective=objective, mesh=mesh)
    return evaluation.sum_batch(params, batch)[0]


@pytest.fixture(scope="module")
def want(data_dir):
    """What the linear model scores on the first 50 test images."""
    records = list(tfds.data_source("digits", split="test[:50]", data_dir=data_dir))
    images = np.stack([r["image"] for r in records]).astype(np.float64) / 255
    labels = np.array([r["label"] for r in records])
    logits = images.repeat(3, axis=-1).reshape(50, -1) @ PARAMS.astype(np.float64)
    scores = np.exp(logits - logits.max(1, keepdims=True))
    losses = -np.log((scores / scores.sum(1, keepdims=True))[np.arange(50), labels])
    right = logits.argmax(1) == labels
    # Batches are filled up with the first example: counted, it would change both means.
    assert right[0]
    assert right.mean() < 0.5
    probabilities = scores / scores.sum(1, keepdims=True)
    confidence, edges = probabilities.max(1), np.linspace(0, 1, 16)
    gaps = []
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gaps.append(inside.sum() * abs(right[inside].mean() - confidence[inside].mean()))
    return {
        "top1": right.sum() / 50,
        "top5": top_k_accuracy_score(labels, probabilities, k=5, labels=range(10)),
        "loss": log_loss(labels, probabilities, labels=range(10)),  # NLL
        "ece": sum(gaps) / 50,
        "mean_per_class": balanced_accuracy_score(labels, logits.argmax(1)),
        "count": 50,
        "confusion": confusion_matrix(labels, logits.argmax(1)),
        "recalls": recall_score(labels, logits.argmax(1), average=None),
    } | {"nll": losses.mean()}


def assert_results(got, want):
    """The same numbers, those that are ratios of counts to the last bit."""
    assert got.keys() == {"top1", "top5", "loss", "ece", "mean_per_class", "count"}
    assert (got["top1"], got["top5"], got["count"]) == (want["top1"], want["top5"], 50)
    assert isinstance(got["count"], int)
    for metric in ("loss", "ece", "mean_per_class"):
        np.testing.assert_allclose(got[metric], want[metric], rtol=2e-6, err_msg=metric)
    np.testing.assert_allclose(want["nll"], want["loss"])


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [8, 16, 64])
def test_results_are_those_of_the_split_on_any_mesh(batch_size, devices, data_dir, want):
    got = evaluator(data_dir, batch_size=batch_size, devices=jax.devices()[:devices]).run(PARAMS)
    assert_results(got, want)


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 8}, {"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_axes_of_the_mesh_do_not_change_results(mesh, data_dir, want):
    got = evaluator(data_dir, **{"data": 1} | mesh).run(PARAMS)
    assert_results(got, want)


def test_all_batches_share_one_compiled_function(data_dir):
    evaluation = evaluator(data_dir)
    for _ in range(2):
        evaluation.run(PARAMS)
    assert evaluation.sum_batch._cache_size() == 1


def test_padding_never_counts():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    logits = Linear().predict(PARAMS, {"image": images})["logits"]
    batch = {
        "image": images,
        "label": np.argmax(logits, axis=1).astype(np.int32),  # all right, padding too
        "mask": np.array([1, 1, 0, 1, 0, 0], np.float32),
    }
    sums = batch_sums(PARAMS, batch, objective=Linear())
    assert (float(sums["top1"]), float(sums["count"])) == (3, 3)
    kept = [0, 1, 3]
    short = {k: v[kept] for k, v in batch.items()}
    alone = batch_sums(PARAMS, short, objective=Linear())
    np.testing.assert_allclose(sums["loss"], alone["loss"], rtol=1e-6)
    nothing = batch | {"mask": np.zeros(6, np.float32)}
    empty = batch_sums(PARAMS, nothing, objective=Linear())
    assert all(not np.any(v) for v in empty.values())


def test_with_several_labels_any_of_them_is_a_hit():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    logits = np.asarray(Linear().predict(PARAMS, {"image": images})["logits"], np.float64)
    best = logits.argmax(1)
    labels = np.zeros((4, 10), np.float32)
    labels[0, [best[0], (best[0] + 1) % 10]] = 1
    labels[1, (best[1] + 1) % 10] = 1  # not the best; the third has none, the last is padding
    labels[3, best[3]] = 1
    batch = {"image": images, "label": labels, "mask": np.array([1, 1, 1, 0], np.float32)}
    sums = batch_sums(PARAMS, batch, objective=Linear())
    assert (float(sums["top1"]), float(sums["count"])) == (1, 3)
    losses = np.logaddexp(0, -logits) * labels + np.logaddexp(0, logits) * (1 - labels)
    np.testing.assert_allclose(sums["loss"], losses[:3].sum(), rtol=1e-5)


def test_sums_are_float32_whatever_the_model_computes_in():
    batch = {
        "image": jnp.full((4, 8, 8, 3), 200, jnp.uint8),
        "label": jnp.arange(4),
        "mask": jnp.ones(4),
    }
    objective = Linear(dtype="bfloat16")
    sums = batch_sums(PARAMS, batch, objective=objective)
    assert {v.dtype for v in sums.values()} == {np.dtype("float32")}
    logits = np.asarray(objective.predict(PARAMS, batch)["logits"], np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(4), np.arange(4)]
    np.testing.assert_allclose(sums["loss"], losses.sum(), rtol=1e-5)


def test_a_negative_cadence_is_refused(data_dir):
    data = evaluator(data_dir).data
    with pytest.raises(UserError, match=r"evals\.val\.every=-1"):
        Classification(name="val", data=data, objective=Linear(), mesh=make_mesh(), every=-1)


def test_details_have_each_class_and_the_confusion_matrix(data_dir, tmp_path, want):
    results = evaluator(data_dir).run(PARAMS, details=tmp_path / "evals" / "val_7")
    details = json.loads((tmp_path / "evals" / "val_7.json").read_text())
    assert details["results"] == results
    recalls = [record["accuracy"] for record in details["classes"]]
    np.testing.assert_allclose(recalls, want["recalls"])
    assert [record["count"] for record in details["classes"]] == want["confusion"].sum(1).tolist()
    bins = details["calibration"]
    assert sum(b["count"] for b in bins) == 50
    gaps = [b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins]
    np.testing.assert_allclose(sum(gaps) / 50, results["ece"], rtol=1e-6)
    with open(tmp_path / "evals" / "val_7_confusion.csv") as file:
        pairs = {(r["label"], r["predicted"]): r["count"] for r in csv.DictReader(file)}
    matrix = [[int(pairs.get((str(i), str(j)), 0)) for j in range(10)] for i in range(10)]
    np.testing.assert_array_equal(matrix, want["confusion"])


def test_a_class_without_examples_is_left_out_of_the_mean():
    accuracy, counts = accuracy_by_class(np.array([0, 0, 2]), np.array([0, 1, 2]), 4)
    np.testing.assert_array_equal(accuracy, [0.5, np.nan, 1, np.nan])
    np.testing.assert_array_equal(counts, [2, 0, 1, 0])


def test_the_head_may_have_more_classes_than_the_data(data_dir):
    wide = np.random.default_rng(1).normal(size=(192, 30)).astype(np.float32)
    predicted = []
    evaluation = evaluator(data_dir)
    for batch in eval_batches(evaluation.data):
        logits = Linear().predict(wide, batch)["logits"]
        predicted.append(np.where(batch["mask"], logits.argmax(1) == batch["label"], False))
    assert evaluation.run(wide)["top1"] == np.concatenate(predicted).sum() / 50


def test_equal_logits_are_ranked_by_class_and_what_is_no_number_is_wrong():
    batch = {
        "image": np.zeros((3, 8, 8, 3), np.uint8),
        "label": np.array([4, 5, 0], np.int32),
        "mask": np.ones(3, np.float32),
    }
    assert batch_sums(PARAMS, batch, objective=Linear())["top5"] == 2  # not the sixth class
    broken = np.full_like(PARAMS, np.nan)
    assert batch_sums(broken, batch, objective=Linear())["top5"] == 0


@pytest.mark.parametrize("devices", [1, 8])
def test_mean_average_precision_is_that_of_scikit_learn(devices, tmp_path):
    rng = np.random.default_rng(5)
    lines = ["image,labels"]
    for i in range(21):
        cv2.imwrite(str(tmp_path / f"{i}.png"), rng.integers(0, 256, (8, 8, 3), np.uint8))
        lines.append(f"{i}.png,{'|'.join(f'c{c}' for c in rng.permutation(10)[: i % 4])}")
    (tmp_path / "all.csv").write_text("\n".join(lines) + "\n")
    name = f"manifest:{tmp_path / 'all.csv'}"
    evaluation = evaluator(None, name=name, split="all", devices=jax.devices()[:devices])
    results = evaluation.run(PARAMS, details=tmp_path / "val_0")
    batch = next(eval_batches(dataclasses.replace(evaluation.data, batch_size=21)))
    scores = np.asarray(Linear().predict(PARAMS, batch)["logits"])
    want = average_precision_score(batch["label"], scores, average=None)
    assert results.keys() == {"top1", "loss", "mAP", "count"}
    np.testing.assert_allclose(results["mAP"], want.mean(), rtol=1e-12)
    classes = json.loads((tmp_path / "val_0.json").read_text())["classes"]
    np.testing.assert_allclose([c["average_precision"] for c in classes], want, rtol=1e-12)


def test_average_precision_takes_equal_scores_together_and_knows_classes_without_positives():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (200, 3)).astype(np.float32)  # many are equal
    targets = (rng.random((200, 3)) < 0.3).astype(np.float32)
    targets[:, 1] = 0
    got = average_precisions(scores, targets)
    want = average_precision_score(targets[:, [0, 2]], scores[:, [0, 2]], average=None)
    np.testing.assert_allclose(got[[0, 2]], want, rtol=1e-12)
    assert np.isnan(got[1])


@pytest.fixture
def folder(tmp_path):
    """Ten images with the names of ImageNet's validation files, of digits' classes."""
    rng = np.random.default_rng(2)
    for i in range(10):
        (tmp_path / "val" / f"c{i}").mkdir(parents=True)
        path = tmp_path / "val" / f"c{i}" / f"ILSVRC2012_val_{i + 1:08d}.png"
        cv2.imwrite(str(path), rng.integers(0, 256, (8, 8, 3), np.uint8))
    return f"folder:{tmp_path}"


@pytest.mark.parametrize("form", ["list", "dict"])
def test_real_labels_are_several_or_none_for_a_file(form, folder, tmp_path):
    evaluation = evaluator(None, name=folder, split="validation", batch_size=8)
    source = evaluation.data.open()
    batches = list(eval_batches(evaluation.data))
    predicted = np.concatenate([Linear().predict(PARAMS, b)["logits"].argmax(1) for b in batches])
    # By file: none for two images, the prediction among several for five, another for three.
    labels = [[] for _ in range(10)]
    for index in range(10):
        number = int(source.file_name(index)[15:23])
        right = int(predicted[index])
        wrong = (right + 1) % 10
        labels[number - 1] = [] if index < 2 else [wrong, right] if index < 7 else [wrong]
    names = [f"ILSVRC2012_val_{i + 1:08d}.png" for i in range(10)]
    content = labels if form == "list" else dict(zip(names, labels, strict=True))
    (tmp_path / "real.json").write_text(json.dumps(content))
    real = str(tmp_path / "real.json")
    evaluation = evaluator(None, name=folder, split="validation", batch_size=8, real=real)
    evaluation.open()
    assert "real_top1" in evaluation.metrics
    results = evaluation.run(PARAMS)
    assert (results["real_top1"], results["real_count"], results["count"]) == (5 / 8, 8, 10)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "can't be read: FileNotFoundError"),
        ("[1, 2]", "expected a list of lists"),
        ("[[1]]", "no labels for the file 'ILSVRC2012_val_"),
        ('{"a.png": [1]}', "no labels for the file 'ILSVRC2012_val_"),
        (str([[0, 10]] * 10), "has label 10; expected integers from 0 to 9"),
        (str([[-1]] * 10), "has label -1; expected integers from 0 to 9"),
    ],
)
def test_wrong_real_labels_are_refused_before_the_run(content, named, folder, tmp_path):
    if content is not None:
        (tmp_path / "real.json").write_text(content)
    real = str(tmp_path / "real.json")
    with pytest.raises(UserError, match=r"evals\.val\.real_json") as e:
        evaluator(None, name=folder, split="validation", real=real).open()
    assert named in str(e.value)


def test_tfds_records_know_the_names_of_their_files():
    records = [{"image": b"", "label": 1, "file_name": b"a.JPEG"}, {"image": b"", "label": 0}]
    source = TfdsSource(records, name="i:val", num_classes=2, keep=False)
    assert [source.file_name(i) for i in range(2)] == ["a.JPEG", "i:val[1]"]
