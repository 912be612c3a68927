# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: `WORKDIR/checkpoints/STEP/{params, ema_params, training}`, by Orbax.

Parameters are an item of their own, so that they can be read without knowing the optimizer. A
checkpoint appears under its name only once it is complete.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from vit_jax.state import TrainState
from vit_jax.utils.errors import UserError

FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """When checkpoints are written and which are kept.

    Attributes:
      every: steps from one to the next; the last step always has one.
      keep: how many of the newest are kept.
      keep_best: a metric such as `val/top1`; the checkpoint that is best by it is kept as well.
        Higher is better, but for metrics that end in `loss`.
    """

    every: int = 1000
    keep: int = 2
    keep_best: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("keep", self.keep)):
            if value < 1:
                raise UserError(f"checkpoint.{name}={value}: expected at least 1")


class CheckpointManager:
    """Saves in the background, restores onto any mesh. A context manager: leaving waits."""

    def __init__(self, workdir: Path, options: CheckpointOptions):
        self._directory = workdir.absolute() / FOLDER
        preserve: list[Any] = [policies.LatestN(options.keep)]
        self._best = best = options.keep_best

        worst = math.inf if best and best.endswith("loss") else -math.inf

        def score(metrics: Mapping[str, float]) -> float:
            # Checkpoints of an earlier run may have been judged by another metric.
            return metrics.get(best or "", worst)

        if best:
            preserve.append(
                policies.BestN(
                    get_metric_fn=score,
                    reverse=best.endswith("loss"),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_names=("params", "ema_params", "training"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(preserve),
                # Without it Orbax does not store the metrics for the next run.
                best_fn=score if best else None,
                # What a killed run left half written.
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *exc: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self._directory / str(step)

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Starts to write a checkpoint; waits only while the arrays are copied.

        Args:
          step: number of updates made.
          state: may be donated to the next step afterwards.
          metrics: of this step; needed are those that `keep_best` names.
        """
        items = {k: ocp.args.StandardSave(v) for k, v in _items(state).items()}
        best = {self._best: float(metrics[self._best])} if self._best else None
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=best)

    def restore(self, abstract_state: TrainState) -> TrainState:
        """Reads the newest checkpoint into the shapes and shardings of `abstract_state`.

        Raises:
          UserError: it can't be read, or is of another model or optimizer.
        """
        step = self.latest_step()
        items = {k: ocp.args.StandardRestore(v) for k, v in _items(abstract_state).items()}
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
            sys.unraisablehook = hook
        except (ValueError, KeyError, TypeError, OSError) as e:
            # The hook stays: Orbax drops the reads under way, and they complain later.
            reason = " ".join(str(e).split())[:160]
            raise UserError(
                f"--workdir: the checkpoint {self._directory / str(step)} can't be restored "
                f"({type(e).__name__}: {reason}); expected a whole one of this experiment"
            ) from e
        return TrainState(
            params=found["params"], ema_params=found.get("ema_params"), **found["training"]
        )


def _items(state: TrainState) -> dict[str, Any]:
    items = {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state},
    }
    return items if state.ema_params is None else items | {"ema_params": state.ema_params}


def load_params(workdir: Path) -> dict[str, Any]:
    """Parameters of the newest checkpoint of a workdir, as arrays on one local device.

    Raises:
      UserError: there is no complete checkpoint, or it can't be read.
    """
    steps = [int(p.name) for p in (workdir / FOLDER).glob("*") if p.name.isdigit()]
    if not steps:
        raise UserError(f"init_from={str(workdir)!r} has no checkpoint yet; expected a trained run")
    path = (workdir / FOLDER / str(max(steps)) / "params").absolute()
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata.tree
            abstract = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), stored
            )
            return checkpointer.restore(path, abstract)
        except Exception as e:
            raise UserError(
                f"init_from={str(workdir)!r}: the checkpoint {path} can't be read "
                f"({type(e).__name__})"
            ) from e
