# SPDX-License-Identifier: Apache-2.0
"""Linear regression from few examples of each class, in closed form.

Source: arXiv:2010.11929, section 4.1 and figure 4; numbers and choices are those of big_vision's
evaluator `fewshot_lsr`: whitened features with one of 100 for the bias, targets of -1 and 1, and a
regularisation of 2^10.
"""

import dataclasses
from typing import Any

import numpy as np

from vit_jax.evaluators.features import FeatureEvaluator, Features, whiten
from vit_jax.runtime.preemption import interruptible

# The constant feature that the bias multiplies; large, so that the bias is hardly regularised.
_BIAS = 100.0


def choose_shots(labels: np.ndarray, num_classes: int, *, seed: int) -> list[np.ndarray]:
    """Shuffles the examples of each class; the first n are chosen for n shots.

    `labels` are int `[n]`. Returns for each class the positions of its examples, int64
    `[examples of the class]`.
    """
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(labels == c)) for c in range(num_classes)]


def solve_regression(features: np.ndarray, targets: np.ndarray, l2: float) -> np.ndarray:
    """Minimises `|features @ weights - targets|^2 + l2 |weights|^2`; `l2` is above 0.

    Features are float64 `[n, width]`, targets `[n, classes]`, and weights `[width, classes]`.
    """
    num_examples, width = features.shape
    if num_examples >= width:
        gram = features.T @ features + l2 * np.eye(width)
        return np.linalg.solve(gram, features.T @ targets)
    gram = features @ features.T + l2 * np.eye(num_examples)
    return features.T @ np.linalg.solve(gram, targets)


def fewshot_accuracies(
    train: Features, test: Features, *, num_classes: int, l2: tuple[float, ...]
) -> np.ndarray:
    """The test accuracy of the regression on `train` with each of `l2`, float64 `[values]`."""
    x, x_test = whiten(train.features.astype(np.float64), test.features.astype(np.float64))
    x, x_test = (np.pad(a, ((0, 0), (0, 1)), constant_values=_BIAS) for a in (x, x_test))
    targets = 2.0 * np.eye(num_classes)[train.labels] - 1.0
    predicted = [(x_test @ solve_regression(x, targets, value)).argmax(1) for value in l2]
    return np.array([np.mean(p == test.labels) for p in predicted])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot(FeatureEvaluator):
    """Few-shot accuracy, the mean over `seeds` choices of `shots` examples of each class.

    Attributes:
      shots: numbers of examples of each class; of a class with fewer examples, all are used.
      l2: strengths of the regularisation; of several, the one with the best mean over all shots and
        seeds is chosen, on the test split.
      seeds: number of choices of the examples.
    """

    shots: tuple[int, ...] = (1, 5, 10, 25)
    l2: tuple[float, ...] = (1024.0,)
    seeds: int = 3

    def __post_init__(self) -> None:
        self.check(min(self.shots, default=0) >= 1, "shots", "numbers of at least 1")
        self.check(min(self.l2, default=0) > 0, "l2", "numbers above 0")
        self.check(self.seeds >= 1, "seeds", "at least 1")
        super().__post_init__()

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(f"{shots}shot" for shots in self.shots)

    def judge(self, train: Features, test: Features) -> tuple[dict[str, float], dict[str, Any]]:
        num_classes = self.data.info.num_classes
        table = np.zeros((len(self.shots), self.seeds, len(self.l2)))
        for seed in interruptible(range(self.seeds)):
            positions = choose_shots(train.labels, num_classes, seed=seed)
            for i, shots in enumerate(self.shots):
                chosen = np.concatenate([p[:shots] for p in positions])
                few = Features(train.features[chosen], train.labels[chosen])
                table[i, seed] = fewshot_accuracies(few, test, num_classes=num_classes, l2=self.l2)
        best = int(table.mean(axis=(0, 1)).argmax())
        accuracies = table[:, :, best]
        results = dict(zip(self.metrics, accuracies.mean(axis=1).tolist(), strict=True))
        by_seed = dict(zip(self.metrics, accuracies.tolist(), strict=True))
        return results, {"l2": self.l2[best], "by_seed": by_seed}
