# SPDX-License-Identifier: Apache-2.0
"""Likely label errors."""

from pathlib import Path

import numpy as np

from vit_jax.inference.label_errors import find_label_errors

GOLDEN = Path(__file__).parents[1] / "testdata" / "cleanlab.npz"


def test_the_errors_and_counts_are_those_of_cleanlab():
    with np.load(GOLDEN) as golden:
        found = find_label_errors(golden["probabilities"], golden["labels"])
        np.testing.assert_array_equal(found.joint, golden["joint"])
        assert sorted(found.index) == sorted(golden["issues"])
        # Theirs is rounded to whole examples.
        calibrated = golden["calibrated"]
        assert abs(found.estimated - (calibrated.sum() - np.trace(calibrated))) < len(calibrated)


def test_by_hand():
    # The thresholds are 0.7, 0.6 and, for a class without examples, infinity.
    p = np.array([[0.9, 0.1, 0], [0.5, 0.2, 0.3], [0.1, 0.9, 0], [0.8, 0.1, 0.1], [0.3, 0.8, 0]])
    labels = np.array([0, 0, 1, 1, 1])
    found = find_label_errors(p, labels)
    np.testing.assert_array_equal(found.index, [3])
    np.testing.assert_array_equal(found.suggested, [0])
    np.testing.assert_allclose(found.score, [0.7])
    np.testing.assert_array_equal(found.joint, [[1, 0, 0], [1, 2, 0], [0, 0, 0]])
    assert np.isclose(found.estimated, 1)


def test_without_errors_there_are_none():
    found = find_label_errors(np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 2, 2]))
    assert (len(found.index), found.estimated) == (0, 0)


def test_a_label_as_probable_as_any_other_class_is_no_error():
    found = find_label_errors(np.full((4, 2), 0.5), np.array([0, 1, 1, 0]))
    assert len(found.index) == 0
    assert found.estimated == 0
    np.testing.assert_array_equal(found.joint, [[2, 0], [0, 2]])
