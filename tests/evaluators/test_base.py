# SPDX-License-Identifier: Apache-2.0
"""What every evaluator gets from the base class."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.base import Evaluator, evaluate, write_details
from vit_jax.evaluators.kinds import EVALUATORS
from vit_jax.parallel.mesh import make_mesh
from vit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brightness(Evaluator):
    """An evaluator as another package would define it: the mean pixel, times the parameters."""

    power: int = 1

    @property
    def metrics(self):
        return ("brightness",)

    def judge_batch(self, params, batch):
        pixels = batch["image"].astype(jnp.float32).mean(axis=(1, 2, 3))
        value = params * pixels**self.power
        return {"brightness": value, "both": jnp.stack([value, 2 * value], 1)}, {"value": value}

    def run(self, params, *, details=None):
        sums, count, rows = self.sum_split(params)
        results = {"brightness": float(sums["brightness"]) / count, "count": count}
        write_details(details, {"both": sums["both"].tolist(), "rows": rows["value"].tolist()})
        return results


def brightness(data_dir, *, devices=8, **options):
    data = DatasetSpec("digits", "test[:50]", "decode", 16, data_dir, "evals.e")
    mesh = make_mesh(devices=jax.devices()[:devices])
    return Brightness(name="e", data=data, objective=None, mesh=mesh, **options)


@pytest.fixture(scope="module")
def pixels(data_dir):
    records = tfds.data_source("digits", split="test[:50]", data_dir=data_dir)
    return np.array([record["image"].astype(np.float64).mean() for record in records])


@pytest.mark.parametrize("devices", [1, 8])
def test_sums_and_rows_are_those_of_the_split_without_padding(devices, data_dir, pixels):
    sums, count, rows = brightness(data_dir, devices=devices).sum_split(np.float32(1))
    assert count == 50
    np.testing.assert_allclose(sums["brightness"], pixels.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums["both"], [pixels.sum(), 2 * pixels.sum()], rtol=1e-6)
    assert sums["both"].dtype == np.float64
    np.testing.assert_allclose(rows["value"], pixels, rtol=1e-6)
    np.testing.assert_array_equal(rows["index"], np.arange(50))


def test_the_average_of_parameters_is_judged_too_and_each_has_its_details(data_dir, tmp_path):
    one, two = np.float32(1), np.float32(2)
    results = evaluate(brightness(data_dir), one, two, details=(tmp_path, 7))
    assert results["e_ema/brightness"] == 2 * results["e/brightness"]
    assert {file.name for file in (tmp_path / "evals").iterdir()} == {"e_7.json", "e_ema_7.json"}


def test_a_wrong_value_of_a_field_is_named(data_dir):
    with pytest.raises(UserError, match=r"^evals\.e\.every=-2: expected steps, or 0 for the end"):
        brightness(data_dir, every=-2)


def test_an_evaluator_judges_no_head_unless_it_says_so(data_dir):
    assert not Brightness.judges_head
    assert brightness(data_dir).head_names == ()
    judging = {name for name, make in EVALUATORS.items() if make.judges_head}
    classifying = {"classification", "corruptions", "patch_sizes", "probes", "subset", "trust"}
    assert judging == classifying


def test_an_incomplete_evaluator_can_not_be_made():
    class Incomplete(Evaluator):
        pass

    with pytest.raises(TypeError, match="judge_batch"):
        Incomplete(name="e", data=None, objective=None, mesh=None)


def evaluate_to(data_dir, results, monkeypatch):
    monkeypatch.setattr(Brightness, "run", lambda *_, **__: results)
    return evaluate(brightness(data_dir, devices=1), np.float32(1), None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (0.5, 0.5),
        (np.int64(3), 3),
        (jnp.int32(3), 3),
        (np.float32(0.5), 0.5),
        (np.array(0.5), 0.5),
        (jnp.float32(0.5), 0.5),
        (jnp.bfloat16(0.5), 0.5),
    ],
)
def test_results_are_python_numbers(data_dir, monkeypatch, value, expected):
    (found,) = evaluate_to(data_dir, {"best": value}, monkeypatch).values()
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "value", [None, "0.5", np.zeros(2), jnp.zeros(1), [1.0], 1j, np.array("x")]
)
def test_a_result_that_is_no_number_is_refused(data_dir, monkeypatch, value):
    with pytest.raises(UserError, match=r"evals\.e: best is an? \w+; expected a single number"):
        evaluate_to(data_dir, {"best": value}, monkeypatch)


def test_results_are_a_dict(data_dir, monkeypatch):
    with pytest.raises(UserError, match=r"evals\.e: run gives a NoneType; expected a dict"):
        evaluate_to(data_dir, None, monkeypatch)
