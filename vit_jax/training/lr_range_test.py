# SPDX-License-Identifier: Apache-2.0
"""A learning-rate range test: a few steps of a run, while the learning rate rises exponentially.

Source: Smith, Cyclical Learning Rates for Training Neural Networks, arXiv:1506.01186, section 3.3.
"""

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vit_jax.config.build import build_parts
from vit_jax.observe.console import console
from vit_jax.observe.divergence import DivergedError
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.runtime.preemption import Preempted
from vit_jax.training.run import train
from vit_jax.utils.durations import LENGTH
from vit_jax.utils.errors import UserError

# Weight of the past in the smoothed loss.
_SMOOTHING = 0.9
# The test ends where the smoothed loss is this many times its lowest value.
_DIVERGED = 4.0
# Steps at the start at which the smoothed loss is still noise.
_NOISE = 5
# Keys of the optimizer that decide the schedule, which is that of the test.
_SCHEDULE = (
    *("schedule", "schedules", "start_lr", "end_lr", "timescale", "decay_from", "lr_every"),
    *("train_after", "weight_decay_end"),
)
_LASTING = ("warmup_", "cooldown_", "teacher_temp_warmup_")


@dataclasses.dataclass(frozen=True)
class LrRangeTest:
    """The result of a learning-rate range test.

    Attributes:
      rates: learning rate of each step, float64 `[n]`.
      losses: training loss of each step, float64 `[n]`.
      end: why the test ended, in words.
      lr: learning rate of the config.
      scale: factor on `lr` by which `optimizer.lr_scaling` makes the rate of the run.
    """

    rates: np.ndarray
    losses: np.ndarray
    end: str
    lr: float
    scale: float

    @property
    def smoothed(self) -> np.ndarray:
        """The loss as a moving average without bias, float64 `[n]`."""
        return smooth(self.losses)

    @property
    def lowest(self) -> float:
        """The rate at which the smoothed loss was lowest."""
        return float(self.rates[np.argmin(self.smoothed)])

    @property
    def fastest(self) -> float | None:
        """The rate at which the smoothed loss fell fastest; None if it did not fall."""
        return find_fastest(self.rates, self.smoothed)

    @property
    def suggestion(self) -> float | None:
        """`fastest` as a value of `optimizer.lr`, of two digits; None if the loss did not fall."""
        fastest = self.fastest
        return None if fastest is None else float(f"{fastest / self.scale:.2g}")


def smooth(losses: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns the exponential moving average of losses, float64 `[n]`, without the bias to 0."""
    average, smoothed = 0.0, []
    for count, loss in enumerate(losses, 1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * float(loss)
        smoothed.append(average / (1 - _SMOOTHING**count))
    return np.array(smoothed, np.float64)


def find_fastest(rates: np.ndarray, smoothed: np.ndarray) -> float | None:
    """Returns the rate at which a smoothed loss falls fastest over the logarithm of the rate.

    Args:
      rates: float64 `[n]`, rising.
      smoothed: float64 `[n]`.

    Returns:
      A rate before that of the lowest loss; None if the loss does not fall.
    """
    start = min(_NOISE, len(rates) // 4)
    lowest = int(np.argmin(smoothed))
    if lowest - start < 2:
        return None
    slopes = np.gradient(smoothed, np.log(rates))[start:lowest]
    fastest = start + int(np.argmin(slopes))
    return float(rates[fastest]) if slopes.min() < 0 else None


def run_lr_range_test(
    config: ConfigDict | Mapping[str, Any],
    *,
    steps: int = 200,
    min_lr: float = 1e-6,
    max_lr: float = 1.0,
) -> LrRangeTest:
    """Takes the first steps of a run with a rising learning rate; nothing is kept of it.

    Args:
      config: of the run. Its length, schedule, evaluators and trackers are not used.
      steps: length of the test.
      min_lr: learning rate of the first step.
      max_lr: learning rate after the last step.

    Raises:
      UserError: bad input.
      KeyboardInterrupt: Ctrl-C or SIGTERM came.
    """
    if not 0 < min_lr < max_lr:
        raise UserError(f"min_lr={min_lr} and max_lr={max_lr}: expected 0 < min_lr < max_lr")
    if steps < 10:
        raise UserError(f"steps={steps}: expected at least 10")
    config = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    optimizer = build_parts(config).optimizer
    scale = optimizer.peak_lr / optimizer.lr if optimizer.lr else 1.0
    changed = _make_config(config, optimizer.weight_decay, steps=steps, lrs=(min_lr, max_lr))
    rates: list[float] = []
    losses: list[float] = []
    ended = f"took all {steps} steps"
    quiet = console.quiet
    with (
        ProgressLog("steps", total=steps, unit="steps") as progress,
        tempfile.TemporaryDirectory(prefix="vit_jax_lr_") as workdir,
    ):

        def follow(record: Mapping[str, Any]) -> None:
            if "train/loss" not in record:
                return
            rates.append(record["train/lr"])
            losses.append(record["train/loss"])
            progress.advance(1)
            smoothed = smooth(losses)
            # An exception ends the run without a checkpoint.
            if len(losses) > _NOISE and smoothed[-1] > _DIVERGED * smoothed.min():
                raise _EndedError(f"the loss was {_DIVERGED:g} times its lowest")
            if record["step"] == steps:
                raise _EndedError("")

        console.quiet = True
        try:
            train(changed, workdir, on_record=follow)
        except (_EndedError, DivergedError) as e:
            if str(e):
                at = f"step {len(losses)}, learning rate {rates[-1]:.3g}" if rates else "step 1"
                reason = str(e).partition(";")[0]
                ended = f"stopped at {at}: {reason}"
        except Preempted:
            raise KeyboardInterrupt from None
        finally:
            console.quiet = quiet
    finite = [math.isfinite(loss) and rate > 0 for rate, loss in zip(rates, losses, strict=True)]
    if sum(finite) < 2:
        raise UserError(
            f"the learning-rate range test {ended}: expected losses of several steps; start with a "
            f"smaller min_lr than {min_lr:g}"
        )
    return LrRangeTest(
        rates=np.array(rates, np.float64)[finite],
        losses=np.array(losses, np.float64)[finite],
        end=ended,
        lr=optimizer.lr,
        scale=scale,
    )


class _EndedError(Exception):
    """The test has seen enough."""


def _make_config(
    config: Mapping[str, Any], weight_decay: float, *, steps: int, lrs: tuple[float, float]
) -> dict[str, Any]:
    """Returns the config of the test; its weight decay is relative to the learning rate."""
    given = (config.get("optimizer") or {}).items()
    own = {k: v for k, v in given if k not in _SCHEDULE and not k.startswith(_LASTING)}
    own |= {"schedule": "exponential", "lr": lrs[0], "end_lr": lrs[1]}
    own |= {"lr_scaling": "none", "base_batch_size": None}
    own |= {"weight_decay": weight_decay, "weight_decay_times": "lr"}
    rest = {
        k: v
        for k, v in config.items()
        if k not in (*LENGTH, "ema_decay", "stop") and not k.startswith("log_every")
    }
    objective = config.get("objective") or {}
    rest["objective"] = {k: v for k, v in objective.items() if not k.startswith(_LASTING)}
    unused = dict.fromkeys(("checkpoint", "evals", "profile"))
    return (
        rest
        | unused
        | {
            "total_steps": steps,
            "log_every": 1,
            "optimizer": own,
            "on_divergence": "stop",
            "tracking": {"images": 0},
        }
    )
