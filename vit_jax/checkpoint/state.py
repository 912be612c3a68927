# SPDX-License-Identifier: Apache-2.0
"""The train state, which is all that a checkpoint holds of a run."""

from typing import Any

import flax.struct
import jax
import optax


@flax.struct.dataclass
class TrainState:
    """State of training after a step; arrays only.

    Attributes:
      step: number of updates made, int32 `[]`.
      params: nested dict of parameters, float32.
      opt_state: state of the optimizer for the trained parameters.
      ema_params: moving average of `params`, with its shapes, in float32; None without one.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema_params: Any | None
