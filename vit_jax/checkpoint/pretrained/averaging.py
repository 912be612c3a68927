# SPDX-License-Identifier: Apache-2.0
"""Averages the parameters of several weights of one model.

The model of an average is only good if a straight line between the weights crosses no region of
high loss, as between fine-tuning runs that started from the same weights.
Sources: model soups, arXiv:2203.05482; WiSE-FT, arXiv:2109.01903.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.observe.console import log
from vit_jax.utils.errors import UserError
from vit_jax.utils.metrics import format_value, lower_is_better

# Returns the value of a metric for weights under a name.
Score = Callable[[Weights, str], float]

# What must be equal for parameters to have the same meaning, beside the model.
_EQUAL = ("preprocess", "posemb_grid", "posemb_resize", "class_names", "loss")


def check_alike(weights: Sequence[Weights], names: Sequence[str]) -> None:
    """Checks that weights are of one model, head and preprocessing, so that they can be averaged.

    Raises:
      UserError: one differs from the first; the message names both and the difference.
    """
    first, name = weights[0], names[0]
    shapes = {path: x.shape for path, x in first.params.items()}
    for other, other_name in zip(weights[1:], names[1:], strict=True):
        found = {path: x.shape for path, x in other.params.items()}
        for path in sorted(shapes.keys() | found.keys()):
            if shapes.get(path) != found.get(path):
                here, there = (
                    f"{list(s[path])}" if path in s else "missing" for s in (shapes, found)
                )
                raise UserError(
                    f"{other_name} can't be averaged with {name}: {path} is {there}, there {here}; "
                    "expected weights of the same model with the same head"
                )
        both = sorted(first.model.keys() & other.model.keys())
        stated = [(f"model.{key}", first.model[key], other.model[key]) for key in both]
        stated += [(key, getattr(first, key), getattr(other, key)) for key in _EQUAL]
        for key, here, there in stated:
            if here != there and None not in (here, there):
                raise UserError(
                    f"{other_name} can't be averaged with {name}: {key} is {there!r}, there "
                    f"{here!r}; expected weights of the same model, head and preprocessing"
                )


def average(weights: Sequence[Weights], factors: Sequence[float], *, note: str) -> Weights:
    """Returns the first weights with the weighted mean of the parameters of all.

    Args:
      weights: that `check_alike` accepts.
      factors: one for each; they sum to 1.
      note: says what was averaged, for those who read the file.
    """
    params = {}
    for path, x in weights[0].params.items():
        total = np.zeros(x.shape, np.float64)
        for factor, other in zip(factors, weights, strict=True):
            total += factor * other.params[path].astype(np.float64)
        params[path] = total.astype(np.float32)
    return dataclasses.replace(weights[0], params=params, objective_params={}, notes=(note,))


def average_greedily(
    weights: Sequence[Weights], names: Sequence[str], score: Score, *, metric: str
) -> Weights:
    """Averages weights one after the other, the best first, as long as the result is not worse.

    Source: arXiv:2203.05482, algorithm 1.

    Args:
      weights: that `check_alike` accepts.
      names: of each.
      score: of weights.
      metric: that `score` returns.
    """
    sign = -1 if lower_is_better(metric) else 1
    scores = [sign * score(w, name) for w, name in zip(weights, names, strict=True)]
    order = sorted(range(len(weights)), key=lambda i: -scores[i])
    kept, best = [order[0]], scores[order[0]]
    result = weights[order[0]]
    for index in order[1:]:
        tried = [*kept, index]
        note = f"the mean of {', '.join(names[i] for i in tried)}"
        mean = average([weights[i] for i in tried], [1 / len(tried)] * len(tried), note=note)
        found = sign * score(mean, f"with {names[index]}")
        if found >= best:
            kept, best, result = tried, found, mean
    left_out = [names[i] for i in order if i not in kept]
    log(f"kept {len(kept)} of {len(weights)}: {', '.join(names[i] for i in kept)}")
    if left_out:
        log(f"left out, since the mean with it is worse: {', '.join(left_out)}")
    return result


def interpolate(
    weights: Sequence[Weights],
    names: Sequence[str],
    score: Score,
    *,
    metric: str,
    alphas: Sequence[float],
) -> Weights:
    """Returns the best point on the line from the first weights to the second.

    Source: arXiv:2109.01903, equation 1.

    Args:
      weights: two that `check_alike` accepts.
      names: of each.
      score: of weights.
      metric: that `score` returns.
      alphas: shares of the second weights, 0 to 1.
    """
    sign, best = -1 if lower_is_better(metric) else 1, None
    for alpha in alphas:
        note = f"{1 - alpha:g} x {names[0]} + {alpha:g} x {names[1]}"
        mean = average(weights, [1 - alpha, alpha], note=note)
        found = sign * score(mean, f"alpha {alpha:g}")
        if best is None or found > best[0]:
            best = found, alpha, mean
    assert best is not None  # there is at least one share
    log(f"best: alpha {best[1]:g}, with {metric} {format_value(metric, sign * best[0])}")
    return best[2]
