# SPDX-License-Identifier: Apache-2.0
"""Few-shot regression, k-NN and the linear probe, against scikit-learn and plain numpy."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators import knn
from vit_jax.evaluators.base import evaluate
from vit_jax.evaluators.features import Features
from vit_jax.evaluators.fewshot import FewShot, solve_regression
from vit_jax.evaluators.kinds import EVALUATORS
from vit_jax.evaluators.knn import NearestNeighbours, find_neighbours, vote
from vit_jax.evaluators.linear_probe import LinearProbe, fit_logistic, judge_logistic
from vit_jax.parallel.mesh import make_mesh
from vit_jax.runtime.preemption import Preempted, PreemptionGuard
from vit_jax.utils.errors import UserError

PARAMS = np.random.default_rng(3).normal(size=(64, 24)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Projection:
    """Features are a random projection of the pixels."""

    def predict(self, params, batch):
        pixels = batch["image"][..., 0].reshape(len(batch["image"]), -1) / np.float32(255)
        return {"pre_logits": pixels @ params}


def make(data_dir, make_evaluator, *, devices=8, batch_size=64, **options):
    data = DatasetSpec("digits", "test[:200]", "decode", batch_size, data_dir, "evals.e")
    return make_evaluator(
        name="e",
        data=data,
        objective=Projection(),
        mesh=make_mesh(devices=jax.devices()[:devices]),
        **{"train_split": "train[:301]"} | options,
    )


@pytest.fixture(scope="module")
def splits(data_dir):
    """Features of both splits by plain numpy, float64."""
    found = []
    for split in ("train[:301]", "test[:200]"):
        records = list(tfds.data_source("digits", split=split, data_dir=data_dir))
        pixels = np.stack([r["image"] for r in records]).reshape(len(records), -1) / 255
        found += [pixels @ PARAMS.astype(np.float64), np.array([r["label"] for r in records])]
    return found


def whiten(x, *others):
    return [(a - x.mean(0)) / (x.std(0) + 1e-5) for a in (x, *others)]


@pytest.mark.parametrize("devices", [1, 8])
def test_fewshot_is_ridge_regression_on_whitened_features(devices, data_dir, splits, tmp_path):
    evaluation = make(data_dir, FewShot, devices=devices, shots=(1, 5), seeds=2)
    got = evaluation.run(PARAMS, details=tmp_path / "e_3")
    x, y, x_test, y_test = splits
    want = {1: [], 5: []}
    for seed in range(2):
        rng = np.random.default_rng(seed)
        order = [rng.permutation(np.where(y == c)[0]) for c in range(10)]
        for shots in (1, 5):
            chosen = np.concatenate([o[:shots] for o in order])
            a, b = whiten(x[chosen], x_test)
            a, b = (np.concatenate([z, np.full((len(z), 1), 100.0)], 1) for z in (a, b))
            ridge = Ridge(alpha=1024.0, fit_intercept=False, solver="svd")
            ridge.fit(a, 2 * np.eye(10)[y[chosen]] - 1)
            want[shots].append(np.mean(ridge.predict(b).argmax(1) == y_test))
    assert got == {"1shot": np.mean(want[1]), "5shot": np.mean(want[5]), "count": 200}
    assert got["5shot"] > got["1shot"] > 0.15
    details = json.loads((tmp_path / "e_3.json").read_text())
    assert details["by_seed"] == {"1shot": want[1], "5shot": want[5]}
    assert evaluation.metrics == ("1shot", "5shot")


def test_of_several_penalties_the_best_on_average_is_taken(data_dir, tmp_path):
    l2 = (1024.0, 1e9)
    apart = [
        make(data_dir, FewShot, shots=(2, 5), seeds=1, l2=(value,)).run(PARAMS) for value in l2
    ]
    both = make(data_dir, FewShot, shots=(2, 5), seeds=1, l2=l2)
    got = both.run(PARAMS, details=tmp_path / "e_0")
    means = [(r["2shot"] + r["5shot"]) / 2 for r in apart]
    best = int(np.argmax(means))
    assert means[0] != means[1]
    assert got == apart[best]
    assert json.loads((tmp_path / "e_0.json").read_text())["l2"] == l2[best]


@pytest.mark.parametrize("num_examples", [5, 40])
def test_both_forms_of_the_regression_have_no_gradient(num_examples):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(num_examples, 12)), rng.normal(size=(num_examples, 3))
    weights = solve_regression(x, y, 2.0)
    np.testing.assert_allclose(x.T @ (x @ weights - y) + 2.0 * weights, 0, atol=1e-12)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("block", [2**26, 200 * 32])
def test_neighbours_vote_as_in_scikit_learn(devices, block, data_dir, splits, monkeypatch):
    monkeypatch.setattr(knn, "_MAX_SIMILARITIES", block)  # all at once, and in blocks
    got = make(data_dir, NearestNeighbours, devices=devices, k=(1, 5, 20)).run(PARAMS)
    x, y, x_test, y_test = splits
    singular = np.linalg.svd(x_test.astype(np.float64), compute_uv=False)
    p = singular / singular.sum()
    rank = np.exp(-(p * np.log(p + 1e-30)).sum())
    assert got.pop("rankme") == pytest.approx(rank, rel=1e-3)
    x, x_test = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, x_test))
    want = {"count": 200}
    for k in (1, 5, 20):
        # Of normalised features, squared distances are 2 - 2 similarities.
        reference = KNeighborsClassifier(
            k, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute"
        )
        want[f"{k}nn"] = reference.fit(x, y).score(x_test, y_test)
    assert got == want
    assert got["5nn"] > 0.8


def test_of_equal_neighbours_the_first_are_found_on_any_mesh():
    train = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    for devices in (1, 8):
        mesh = make_mesh(devices=jax.devices()[:devices])
        values, found = find_neighbours(train, train[4:5], k=5, mesh=mesh, name="e")
        np.testing.assert_array_equal(found, [[4, 5, 6, 7, 0]])
        np.testing.assert_array_equal(values, [[1, 1, 1, 1, 0]])


def test_votes_weigh_by_similarity():
    similarities, labels = np.array([[1.0, 0.8, 0.8]]), np.array([[0, 1, 1]])
    sharp, flat = (vote(similarities, labels, num_classes=2, temperature=t) for t in (0.001, 10.0))
    assert (sharp[0], flat[0]) == (0, 1)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_regression_is_that_of_scikit_learn(devices):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(90, 6)).astype(np.float32)
    y = (x @ rng.normal(size=(6, 3)) + rng.normal(size=(90, 3))).argmax(1).astype(np.int32)
    mesh = make_mesh(devices=jax.devices()[:devices])
    l2 = np.array([0.1, 0.01])
    params = fit_logistic(
        Features(x, y),
        num_classes=3,
        lr=np.array([0.5, 0.5]),
        l2=l2,
        steps=600,
        batch_size=90,  # All at once: no noise. It is no multiple of the devices.
        mesh=mesh,
        name="e",
    )
    scores = judge_logistic(params, Features(x, y), batch_size=32, mesh=mesh)
    for i, value in enumerate(l2):
        # scikit-learn divides the penalty by C and sums the losses.
        reference = LogisticRegression(C=1 / (value * 90), tol=1e-10, solver="newton-cg")
        reference.fit(x.astype(np.float64), y)
        np.testing.assert_allclose(params["kernel"][i], reference.coef_.T, atol=1e-5)
        assert scores["top1"][i] == reference.score(x, y)
        losses = -reference.predict_log_proba(x)[np.arange(90), y]
        np.testing.assert_allclose(scores["loss"][i], losses.mean(), rtol=1e-5)


def test_the_probe_chooses_on_held_out_features_and_is_the_same_on_any_mesh(data_dir, tmp_path):
    options = {"lr": (1e-6, 0.3), "l2": (0.0, 0.1), "steps": 60, "sgd_batch_size": 50}
    got = [
        make(data_dir, LinearProbe, devices=n, **options).run(PARAMS, details=tmp_path / f"e_{n}")
        for n in (1, 8)
    ]
    assert got[0].keys() == got[1].keys()
    for key, value in got[0].items():
        np.testing.assert_allclose(got[1][key], value, rtol=1e-4, err_msg=key)
    assert got[0]["lr"] == 0.3
    assert got[0]["top1"] > 0.8
    tried = json.loads((tmp_path / "e_8.json").read_text())["tried"]
    assert [(t["lr"], t["l2"]) for t in tried] == [(a, b) for a in (1e-6, 0.3) for b in (0, 0.1)]
    best = max(tried, key=lambda t: (t["held_out_top1"], -t["held_out_loss"]))
    assert {k: got[1][k] for k in best} == best


def test_one_pair_of_values_fits_all_examples(data_dir):
    options = {"lr": (0.1,), "l2": (0.01,), "steps": 30, "sgd_batch_size": 301}
    got = make(data_dir, LinearProbe, **options).run(PARAMS)
    assert got.keys() == {"lr", "l2", "top1", "loss", "count"}
    assert got["count"] == 200


@pytest.mark.parametrize(
    ("make_evaluator", "options"),
    [(FewShot, {}), (NearestNeighbours, {"k": (5,)}), (LinearProbe, {"steps": 3})],
)
def test_a_fit_is_left_when_the_job_is_to_stop(make_evaluator, options, data_dir, monkeypatch):
    features = Features(np.zeros((20, 4), np.float32), np.arange(20, dtype=np.int32) % 10)
    monkeypatch.setattr(PreemptionGuard, "should_stop", lambda self: True)
    with PreemptionGuard(), pytest.raises(Preempted):
        make(data_dir, make_evaluator, **options).judge(features, features)


def test_the_memory_of_features_is_said(data_dir, said):
    make(data_dir, NearestNeighbours).run(PARAMS)
    assert any("301 images of digits, 24 values each: 28.9 kB of host memory" in s for s in said)


WRONG = {
    "shots": ("fewshot", {"shots": (0, 5)}),
    "l2": ("fewshot", {"l2": (0.0,)}),
    "seeds": ("fewshot", {"seeds": 0}),
    "k": ("knn", {"k": ()}),
    "temperature": ("knn", {"temperature": 0.0}),
    "lr": ("linear_probe", {"lr": (0.0,)}),
    "steps": ("linear_probe", {"steps": 0}),
    "sgd_batch_size": ("linear_probe", {"sgd_batch_size": 0}),
    "every": ("knn", {"every": -1}),
}


@pytest.mark.parametrize("key", WRONG)
def test_wrong_options_are_refused(key, data_dir):
    kind, options = WRONG[key]
    with pytest.raises(UserError, match=rf"evals\.e\.{key}="):
        make(data_dir, EVALUATORS[kind], **options)


def test_what_the_data_can_not_give_is_refused_before_the_run(data_dir):
    with pytest.raises(UserError, match=r"evals\.e\.k=\(302,\): expected at most the 301"):
        make(data_dir, NearestNeighbours, k=(302,)).open()
    with pytest.raises(UserError, match=r"evals\.e\.train_split='trian'"):
        make(data_dir, NearestNeighbours, train_split="trian").open()


def test_pixels_have_no_results_of_the_average(data_dir):
    options = {"k": (5,), "of": "pixels"}
    evaluation = make(data_dir, NearestNeighbours, **options)
    assert set(evaluate(evaluation, PARAMS, PARAMS)) == {"e/5nn", "e/rankme", "e/count"}
    of_features = dataclasses.replace(evaluation, of="features")
    assert of_features.reads_params
    assert not evaluation.reads_params
