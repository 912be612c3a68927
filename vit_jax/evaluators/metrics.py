# SPDX-License-Identifier: Apache-2.0
"""Metrics that need all examples of a split, in numpy."""

import numpy as np

TEMPERATURES = (0.01, 100.0)  # range of `fit_temperature`


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


def area_under_risk(confidence: np.ndarray, hits: np.ndarray) -> float:
    """Area under the curve of risk by coverage (AURC); lower is better.

    The n examples are accepted one by one, from the most confident on; the risk is the share of
    errors among those accepted, and the area its mean over all n coverages. Examples of equal
    confidence count by their mean, in no order. Source: Geifman et al., arXiv:1805.08206, section
    2.

    Args:
      confidence: float `[n]`.
      hits: whether each prediction is right, bool or 0 and 1, `[n]`.
    """
    return float(np.mean(risks(confidence, hits)))


def risks(confidence: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """The share of errors among the k most confident examples, float64 `[n]` for k = 1 to n."""
    order = np.argsort(-confidence, kind="stable")
    _, which = np.unique(-confidence[order], return_inverse=True)
    errors = 1.0 - np.asarray(hits, np.float64)[order]
    errors = (np.bincount(which, errors) / np.bincount(which))[which]
    return np.cumsum(errors) / np.arange(1, len(errors) + 1)


def area_under_roc(inliers: np.ndarray, outliers: np.ndarray) -> float:
    """The probability that an inlier has a larger score than an outlier; a tie counts half.

    This is the area under the receiver operating characteristic (AUROC). Both are float `[n]`.
    """
    ranked = np.sort(outliers)
    below = np.searchsorted(ranked, inliers, side="left")
    up_to = np.searchsorted(ranked, inliers, side="right")
    return float((below + up_to).mean() / 2 / len(ranked))


def calibration_error(confidence: np.ndarray, hits: np.ndarray, *, num_bins: int) -> float:
    """Expected calibration error over bins of equal width that are closed above.

    Source: Guo et al., arXiv:1706.04599, equation 3. `confidence` is float `[n]` in [0, 1].
    """
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, confidence - np.asarray(hits, np.float64))
    return float(np.abs(gaps).sum() / len(confidence))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T for which softmax(logits / T) has the least negative log-likelihood.

    The likelihood is concave in 1 / T, so its derivative is bisected, over `TEMPERATURES`. If all
    images are right, it has no maximum, and the least of these is returned. Source: Guo et al.,
    arXiv:1706.04599, section 4.2.

    Args:
      logits: float `[n, classes]`.
      labels: int `[n]`.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    own = np.take_along_axis(shifted, labels[:, None], axis=1)[:, 0]

    def slope(scale: float) -> float:
        powers = np.exp(shifted * np.float32(scale))
        expected = (powers * shifted).sum(axis=1) / powers.sum(axis=1)
        return float(np.mean(expected - own, dtype=np.float64))

    low, high = -np.log(TEMPERATURES[1]), -np.log(TEMPERATURES[0])  # of 1 / T
    for _ in range(40):
        middle = (low + high) / 2
        # It is 0 where all images are right and their exponentials underflow: no T is the best.
        low, high = (middle, high) if slope(np.exp(middle)) <= 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))
