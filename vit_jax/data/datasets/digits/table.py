# SPDX-License-Identifier: Apache-2.0
"""The digits table as arrays and its fixed split, for the builder and for scripts without TFDS."""

from pathlib import Path

import numpy as np

MAX_VALUE = 16  # a pixel counts the dark dots in a 4x4 block of the scan
_TABLE = Path(__file__).with_name("digits.csv.gz")


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Reads the table in its published order and values.

    Returns images uint8 `[1797, 8, 8]` of values 0 to 16, and labels int64 `[1797]`, 0 to 9.
    """
    table = np.loadtxt(_TABLE, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def to_uint8_range(images: np.ndarray) -> np.ndarray:
    """Stretches values 0..16 to the 0..255 of an ordinary grayscale image, as uint8."""
    return np.rint(images * (255 / MAX_VALUE)).astype(np.uint8)


def split_indices(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divides rows into train and test so that every class gives a fifth of its rows to test.

    The rows are shuffled, ordered by class, and every fifth one is taken. Labels are int `[n]`.
    Returns the rows of train and of test, both ascending; 1,437 and 360 for the 1,797 digits.
    """
    # RandomState and not default_rng: NumPy promises that its stream never changes.
    order = np.random.RandomState(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    test = np.sort(order[::5])
    return np.setdiff1d(np.arange(len(labels)), test), test
