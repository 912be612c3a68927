# SPDX-License-Identifier: Apache-2.0
"""How quickly the average of the parameters forgets, as a function of the number of updates."""

from typing import Literal

import jax
import jax.numpy as jnp

EmaWarmup = Literal["count", "power", "none"]


def ema_decay(step: jax.Array, limit: float, warmup: EmaWarmup) -> jax.Array | float:
    """The decay at an update, counted from 0 (an int scalar), as a float32 scalar or a float.

    A short memory at first keeps the average from consisting of the initial values. With `warmup`
    "count" the decay is at most (1 + t) / (10 + t) at update t, as in
    `tf.train.ExponentialMovingAverage`; with "power" at most 1 - (1 + t)^(-2/3), as in timm with
    --model-ema-warmup. With "none" it is `limit` from the start, as in timm by default.
    """
    if warmup == "none":
        return limit
    if warmup == "power":
        return jnp.minimum(limit, 1 - (1.0 + step) ** (-2 / 3))
    return jnp.minimum(limit, (1 + step) / (10 + step))
