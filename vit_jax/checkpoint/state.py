# SPDX-License-Identifier: Apache-2.0
"""The train state."""

from typing import Any

import flax.struct
import jax
import optax


@flax.struct.dataclass
class TrainState:
    """All that a checkpoint holds: arrays only."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema_params: Any | None
