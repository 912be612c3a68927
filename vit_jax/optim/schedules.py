# SPDX-License-Identifier: Apache-2.0
"""Learning rates as functions of the number of updates made."""

from typing import Literal

import optax

from vit_jax.utils.errors import UserError

Schedule = Literal["cosine", "linear", "constant"]


def make_schedule(
    *, lr: float, total_steps: int, schedule: Schedule, warmup_steps: int, end_lr: float
) -> optax.Schedule:
    """Linear warmup from 0 to `lr`, then a decay to `end_lr` at `total_steps`.

    Counts from 0, as optax does: under warmup the first update has learning rate 0.

    Raises:
      UserError: warmup that is negative or not shorter than the run.
    """
    if not 0 <= warmup_steps < max(total_steps, 1):
        raise UserError(
            f"optimizer.warmup_steps={warmup_steps}: expected 0 or more, and less than "
            f"total_steps={total_steps}"
        )
    if schedule == "constant" and end_lr:
        raise UserError(f"optimizer.end_lr={end_lr}: a constant schedule has none")
    steps = total_steps - warmup_steps
    decays = {
        "cosine": lambda: optax.cosine_decay_schedule(lr, steps, alpha=end_lr / lr if lr else 0.0),
        "linear": lambda: optax.linear_schedule(lr, end_lr, steps),
        "constant": lambda: optax.constant_schedule(lr),
    }
    if not warmup_steps:
        return decays[schedule]()
    warmup = optax.linear_schedule(0.0, lr, warmup_steps)
    return optax.join_schedules([warmup, decays[schedule]()], [warmup_steps])
