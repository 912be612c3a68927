# SPDX-License-Identifier: Apache-2.0
"""What `train` returns: how a run ended, its metrics, and its model."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import vit_jax
from vit_jax.observe.jsonl import read_metrics
from vit_jax.utils.layout import CHECKPOINTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """The end of a run.

    Attributes:
      workdir: folder of the run.
      step: step of the newest checkpoint.
      total_steps: length of the run by its config.
      stopped: why the run ended before `total_steps`; None if it did not.
      checkpoint: folder of the newest checkpoint; None if there is none.
      metrics: newest value of each metric, such as `val/top1`.
      history: all records by metric, as arrays of one length: row i has the values that were
        recorded at `history["step"][i]` (int64 `[n]`), float64 `[n]`, NaN where a metric has none.
        `pandas.DataFrame(result.history)` is a table of them.
    """

    workdir: Path
    step: int
    total_steps: int
    stopped: str | None
    checkpoint: Path | None
    metrics: dict[str, float] = dataclasses.field(repr=False)
    history: dict[str, np.ndarray] = dataclasses.field(repr=False)

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps at which a metric was recorded, int64 `[n]`, and its values, float64.

        Raises:
          KeyError: there is no such metric.
        """
        known = ~np.isnan(self.history[metric])
        return self.history["step"][known], self.history[metric][known]

    def load(self, **options: Any) -> "vit_jax.LoadedModel":
        """Loads the trained model; the options are those of `vit_jax.load_model`."""
        return vit_jax.load_model(self.workdir, **options)


def read_result(workdir: Path, *, step: int, total_steps: int, stopped: str | None) -> RunResult:
    """Makes the result of a run whose newest checkpoint is of `step`, from its workdir."""
    rows: dict[int, dict[str, float]] = {}
    for record in read_metrics(workdir):
        rows.setdefault(record["step"], {}).update(record)
    newest: dict[str, float] = {}
    for at in sorted(rows):
        newest |= rows[at]
    names = [name for name in newest if name != "step"]
    history: dict[str, np.ndarray] = {"step": np.array(sorted(rows), np.int64)}
    for name in names:
        column = [rows[at].get(name, np.nan) for at in sorted(rows)]
        history[name] = np.array(column, np.float64)
    return RunResult(
        workdir=workdir,
        step=step,
        total_steps=total_steps,
        stopped=stopped,
        checkpoint=workdir / CHECKPOINTS / str(step) if step else None,
        metrics={name: newest[name] for name in names},
        history=history,
    )
