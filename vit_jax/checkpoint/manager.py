# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: `WORKDIR/checkpoints/STEP/{params, ema_params, training}`, by Orbax.

Parameters are an item of their own, so that they can be read without knowing the optimizer; another
says which model they are of, and what it expects of images. A checkpoint appears under its name
only once it is complete, with the checksums of its files, and is verified before it is used.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.manifest import find_fault, has_manifest, sync_folder, write_manifest
from vit_jax.checkpoint.snapshot import Snapshot
from vit_jax.checkpoint.state import TrainState
from vit_jax.observe.console import log
from vit_jax.runtime.processes import broadcast_from_process_0, sum_over_processes
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.layout import BROKEN, CHECKPOINTS, RUN
from vit_jax.utils.metrics import lower_is_better

DESCRIPTION = "description"
_METRICS = "metrics"
# Of what is not complete yet, or about to go.
_HALF = ocp.utils.TMP_DIR_SUFFIX


# So many in a row that can't be written end a run.
MAX_FAILURES = 3
_PROBE = 1 << 16
# Of the next step, before a copy of the state is written.
_HEAD_START_S = 0.05


class SaveError(Exception):
    """A checkpoint could not be written."""


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

    Each checkpoint comes with the checksums of its files. Those there are verified first, the
    newest at the head, up to one that is as it was written.

    Args:
      workdir: of the run.
      options: when to write and what to keep.
      description: written into each checkpoint as JSON: the arguments of the `model`, and how
        images are prepared for it (`preprocess`).

    Attributes:
      workdir: of the run.
      run: written into each checkpoint as `run.json`: what it came from.

    Raises:
      UserError: there are checkpoints, and none is as it was written; in all processes.
    """

    def __init__(
        self,
        workdir: Path,
        options: CheckpointOptions,
        description: Mapping[str, Any],
    ):
        self._description = dict(description)
        self.run: Mapping[str, Any] = {}
        self.workdir = workdir
        self._directory = workdir.absolute() / CHECKPOINTS
        self._keep, self._best = options.keep, options.keep_best
        self._main = jax.process_index() == 0
        self._latest, self._faults = _choose(self._directory)
        if self._main:
            _remove_halves(self._directory)
            self._directory.mkdir(parents=True, exist_ok=True)
        # What Orbax logs of its threads' errors is raised as well.
        logging.getLogger("absl").addFilter(_is_not_of_orbax)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._saving = self._failures = 0
        self._error: BaseException | None = None

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, error: object, *exc: object) -> None:
        if error is None:
            self.wait(must=True)
        elif self._thread is not None:  # The other processes may not come to agree on anything.
            self._thread.join()
        self._checkpointer.close()

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._latest

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self._directory / str(step)

    def read_run(self) -> dict[str, Any]:
        """What the newest checkpoint came from; empty if it does not say."""
        file = self.path(self._latest or 0) / RUN
        return json.loads(file.read_text()) if file.exists() else {}

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Starts to write a checkpoint; waits at most while the arrays are copied to the host.

        Args:
          step: number of updates made.
          state: may be donated to the next step afterwards.
          metrics: of this step; needed are those that `keep_best` names.

        Raises:
          SaveError: see `wait`.
        """
        self.wait()
        self._saving, work = step, lambda: None
        if (refused := broadcast_from_process_0(self._try_to_write())) is not None:
            self._error = OSError(refused)
        elif (copy := self._snapshot.take(state)) is not None:
            work = functools.partial(self._write_copy, step, copy, dict(metrics))
        else:
            try:
                self._start(step, state, metrics)
                work = functools.partial(self._complete, step)
            except OSError as e:
                self._error = e
        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def _try_to_write(self) -> str | None:
        """Why nothing can be written; found out before processes wait for each other."""
        try:
            if self._main:
                with tempfile.TemporaryFile(dir=self._directory) as file:
                    file.write(bytes(_PROBE))
                    file.flush()
        except OSError as e:
            return e.strerror
        return None

    def _start(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        items: dict[str, Any] = {k: ocp.args.StandardSave(v) for k, v in _items(state).items()}
        items[DESCRIPTION] = ocp.args.JsonSave(self._description)
        # Without it where SIGTERM came before the evaluation: this one can't be the best.
        name = self._best
        if name is not None and name in metrics:
            items[_METRICS] = ocp.args.JsonSave({name: float(metrics[name])})
        self._checkpointer.save(self._half(step), args=ocp.args.Composite(**items), force=True)

    def wait(self, *, must: bool = False) -> None:
        """Waits for the checkpoint that is being written; all processes have to.

        One that can't be written is said, and the next is another try.

        Args:
          must: whether there is none to come, so that it has to be written.

        Raises:
          SaveError: it has to be written, or is one too many in a row, and can't be; in all
            processes.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if not sum_over_processes(int(error is not None))[0]:
            self._latest, self._failures = self._saving, 0
            return
        self._failures += 1
        reason = "another process failed" if error is None else describe_error(error)
        failed = SaveError(
            f"the checkpoint of step {self._saving} can't be written ({reason}); the newest is of "
            f"step {self._latest or 0}"
        )
        if must or self._failures >= MAX_FAILURES:
            raise failed from error
        log(f"{failed}: goes on, and tries again with the next")

    def _half(self, step: int) -> Path:
        return self._directory / f"{step}{_HALF}-unverified"

    def _write_copy(self, step: int, copy: TrainState, metrics: Mapping[str, float]) -> None:
        """In the background: all that `save` does otherwise, and what follows."""
        # What Orbax does in Python would hold up the next step, which is about to be queued.
        time.sleep(_HEAD_START_S)
        try:
            self._start(step, copy, metrics)
        except BaseException as e:  # for the main thread to judge
            self._error = e
        else:
            self._complete(step)

    def _complete(self, step: int) -> None:
        """In the background: checksums, then the name, then older checkpoints go."""
        try:
            self._checkpointer.wait_until_finished()
            if self._main:
                half, path = self._half(step), self.path(step)
                (half / RUN).write_text(json.dumps({"step": step, **self.run}, indent=1) + "\n")
                write_manifest(half)
                os.rename(half, path)
                sync_folder(self._directory)
                self._remove_old()
            _give_back_memory()
        except BaseException as e:  # for the main thread to judge
            self._error = e
            if self._main:
                with contextlib.suppress(OSError):
                    _remove_halves(self._directory)

    def _remove_old(self) -> None:
        steps = list_steps(self._directory.parent)
        kept = set(steps[-self._keep :])
        if self._best is not None:
            scores = {step: _read_metrics(self.path(step)).get(self._best) for step in steps}
            judged = [(value, step) for step, value in scores.items() if value is not None]
            sign = -1 if lower_is_better(self._best) else 1
            kept |= {step for _, step in sorted(judged, key=lambda x: (sign * x[0], x[1]))[-1:]}
        for step in steps:
            if step not in kept:
                # Gone at once, by name: no one takes what is half removed for a checkpoint.
                going = self._directory / f"{step}{_HALF}-removed"
                os.rename(self.path(step), going)
                shutil.rmtree(going)

    def restore(self, abstract_state: TrainState) -> TrainState:
        """Reads the newest checkpoint into the shapes and shardings of `abstract_state`.

        Damaged ones that are newer are moved to `WORKDIR/broken`.

        Raises:
          UserError: it can't be read, or is of another model or optimizer.
        """
        step = self._latest
        assert step is not None
        items = {k: ocp.args.StandardRestore(v) for k, v in _items(abstract_state).items()}
        try:
            with quiet_reads():
                found = self._checkpointer.restore(
                    self.path(step), args=ocp.args.Composite(**items)
                )
        except (ValueError, KeyError, TypeError, OSError) as e:
            raise UserError(
                f"--workdir: the checkpoint {self.path(step)} can't be restored "
                f"({describe_error(e)}); expected a whole one of this experiment"
            ) from e
        for broken, fault in self._faults.items() if self._main else ():
            place = self._directory.parent / BROKEN / str(broken)
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(exist_ok=True)
            os.rename(self.path(broken), place)
            log(f"moved to {place}: {fault}")
        self._faults = {}
        return TrainState(
            params=found["params"], ema_params=found.get("ema_params"), **found["training"]
        )


def _give_back_memory() -> None:
    """Returns to the system what the threads that wrote a checkpoint have freed.

    The C library keeps it for each thread apart, and new threads write the next one: over many
    checkpoints a process would grow by the size of one.
    """
    with contextlib.suppress(AttributeError, OSError):  # Only glibc has the function.
        ctypes.CDLL(None).malloc_trim(0)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _choose(directory: Path) -> tuple[int | None, dict[int, str]]:
    """The newest checkpoint that is as it was written, and what is wrong with newer ones.

    Process 0 reads them, and says what it skips.
    """
    chosen: dict[str, Any] = {"step": None, "faults": []}
    for step in reversed(list_steps(directory.parent)) if jax.process_index() == 0 else ():
        if (fault := find_fault(directory / str(step))) is None:
            chosen["step"] = step
            break
        chosen["faults"].append((step, fault))
    chosen = broadcast_from_process_0(chosen)
    step, faults = chosen["step"], dict(chosen["faults"])
    if faults and step is None:
        newest, fault = next(iter(faults.items()))
        raise UserError(
            f"--workdir: the checkpoint {directory / str(newest)} can't be restored: {fault}; "
            f"{'no older one is whole' if len(faults) > 1 else 'there is no other'}: to start "
            "anew, choose another workdir"
        )
    for broken, fault in faults.items():
        log(f"skipped {directory / str(broken)}, which is damaged: {fault}")
    if step is not None and not has_manifest(directory / str(step)):
        log(f"{directory / str(step)} was written without checksums: it can't be verified")
    return step, faults


def _read_metrics(checkpoint: Path) -> dict[str, float]:
    """Those that the checkpoint was judged by when it was written."""
    try:
        return json.loads((checkpoint / _METRICS / "metadata").read_text())
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def quiet_reads() -> Iterator[None]:
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
    """Removes what a killed run left half written or half removed."""
    for half in directory.glob(f"*{_HALF}*"):
        shutil.rmtree(half)


def _items(state: TrainState) -> dict[str, Any]:
    items = {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state},
    }
    return items if state.ema_params is None else items | {"ema_params": state.ema_params}
