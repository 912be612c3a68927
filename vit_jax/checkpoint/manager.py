# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: `WORKDIR/checkpoints/STEP/{params, ema_params, training}`, by Orbax.

Parameters are an item of their own, so that they can be read without knowing the optimizer; another
says which model they are of, and what it expects of images. A checkpoint appears under its name
only once it is complete.
"""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from vit_jax.evaluators.base import lower_is_better
from vit_jax.state import TrainState
from vit_jax.utils.errors import UserError

FOLDER = "checkpoints"
_DESCRIPTION = "description"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """When checkpoints are written and which are kept.

    Attributes:
      every: steps from one to the next; the last step always has one.
      keep: how many of the newest are kept.
      keep_best: a metric such as `val/top1`; the checkpoint that is best by it is kept as well.
        Which of two values is the better is known for each metric.
    """

    every: int = 1000
    keep: int = 2
    keep_best: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("keep", self.keep)):
            if value < 1:
                raise UserError(f"checkpoint.{name}={value}: expected at least 1")


class CheckpointManager:
    """Saves in the background, restores onto any mesh. A context manager: leaving waits.

    Args:
      workdir: of the run.
      options: when to write and what to keep.
      description: written into each checkpoint as JSON: the arguments of the `model`, and how
        images are prepared for it (`preprocess`).
    """

    def __init__(self, workdir: Path, options: CheckpointOptions, description: Mapping[str, Any]):
        self._description = dict(description)
        self._directory = workdir.absolute() / FOLDER
        preserve: list[Any] = [policies.LatestN(options.keep)]
        self._best = best = options.keep_best

        lower = best is not None and lower_is_better(best)
        worst = math.inf if lower else -math.inf

        def score(metrics: Mapping[str, float]) -> float:
            # Checkpoints of an earlier run may have been judged by another metric.
            return metrics.get(best or "", worst)

        if best:
            preserve.append(
                policies.BestN(
                    get_metric_fn=score,
                    reverse=lower,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        _remove_halves(self._directory)
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_names=("params", "ema_params", "training", _DESCRIPTION),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(preserve),
                # Without it Orbax does not store the metrics for the next run.
                best_fn=score if best else None,
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
        items: dict[str, Any] = {k: ocp.args.StandardSave(v) for k, v in _items(state).items()}
        items[_DESCRIPTION] = ocp.args.JsonSave(self._description)
        # Without it where SIGTERM came before the evaluation: this one can't be the best.
        name = self._best
        best = {name: float(metrics[name])} if name is not None and name in metrics else None
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=best)

    def restore(self, abstract_state: TrainState) -> TrainState:
        """Reads the newest checkpoint into the shapes and shardings of `abstract_state`.

        Raises:
          UserError: it can't be read, or is of another model or optimizer.
        """
        step = self.latest_step()
        items = {k: ocp.args.StandardRestore(v) for k, v in _items(abstract_state).items()}
        try:
            with _quiet_reads():
                found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, OSError) as e:
            reason = " ".join(str(e).split())[:160]
            raise UserError(
                f"--workdir: the checkpoint {self._directory / str(step)} can't be restored "
                f"({type(e).__name__}: {reason}); expected a whole one of this experiment"
            ) from e
        return TrainState(
            params=found["params"], ema_params=found.get("ema_params"), **found["training"]
        )


@contextlib.contextmanager
def _quiet_reads() -> Iterator[None]:
    """Around a restore: if it fails, Orbax drops the reads under way, and they complain later.

    Of files that it can do without it warns at any rate, by absl.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
    sys.unraisablehook = hook  # After a failure the other one stays.


def _remove_halves(directory: Path) -> None:
    """Removes what a killed run left half written.

    Orbax would do it in a thread that complains if the run ends before it, as one with bad input.
    """
    if jax.process_index() == 0:
        for half in directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(half)


def _items(state: TrainState) -> dict[str, Any]:
    items = {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state},
    }
    return items if state.ema_params is None else items | {"ema_params": state.ema_params}


def load_params(folder: Path, *, item: str = "params") -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads parameters of a run, or of any Orbax checkpoint.

    Args:
      folder: a workdir (its newest checkpoint is read), one of its checkpoints, or a folder into
        which Orbax saved a tree of arrays.
      item: of a checkpoint: "params", or "ema_params" for their average.

    Returns:
      The parameters as arrays on one local device, and what the checkpoint says of its experiment:
      see `CheckpointManager`.

    Raises:
      UserError: there is no complete checkpoint, or it can't be read.
    """
    checkpoint = find_checkpoint(folder)
    path = checkpoint if (checkpoint / "_METADATA").exists() else checkpoint / item
    if not path.is_dir():
        raise UserError(
            f"there is no {path}; expected a whole checkpoint with params, and with ema_params "
            "where ema_decay was set"
        )
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer, _quiet_reads():
            stored = checkpointer.metadata(path).item_metadata.tree
            abstract = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), stored
            )
            params = checkpointer.restore(path, abstract)
        description = checkpoint / _DESCRIPTION / "metadata"
        described = json.loads(description.read_text()) if description.exists() else {}
    except Exception as e:
        raise UserError(
            f"the checkpoint {path} can't be read ({type(e).__name__}); expected a whole one"
        ) from e
    return params, described


def list_steps(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints of a workdir."""
    return sorted(int(p.name) for p in (workdir / FOLDER).glob("*") if p.name.isdigit())


def find_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a workdir, or of a folder of checkpoints; or the one it is.

    Raises:
      UserError: it is none of them.
    """
    runs = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    steps = [int(p.name) for p in runs.glob("*") if p.name.isdigit()]
    if steps:
        return (runs / str(max(steps))).absolute()
    if any((folder / name).exists() for name in ("params", "_METADATA")):
        return folder.absolute()
    raise UserError(
        f"{str(folder)!r} has no checkpoint; expected the workdir of a run, or a checkpoint"
    )
