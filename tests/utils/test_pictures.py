# SPDX-License-Identifier: Apache-2.0
"""Images of any number of channels are shown."""

import numpy as np
import pytest

from vit_jax.utils.pictures import to_rgb


@pytest.mark.parametrize(
    ("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])]
)
def test_three_channels_are_shown_of_any_number(channels, shown):
    images = np.random.default_rng(0).integers(256, size=(2, 4, 5, channels)).astype(np.uint8)
    np.testing.assert_array_equal(to_rgb(images), images[..., shown])
