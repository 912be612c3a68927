# SPDX-License-Identifier: Apache-2.0
"""Detects steps that diverge, and records their batches and the rollbacks that follow.

`WORKDIR/divergence/STEP.{npz,json}` hold the batch of a step and its metrics; `rollbacks.jsonl` in
the same folder is read by a run that resumes.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax.observe.console import log
from vit_jax.observe.jsonl import append_record, read_records
from vit_jax.utils.layout import DIVERGENCE, ROLLBACKS

if TYPE_CHECKING:
    import numpy as np

# What to do at such a step: end the run; keep the state and continue with the next batch; or resume
# from the last checkpoint, without the batches up to this one.
POLICIES = ("stop", "skip", "rollback")
MAX_ROLLBACKS = 3
MAX_SKIPPED_IN_A_ROW = 20
_MAX_DUMPS = 20


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A step whose metrics are not finite, or whose loss is too high.

    Attributes:
      step: number of the step, from 1.
      grad_norms: norm of the gradient of each layer.
    """

    step: int
    reason: str
    metrics: Mapping[str, float]
    grad_norms: Sequence[float]


class DivergedError(Exception):
    """The loss, gradient or parameters are not finite, or the loss is too high."""

    def __init__(self, message: str, *, step: int = 0):
        super().__init__(message)
        self.step = step


def find_divergence(
    step: int, metrics: Mapping[str, float], max_loss: float | None, grad_norms: Sequence[float]
) -> Divergence | None:
    """Returns the divergence that the metrics of a step show; None if they show none."""
    for name, value in sorted(metrics.items(), key=lambda item: item[0] != "loss"):
        if not math.isfinite(value):
            return Divergence(step, f"the {name} of step {step} is {value}", metrics, grad_norms)
    if max_loss is not None and metrics["loss"] > max_loss:
        reason = f"the loss of step {step} is {metrics['loss']:g}, more than max_loss={max_loss:g}"
        return Divergence(step, reason, metrics, grad_norms)
    return None


def write_dump(
    workdir: Path,
    divergence: Divergence,
    batch: Mapping[str, "np.ndarray"],
    records: Sequence[str],
    layers: Sequence[str],
) -> None:
    """Writes the batch of a step that diverged, and its metrics.

    Args:
      batch: the global batch `[batch, ...]` before augmentation on the device, by name.
      records: where each example comes from.
      layers: names for `divergence.grad_norms`.
    """
    import numpy as np  # Commands that only read rollbacks do without it.

    folder = workdir / DIVERGENCE
    folder.mkdir(exist_ok=True)
    if len(list(folder.glob("*.npz"))) >= _MAX_DUMPS:
        return
    path = folder / f"{divergence.step}.npz"
    arrays: dict[str, Any] = dict(batch)
    np.savez(path, **arrays)
    content = {
        "step": divergence.step,
        "reason": divergence.reason,
        # As text, since JSON has no numbers that are not finite.
        "metrics": {name: str(value) for name, value in divergence.metrics.items()},
        "grad_norms": dict(zip(layers, map(str, divergence.grad_norms), strict=True)),
        "records": list(records),
    }
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    log(f"{divergence.reason}: its batch is in {path}, more in {path.with_suffix('.json').name}")


def read_rollbacks(workdir: Path) -> list[dict[str, Any]]:
    """Returns rollbacks with the steps `to` (the checkpoint) and `past` (the one that diverged)."""
    return read_records(
        workdir / DIVERGENCE / ROLLBACKS,
        lambda record: all(type(record.get(key)) is int for key in ("to", "past")),
    )


def append_rollback(workdir: Path, *, to: int, past: int, reason: str) -> None:
    """Records a rollback before it is made."""
    append_record(workdir / DIVERGENCE / ROLLBACKS, {"to": to, "past": past, "reason": reason})


def skip_past(step: int, rollbacks: Sequence[Mapping[str, Any]]) -> int:
    """Returns the step after which a run continues from the checkpoint of `step`."""
    for rollback in rollbacks:
        if rollback["to"] <= step < rollback["past"]:
            step = rollback["past"]
    return step
