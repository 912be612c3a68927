# SPDX-License-Identifier: Apache-2.0
"""TFDS builders that come with the package; importing it registers them under their names."""

from vit_jax.data.datasets.digits.digits_dataset_builder import Builder as Digits
from vit_jax.data.datasets.digits_captions.digits_captions_dataset_builder import (
    Builder as DigitsCaptions,
)

__all__ = ["Digits", "DigitsCaptions"]
