# SPDX-License-Identifier: Apache-2.0
"""Writes `cleanlab.npz`: what cleanlab 2.9.0 finds among noisy labels.

pip install --target DIR --no-deps cleanlab==2.9.0 tqdm termcolor
PYTHONPATH=DIR python tests/testdata/make_cleanlab_golden.py
"""

from pathlib import Path

import numpy as np
from cleanlab.count import compute_confident_joint
from cleanlab.filter import find_label_issues

COUNT, CLASSES = 400, 5


def main() -> None:
    """Draws probabilities and labels of which a tenth are wrong, and saves the answers."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, CLASSES, COUNT)
    labels = np.where(rng.random(COUNT) < 0.1, (true + 1) % CLASSES, true)
    logits = rng.normal(0, 1, (COUNT, CLASSES)) + 2.5 * np.eye(CLASSES)[true]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    joint, _ = compute_confident_joint(
        labels, p, calibrate=False, return_indices_of_off_diagonals=True
    )
    issues = find_label_issues(labels, p, filter_by="confident_learning")
    calibrated = compute_confident_joint(labels, p, calibrate=True)
    answers = {"joint": joint, "issues": np.flatnonzero(issues), "calibrated": calibrated}
    inputs = {"probabilities": p.astype(np.float32), "labels": labels}
    np.savez(Path(__file__).with_name("cleanlab.npz"), **inputs, **answers)


if __name__ == "__main__":
    main()
