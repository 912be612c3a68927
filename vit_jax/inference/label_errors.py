# SPDX-License-Identifier: Apache-2.0
"""Finds likely label errors by confident learning (Northcutt et al., arXiv:1911.00068)."""

import dataclasses

import numpy as np

# A probability counts as above a threshold that it equals but for rounding.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class LabelErrors:
    """Examples whose given label is likely wrong, and an estimate of how many there are.

    Attributes:
      index: of the examples, int64 `[found]`, the most certain first.
      suggested: the class that is more likely for each, int64 `[found]`.
      score: how much more probable it is than the given label, float `[found]`, 0 to 1.
      joint: number of confident examples by given label and likely class, int64
        `[classes, classes]`.
      estimated: the number of wrong labels among all examples, by the calibrated joint.
    """

    index: np.ndarray
    suggested: np.ndarray
    score: np.ndarray
    joint: np.ndarray
    estimated: float


def find_label_errors(probabilities: np.ndarray, labels: np.ndarray) -> LabelErrors:
    """Finds likely label errors from predictions of a model that has not learned these labels.

    The threshold of a class is the mean probability of that class over the examples with its label
    (equation 2). An example is counted in the joint (equation 1) under the most probable of the
    classes whose thresholds its probabilities reach, if there is one. It is a likely error if that
    class is not its label, and its label is not its most probable class either.

    Args:
      probabilities: float `[n, classes]`.
      labels: given labels, int `[n]`; classes without examples are never suggested.
    """
    count, classes = probabilities.shape
    examples = np.bincount(labels, minlength=classes)
    own = probabilities[np.arange(count), labels].astype(np.float64)
    sums = np.bincount(labels, own, minlength=classes)
    thresholds = np.where(examples > 0, sums / np.maximum(examples, 1), np.inf)
    reached = probabilities >= thresholds - _ROUNDING
    candidates = np.where(reached, probabilities, -np.inf)
    given = candidates[np.arange(count), labels]
    likely = np.where(given == candidates.max(axis=1), labels, candidates.argmax(axis=1))
    counted = reached.any(axis=1)
    joint = np.zeros((classes, classes), np.int64)
    np.add.at(joint, (labels[counted], likely[counted]), 1)
    # Rows are scaled to the number of examples of each label (section 3.1, calibration).
    rows = joint.sum(axis=1)
    wrong = rows - np.diag(joint)
    estimated = float((wrong / np.maximum(rows, 1) * examples).sum())
    wrong = counted & (likely != labels) & (own < probabilities.max(axis=1))
    index = np.flatnonzero(wrong)
    score = probabilities[index, likely[index]].astype(np.float64) - own[index]
    order = np.argsort(-score, kind="stable")
    index = index[order]
    return LabelErrors(index, likely[index], score[order], joint, estimated)
