# SPDX-License-Identifier: Apache-2.0
"""Accuracy and loss of a split, against plain numpy over the same split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.classification import batch_sums, make_classification
from vit_jax.parallel.mesh import make_mesh
from vit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Linear:
    """Logits as a product of the pixels with the parameters."""

    dtype: str = "float32"

    def predict(self, params, batch):
        pixels = batch["image"].reshape(len(batch["image"]), -1) / 255
        return {"logits": (pixels @ params).astype(self.dtype)}


PARAMS = np.random.default_rng(4).normal(size=(192, 10)).astype(np.float32)


def evaluator(data_dir, *, batch_size=16, **mesh):
    data = DatasetSpec("digits", "test[:50]", "decode", batch_size, data_dir, "evals.val")
    mesh = make_mesh(**mesh)
    return make_classification(name="val", data=data, objective=Linear(), mesh=mesh)


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
    return {"top1": right.sum() / 50, "loss": losses.mean(), "count": 50}


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [8, 16, 64])
def test_results_are_those_of_the_split_on_any_mesh(batch_size, devices, data_dir, want):
    got = evaluator(data_dir, batch_size=batch_size, devices=jax.devices()[:devices]).run(PARAMS)
    assert got.keys() == want.keys()
    assert got["top1"] == want["top1"]
    assert got["count"] == 50
    assert isinstance(got["count"], int)
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-6)


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 8}, {"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_axes_of_the_mesh_do_not_change_results(mesh, data_dir, want):
    got = evaluator(data_dir, **{"data": 1} | mesh).run(PARAMS)
    assert (got["top1"], got["count"]) == (want["top1"], 50)
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-6)


def test_all_batches_share_one_compiled_function(data_dir):
    evaluation = evaluator(data_dir)
    for _ in range(2):
        evaluation.run(PARAMS)
    assert evaluation._batch_sums._cache_size() == 1


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
    assert {float(v) for v in batch_sums(PARAMS, nothing, objective=Linear()).values()} == {0}


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
        make_classification(name="val", data=data, objective=Linear(), mesh=make_mesh(), every=-1)
