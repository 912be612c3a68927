# SPDX-License-Identifier: Apache-2.0
"""Metrics that need all examples of a split, in numpy."""

import numpy as np


def average_precisions(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Average precision of each class: the sum over thresholds of (R_n - R_{n-1}) P_n.

    There is no interpolation, and examples of equal score pass a threshold together. `scores` are
    float `[n, classes]`, and `targets` zeros and ones of any dtype, `[n, classes]`. Returns float64
    `[classes]`; NaN for a class without positives.
    """
    precisions = np.full(scores.shape[1], np.nan)
    for c in range(scores.shape[1]):
        order = np.argsort(-scores[:, c], kind="stable")
        ranked, hits = scores[order, c], targets[order, c] > 0
        if not hits.any():
            continue
        last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of equal scores
        true = np.cumsum(hits)[last]
        recall = np.diff(true, prepend=0) / true[-1]
        precisions[c] = np.sum(recall * true / (last + 1))
    return precisions


def accuracy_by_class(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and number of examples of each class, for int `[n]` labels and predictions.

    Returns float64 `[num_classes]`, NaN for a class without examples, and int64 `[num_classes]`.
    """
    counts = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels[labels == predicted], minlength=num_classes)
    accuracy = np.divide(hits, counts, out=np.full(num_classes, np.nan), where=counts > 0)
    return accuracy, counts
