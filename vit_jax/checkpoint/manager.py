# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: `WORKDIR/checkpoints/STEP/{params, ema_params, training}`, by Orbax.

Parameters are a separate item, so that they can be read without knowing the optimizer; another item
describes their model and the preprocessing that it expects. A checkpoint gets its name only once it
is complete, with the checksums of its files, and is verified before it is used.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vit_jax.checkpoint.chunks import fetch_needed, is_chunk
from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.manifest import (
    find_fault,
    has_manifest,
    measure_files,
    sync_folder,
    write_manifest,
)
from vit_jax.checkpoint.snapshot import Snapshot
from vit_jax.checkpoint.state import TrainState
from vit_jax.checkpoint.workdir import read_run
from vit_jax.observe.console import log
from vit_jax.runtime.processes import (
    broadcast_from_process_0,
    fail_together,
    sum_over_processes,
)
from vit_jax.utils.bounds import read_json
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.layout import BROKEN, CHECKPOINTS, RUN
from vit_jax.utils.metrics import find_best_step
from vit_jax.utils.mirrors import find_mirror, refresh

DESCRIPTION = "description"
_METRICS = "metrics"
# Part of the name of a folder that is incomplete or being removed.
_HALF = ocp.utils.TMP_DIR_SUFFIX
# A run ends after this many failed saves in a row.
MAX_FAILURES = 3
_PROBE = 1 << 16
# Seconds to let the next step dispatch before a copy of the state is written.
_HEAD_START_S = 0.05


class SaveError(Exception):
    """A checkpoint could not be written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """When checkpoints are written and which are kept.

    Attributes:
      every: steps from one to the next; the last step always has one.
      keep: how many of the newest are kept.
      keep_best: a metric such as `val/top1`; the checkpoint with its best value is kept as well.
        Whether lower is better follows from the name, see `lower_is_better`; a value that is not
        finite is not compared.
    """

    every: int = 1000
    keep: int = 2
    keep_best: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("keep", self.keep)):
            if value < 1:
                raise UserError(f"checkpoint.{name}={value}: expected at least 1")


class CheckpointManager:
    """Saves train states in the background, and restores them onto any mesh.

    A context manager, which waits for the last save when it is left. Each checkpoint holds the
    checksums of its files. On creation the newest existing checkpoint that is not damaged is found.

    Args:
      workdir: of the run.
      options: when to write and what to keep.
      description: written into each checkpoint as JSON: arguments of the `model`, and how images
        are prepared for it (`preprocess`).
      keep: returns the part of a tree of parameters that is written.

    Attributes:
      workdir: of the run.
      keep_params: `keep`, which may be replaced.
      base: written into the description: where the parameters that `keep` drops are read from.
      run: written into each checkpoint as `run.json`, see `provenance.describe_run`.

    Raises:
      UserError: there are checkpoints, and all are damaged, or their folder can't be used; raised
        in all processes.
    """

    def __init__(
        self,
        workdir: Path,
        options: CheckpointOptions,
        description: Mapping[str, Any],
        *,
        keep: Callable[[Any], Any] = lambda params: params,
    ):
        self._description, self.keep_params = dict(description), keep
        self.base: Mapping[str, Any] = {}
        self.run: Mapping[str, Any] = {}
        self.workdir = workdir
        self._directory = workdir.absolute() / CHECKPOINTS
        # Where the workdir is in a bucket: checkpoints are written to its local copy and uploaded.
        self._mirror = find_mirror(workdir)
        self._keep, self._best = options.keep, options.keep_best
        self._main = jax.process_index() == 0
        self._latest, self._faults = choose_checkpoint(self._directory)
        with fail_together():
            if self._main or self._mirror is not None:
                self._open()
        # Steps whose checkpoints can't be removed: logged once.
        self._stuck = set[int]()
        _silence_failed_saves()
        # Whether each process has a folder of its own, so that none sees what others write.
        self._apart = self._mirror is not None and jax.process_count() > 1
        self._checkpointer = _make_checkpointer(apart=self._apart)
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._saving = self._failures = 0
        self._unlogged: Mapping[str, Any] | None = None
        self._error: BaseException | None = None

    def _open(self) -> None:
        """Makes the folder of the checkpoints, and removes what a killed run left half done."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            _remove_halves(self._directory)
        except OSError as e:
            raise UserError(
                f"--workdir: {self._directory} can't be used ({e.strerror}); expected a folder of "
                "checkpoints to write to"
            ) from None

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, error: object, *exc: object) -> None:
        if error is None:
            self.wait(must=True)
        elif self._thread is not None:  # Other processes may not take part in a collective.
            self._thread.join()
        self._checkpointer.close()

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None if there is none."""
        return self._latest

    def path(self, step: int) -> Path:
        """Returns the folder of the checkpoint of a step."""
        return self._directory / str(step)

    def read_base(self) -> dict[str, Any]:
        """Returns `base` of the newest checkpoint; empty if it has none."""
        if self._latest is None:
            return {}
        described = read_json(self.path(self._latest) / DESCRIPTION / "metadata")
        return described.get("base", {})

    def read_run(self) -> dict[str, Any]:
        """Returns `run.json` of the newest checkpoint; empty if it has none."""
        return {} if self._latest is None else read_run(self.path(self._latest))

    def save(
        self,
        step: int,
        state: TrainState,
        metrics: Mapping[str, float],
        *,
        unlogged: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to write a checkpoint; blocks at most while the arrays are copied to the host.

        Args:
          step: number of updates made.
          state: any shapes, dtypes and shardings; may be donated to the next step afterwards.
          metrics: of this step by name; only the one of `keep_best` is used.
          unlogged: metrics since the last record, which `read_run` returns as `unlogged`; JSON.

        Raises:
          SaveError: see `wait`.
        """
        self.wait()
        state = self._select(state)
        if not math.isfinite(value := metrics.get(self._best or "", 0.0)):
            log(f"{self._best} of step {step} is {value}: its checkpoint can't be the best")
        self._saving, self._unlogged, work = step, unlogged, lambda: None
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

    def _select(self, state: TrainState) -> TrainState:
        """The part of a state that is written."""
        ema = None if state.ema_params is None else self.keep_params(state.ema_params)
        return dataclasses.replace(state, params=self.keep_params(state.params), ema_params=ema)

    def _try_to_write(self) -> str | None:
        """Returns why nothing can be written; checked before processes wait for each other."""
        try:
            if self._main:
                # What a failed save has left, before other processes upload their parts.
                if self._mirror is not None and self._failures:
                    self._mirror.remove_halves()
                with tempfile.TemporaryFile(dir=self._directory) as file:
                    file.write(bytes(_PROBE))
                    file.flush()
        except OSError as e:
            return e.strerror
        return None

    def _start(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        items: dict[str, Any] = {k: ocp.args.StandardSave(v) for k, v in _items(state).items()}
        base = {"base": dict(self.base)} if self.base else {}
        items[DESCRIPTION] = ocp.args.JsonSave({**self._description, **base})
        # After SIGTERM there was no evaluation, and this checkpoint can't be the best.
        name = self._best
        if name is not None and math.isfinite(metrics.get(name, math.nan)):
            items[_METRICS] = ocp.args.JsonSave({name: float(metrics[name])})
        self._checkpointer.save(self._half(step), args=ocp.args.Composite(**items), force=True)

    def wait(self, *, must: bool = False) -> None:
        """Waits for the checkpoint that is being written; a collective of all processes.

        A failure is logged, and the next save tries again.

        Args:
          must: whether a failure is an error because no other save follows.

        Raises:
          SaveError: the save failed, and `must` is set or too many in a row have failed; raised in
            all processes.
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
        log(f"{failed}: continues, and tries again with the next")

    def _half(self, step: int) -> Path:
        return self._directory / f"{step}{_HALF}-unverified"

    def _write_copy(self, step: int, copy: TrainState, metrics: Mapping[str, float]) -> None:
        """Runs in the background: writes a copy of the state, then completes the checkpoint."""
        # The Python code of Orbax would delay the next step, which is about to be dispatched.
        time.sleep(_HEAD_START_S)
        try:
            self._start(step, copy, metrics)
        except BaseException as e:  # raised or logged by the main thread
            self._error = e
        else:
            self._complete(step)

    def _complete(self, step: int) -> None:
        """Runs in the background: writes checksums, renames, then removes old checkpoints."""
        try:
            self._checkpointer.wait_until_finished()
            if self._apart and not self._main:
                assert self._mirror is not None
                half = self._half(step)
                # Descriptions are those of the first process.
                files = {k: v for k, v in measure_files(half).items() if is_chunk(k)}
                self._mirror.upload_part(step, files, half, process=jax.process_index())
                _remove(half)
            if self._main:
                half, path = self._half(step), self.path(step)
                unlogged = {"unlogged": dict(self._unlogged)} if self._unlogged else {}
                run = {"step": step, **unlogged, **self.run}
                (half / RUN).write_text(json.dumps(run, indent=1) + "\n")
                if os.path.lexists(path):
                    self._set_aside(step, "the new checkpoint of this step takes its place")
                if self._mirror is None:
                    write_manifest(half)
                else:
                    others = range(1, jax.process_count()) if self._apart else ()
                    write_manifest(half, others=self._mirror.wait_for_parts(step, others))
                    self._mirror.upload_checkpoint(step, half)
                    self._mirror.drop_arrays(half)
                os.rename(half, path)
                sync_folder(self._directory)
                self._remove_old(step)
            _give_back_memory()
        except BaseException as e:  # raised or logged by the main thread
            self._error = e
            if self._main or self._apart:
                with contextlib.suppress(OSError):
                    _remove_halves(self._directory)

    def _set_aside(self, step: int, why: str) -> None:
        """Moves a file or folder with the name of a checkpoint aside, and keeps it."""
        path, error = self.path(step), OSError()
        if self._mirror is not None:
            try:
                log(f"moved to {self.workdir / self._mirror.set_aside(step)}: {why}")
                _remove(path)
            except OSError as e:
                log(f"{path} can't be moved aside ({e.strerror}): {why}")
            return
        # The second place is for checkpoints that a link has put on another disk.
        for place in (self.workdir / BROKEN / str(step), self._directory / f"{BROKEN}-{step}"):
            try:
                place.parent.mkdir(exist_ok=True)
                others = (Path(f"{place}-{i}") for i in itertools.count(2))
                names = itertools.chain([place], others)
                place = next(name for name in names if not os.path.lexists(name))
                os.rename(path, place)
                log(f"moved to {place}: {why}")
                return
            except OSError as e:
                error = e
        log(f"{path} can't be moved aside ({error.strerror}): {why}")

    def _remove_old(self, newest: int) -> None:
        # What has a later step is no checkpoint of this run, and can't take the place of one.
        steps = [step for step in list_steps(self.workdir) if step <= newest]
        kept = set(steps[-self._keep :])
        if self._best is not None:
            scores = {step: _read_metric(self.path(step), self._best) for step in steps}
            best = find_best_step(scores, self._best)
            kept |= set() if best is None else {best}
        for step in set(steps) - kept - self._stuck:
            # Renamed first, so that a half-removed folder is not taken for a checkpoint.
            going = self._directory / f"{step}{_HALF}-removed"
            try:
                if self._mirror is not None:
                    self._mirror.remove_checkpoint(step)
                os.rename(self.path(step), going)
                _remove(going)
            except OSError as e:
                self._stuck.add(step)
                log(
                    f"{self.path(step)} can't be removed ({e.strerror}): it is kept, and takes "
                    "space"
                )

    def restore(self, abstract_state: TrainState) -> TrainState:
        """Reads the newest checkpoint that is not damaged.

        Damaged ones that are newer are moved to `WORKDIR/broken`.

        Args:
          abstract_state: shapes, dtypes and shardings (`jax.ShapeDtypeStruct`) of the result, which
            has the parameters that `keep` keeps.

        Raises:
          UserError: the checkpoint can't be read, or is of another model or optimizer.
        """
        step = self._latest
        assert step is not None
        wanted = _items(self._select(abstract_state))
        items = {k: ocp.args.StandardRestore(v) for k, v in wanted.items()}
        with fail_together():  # Each process reads its own copy.
            refresh(self.workdir)
            if self._mirror is not None:
                fetch_needed(self.path(step), wanted)
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
        if self._mirror is not None:
            self._mirror.drop_arrays(self.path(step))
        for broken, fault in self._faults.items() if self._main else ():
            self._set_aside(broken, fault)
        self._faults = {}
        return TrainState(
            params=found["params"], ema_params=found.get("ema_params"), **found["training"]
        )


def _make_checkpointer(*, apart: bool) -> ocp.AsyncCheckpointer:
    """Returns what writes a checkpoint.

    Args:
      apart: whether each process writes its part to a folder of its own. Then each chunk of an
        array is a file, so that the files of all processes together are the checkpoint; else few
        large files hold them.
    """
    if not apart:
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    each = ocp.options.MultiprocessingOptions(primary_host=None)
    arrays: dict[str, Any] = {
        item: ocp.StandardCheckpointHandler(multiprocessing_options=each, use_ocdbt=False)
        for item in ("params", "ema_params", "training")
    }
    texts: dict[str, Any] = {
        item: ocp.JsonCheckpointHandler(multiprocessing_options=each)
        for item in (DESCRIPTION, _METRICS)
    }
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=each), **arrays, **texts
    )
    return ocp.AsyncCheckpointer(handler, multiprocessing_options=each)


def _give_back_memory() -> None:
    """Returns to the system the memory that the threads that wrote a checkpoint have freed.

    The C library keeps it for each thread separately, and new threads write the next checkpoint, so
    a process would grow by the size of one over many checkpoints.
    """
    with contextlib.suppress(AttributeError, OSError):  # Only glibc has the function.
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _silence_failed_saves() -> None:
    """Silences what Orbax and its event loop print about a save that fails, which is one line here.

    Orbax logs the errors that it raises, asyncio those of the other arrays, and TensorStore prints
    one for each array that is done when the event loop is gone.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(
        lambda record: "never retrieved" not in record.getMessage()
    )
    hook = sys.unraisablehook

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = report


def choose_checkpoint(directory: Path) -> tuple[int | None, dict[int, str]]:
    """Returns the newest step that is not damaged, and the faults of newer steps.

    Process 0 reads the checkpoints, without writing anything; the faults are logged.

    Args:
      directory: the folder of the checkpoints, which may be missing.

    Raises:
      UserError: there are checkpoints, and all are damaged; raised in all processes.
    """
    chosen: dict[str, Any] = {"step": None, "faults": []}
    with fail_together():
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
            "from scratch, choose another workdir"
        )
    for broken, fault in faults.items():
        log(f"skipped {directory / str(broken)}, which is damaged: {fault}")
    if step is not None and not has_manifest(directory / str(step)):
        log(f"{directory / str(step)} was written without checksums: it can't be verified")
    return step, faults


def _read_metric(checkpoint: Path, name: str) -> float:
    """Returns the metric of `keep_best` that was written with a checkpoint; NaN without one."""
    try:
        return float(read_json(checkpoint / _METRICS / "metadata")[name])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return math.nan


@contextlib.contextmanager
def quiet_reads() -> Iterator[None]:
    """Silences what Orbax prints about reads that a failed restore abandons.

    Its warnings about optional files, which it logs by absl, are silenced too.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
    sys.unraisablehook = hook  # Not restored after a failure: abandoned reads end later.


def _remove_halves(directory: Path) -> None:
    """Removes what a killed run left half written or half removed."""
    for half in directory.glob(f"*{_HALF}*"):
        try:
            _remove(half)
        except OSError as e:
            log(
                f"{half} can't be removed ({e.strerror}): it is not a whole checkpoint, and is kept"
            )


def _remove(path: Path) -> None:
    """Removes a folder, a file or a link, but not what a link leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _items(state: TrainState) -> dict[str, Any]:
    items = {
        "params": state.params,
        "training": {"step": state.step, "opt_state": state.opt_state},
    }
    return items if state.ema_params is None else items | {"ema_params": state.ema_params}
