# SPDX-License-Identifier: Apache-2.0
"""Test accuracy of classical methods on the split that `digits` recipes train and test on.

    python -m benchmarks.digits_baselines --json benchmarks/results/digits_baselines.json

Every method is fitted to all 1,437 training images as 64 pixel values, without augmentation, with
settings given in advance. Each is run with five seeds, because the MLP depends on them; the rest do
not. Takes about ten seconds on a CPU. One test image is 0.28 points of accuracy.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC

from benchmarks.environment import write_results
from vit_jax.data.datasets.digits.table import MAX_VALUE, load_digits, split_indices

SEEDS = range(5)


def make_classifiers(seed: int) -> dict[str, Any]:
    """The scikit-learn classifiers by name; their input is float[n, 64] with values 0..16."""
    unit_range = FunctionTransformer(lambda pixels: pixels / MAX_VALUE)
    return {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "k-NN (k=3)": KNeighborsClassifier(n_neighbors=3),
        "RBF SVM (gamma=0.001, C=10)": SVC(C=10).set_params(gamma=0.001),
        "MLP (128 hidden units)": make_pipeline(
            unit_range, MLPClassifier(hidden_layer_sizes=(128,), max_iter=1000, random_state=seed)
        ),
    }


def measure(name: str) -> dict[str, Any]:
    """Trains on train and counts errors on test, once for each seed; seconds are medians."""
    images, labels = load_digits()
    pixels = images.reshape(len(images), -1).astype(np.float64)
    train, test = split_indices(labels)

    errors, fit_seconds, predict_seconds = [], [], []
    for seed in SEEDS:
        classifier = make_classifiers(seed)[name]
        start = time.perf_counter()
        classifier.fit(pixels[train], labels[train])
        fitted = time.perf_counter()
        predicted = classifier.predict(pixels[test])
        fit_seconds.append(fitted - start)
        predict_seconds.append(time.perf_counter() - fitted)
        errors.append(int(np.sum(predicted != labels[test])))
    return {
        "test_accuracy": round(1 - float(np.mean(errors)) / len(test), 4),
        "test_errors": errors,
        "fit_seconds": round(float(np.median(fit_seconds)), 4),
        "predict_seconds": round(float(np.median(predict_seconds)), 4),
    }


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()

    results = {name: measure(name) for name in make_classifiers(seed=0)}

    table = Table("method", title="digits: 1,437 train, 360 test")
    for column in ("test accuracy", "errors", "fit", "predict"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['test_accuracy']:.2%}",
            _range(result["test_errors"]),
            f"{result['fit_seconds']:.3f} s",
            f"{result['predict_seconds']:.3f} s",
        )
    Console().print(table)

    if args.json:
        measured = {
            "data": "digits 1.0.0: 1437 train, 360 test",
            "seeds": list(SEEDS),
            "results": results,
        }
        write_results(args.json, measured, "numpy", "scikit-learn")


if __name__ == "__main__":
    main()
