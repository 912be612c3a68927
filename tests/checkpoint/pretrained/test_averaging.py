# SPDX-License-Identifier: Apache-2.0
"""Averages of weights, and how the weights to average are chosen."""

import dataclasses

import numpy as np
import pytest

from vit_jax.checkpoint.pretrained.averaging import (
    average,
    average_greedily,
    check_alike,
    interpolate,
)
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.utils.errors import UserError


def make(value, **changes):
    """Weights of one parameter."""
    stated = {"params": {"head/kernel": np.full((1, 1), value, np.float32)}, "layout": "test"}
    return Weights(**(stated | {"model": {"num_layers": 1}} | changes))


def value_of(weights):
    return weights.params["head/kernel"].item()


def near(target):
    """A metric like accuracy, which is best where the parameter has this value."""
    return lambda weights, name: 1 - abs(value_of(weights) - target)


def test_average_is_the_weighted_mean_of_each_parameter():
    rng = np.random.default_rng(0)
    params = [{p: rng.normal(size=(3, 2)).astype(np.float32) for p in "ab"} for _ in range(3)]
    factors = [0.2, 0.3, 0.5]
    mean = average([make(0, params=p) for p in params], factors, note="three")
    for path in "ab":
        expected = sum(f * p[path].astype(np.float64) for f, p in zip(factors, params, strict=True))
        np.testing.assert_allclose(mean.params[path], expected, rtol=1e-6)
        assert mean.params[path].dtype == np.float32
    assert mean.notes == ("three",)


def test_average_of_bfloat16_is_float32():
    import ml_dtypes

    halves = [make(0, params={"a": np.array([x], ml_dtypes.bfloat16)}) for x in (1.0, 1.0078125)]
    mean = average(halves, [0.5, 0.5], note="")
    assert mean.params["a"].dtype == np.float32
    assert mean.params["a"].item() == 1.00390625


# The results alone are 0.7, 0.9, 0.8 and 0.1: they are tried in the order b, c, a, d.
GREEDY = {"a": 0.7, "b": 1.1, "c": 0.8, "d": 1.9}


def test_greedy_average_keeps_what_helps(said):
    weights = [make(x) for x in GREEDY.values()]
    result = average_greedily(weights, list(GREEDY), near(1.0), metric="val/top1")
    # b; b and c are 0.95, which is better; with a 0.867, which is worse; with d 1.267, worse too.
    assert value_of(result) == pytest.approx(0.95)
    assert result.notes == ("the mean of b, c",)
    assert "kept 2 of 4: b, c" in said
    assert "left out, since the mean with it is worse: a, d" in said


def test_greedy_average_takes_lower_losses_as_better():
    weights = [make(x) for x in GREEDY.values()]
    loss = near(1.0)
    result = average_greedily(
        weights, list(GREEDY), lambda w, name: -loss(w, name), metric="val/loss"
    )
    assert value_of(result) == pytest.approx(0.95)


def test_greedy_average_may_be_one_of_the_weights():
    weights = [make(1.0), make(5.0)]
    result = average_greedily(weights, ["a", "b"], near(1.0), metric="val/top1")
    assert value_of(result) == 1.0


def test_interpolation_keeps_the_best_share():
    tried = []

    def score(weights, name):
        tried.append(name)
        return near(3.5)(weights, name)

    result = interpolate(
        [make(1.0), make(5.0)], ["start", "end"], score, metric="val/top1", alphas=(0, 0.5, 0.75, 1)
    )
    assert value_of(result) == pytest.approx(3.0)
    assert result.notes == ("0.5 x start + 0.5 x end",)
    assert tried == ["alpha 0", "alpha 0.5", "alpha 0.75", "alpha 1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"params": {"head/kernel": np.ones((1, 2), np.float32)}},
            r"b can't be averaged with a: head/kernel is \[1, 2\], there \[1, 1\]",
        ),
        ({"params": {}}, "head/kernel is missing, there"),
        ({"model": {"num_layers": 1, "activation": "gelu_erf"}}, "model.activation is 'gelu_erf'"),
        ({"class_names": ("dog",)}, r"class_names is \('dog',\), there \('cat',\)"),
        ({"preprocess": {"mean": 0.4}}, "preprocess is"),
    ],
)
def test_weights_of_different_models_are_refused(changes, message):
    model = {"num_layers": 1, "activation": "gelu_tanh"}
    first = make(1.0, model=model, class_names=("cat",), preprocess={"mean": 0.5})
    other = dataclasses.replace(first, **changes)
    check_alike([first, first], ["a", "b"])
    with pytest.raises(UserError, match=message):
        check_alike([first, other], ["a", "b"])


def test_what_is_not_known_is_no_difference():
    check_alike([make(1.0, class_names=("cat",)), make(2.0, class_names=None)], ["a", "b"])
