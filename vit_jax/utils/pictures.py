# SPDX-License-Identifier: Apache-2.0
"""Images of any number of channels as people look at them."""

import numpy as np


def to_rgb(images: np.ndarray) -> np.ndarray:
    """`[..., channels]` as `[..., 3]`: of more than three channels the first three, else grey."""
    channels = images.shape[-1]
    shown = images[..., : 3 if channels >= 3 else 1]
    return np.broadcast_to(shown, (*images.shape[:-1], 3))
