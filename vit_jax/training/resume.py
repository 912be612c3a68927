# SPDX-License-Identifier: Apache-2.0
"""Opens a workdir and resumes its run: what must be the same, and where training continues."""

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.checkpoint.state import TrainState
from vit_jax.checkpoint.workdir import read_labels
from vit_jax.config.schema import CONTENT, Resume, may_change
from vit_jax.observe import divergence
from vit_jax.observe.console import log
from vit_jax.observe.divergence import (
    DivergedError,
    append_rollback,
    read_rollbacks,
    skip_past,
)
from vit_jax.observe.ledger import Ledger
from vit_jax.runtime.processes import broadcast_from_process_0
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError, describe_error, suggest
from vit_jax.utils.layout import CHECKPOINTS, CONFIG, DIVERGENCE, LABELS, METRICS
from vit_jax.utils.nested import flatten_config


def open_workdir(
    path: str,
    config: dict[str, Any],
    class_names: tuple[str, ...] | None = None,
    resume: Resume | None = None,
) -> Path:
    """Creates a workdir, or checks that an existing one belongs to this experiment.

    Args:
      path: a local or shared folder.
      config: the resolved config.
      class_names: the names by label, or None where the data has none.
      resume: what may differ from the workdir's own config.

    Raises:
      UserError: it can't be written to, belongs to another experiment or program, or was trained
        with other class names.
    """
    if "://" in path:
        raise UserError(f"--workdir={path!r}: expected a folder; mount a bucket to use it as one")
    resume = resume or Resume()
    flat = _flatten(config)
    for key in resume.keys:
        if key != CONTENT and not any(k == key or k.startswith(f"{key}.") for k in flat):
            options = {*flat, *(k.partition(".")[0] for k in flat), CONTENT}
            raise UserError(f"resume.allow: {key!r} is no key{suggest(key, options)}")
    workdir = Path(path)
    file = workdir / CONFIG
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
        previous = json.loads(file.read_text()) if file.exists() else None
        old_names = read_labels(workdir)
        if not isinstance(previous, dict | None):
            raise ValueError(f"{file} holds no config")
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"--workdir={path!r} can't be used: {describe_error(e)}") from None
    if previous is not None:
        _compare(path, _flatten(previous), flat, resume)
        if class_names is not None and old_names is not None:
            _compare_labels(path, old_names, class_names)
    else:
        checkpoints = workdir / CHECKPOINTS
        if (workdir / METRICS).exists() or (checkpoints.exists() and any(checkpoints.iterdir())):
            raise UserError(
                f"--workdir={path!r} holds metrics or checkpoints but no {CONFIG}: it is not a "
                "workdir of vit_jax; choose another"
            )
    return workdir


def _compare_labels(path: str, old: Sequence[str], new: Sequence[str]) -> None:
    for label, (before, now) in enumerate(itertools.zip_longest(old, new)):
        if before != now:
            raise UserError(
                f"--workdir={path!r}: {LABELS} has {len(old)} classes, the data {len(new)}; label "
                f"{label} is {before!r} there and {now!r} here: expected the same, or another "
                "workdir"
            )


def check_data(
    path: str, before: Mapping[str, Any], now: Mapping[str, Any], resume: Resume
) -> None:
    """Checks that a run resumes with the records that it was trained on.

    Args:
      path: of the workdir.
      before: the description in the checkpoint, see `provenance.describe_run`.
      now: that of this start.
      resume: what may differ.

    Raises:
      UserError: the records differ, and `resume` does not allow that.
    """
    if before.get("data") in (None, now["data"]):
        return
    what = f"data.content is {before['data']} there and {now['data']} here: other records or labels"
    if not resume.allows(CONTENT):
        raise UserError(
            f"--workdir={path!r}: {what} than those that it was trained on; bring them back, or "
            f"add --config.resume.allow={CONTENT}"
        )
    log(what)


def _compare(path: str, old: dict[str, Any], new: dict[str, Any], resume: Resume) -> None:
    if added := [f"{key}={new[key]!r}" for key in sorted(new.keys() - old.keys())]:
        # A later version of the package has more keys; their defaults are what was there before.
        log(f"config keys that the run was started without: {', '.join(added)}")
    refused = {}
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after or key not in old:
            continue
        if may_change(key) or resume.allows(key):
            log(f"config.{key}: {before!r} before, {after!r} now")
        else:
            refused[key] = f"config.{key} is {before!r} there and {after!r} here"
    if refused:
        raise UserError(
            f"--workdir={path!r} belongs to another experiment: {'; '.join(refused.values())}; "
            "choose another workdir, or the same value, or go on nevertheless with "
            f"--config.resume.allow={','.join(refused)}"
        )


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    # As JSON has it, so that a tuple equals the list that is read back.
    flat = flatten_config(json.loads(json.dumps(config)))
    return {key: value for key, value in flat.items() if value != {}}


def restore(experiment: Experiment, checkpoints: CheckpointManager) -> tuple[int, TrainState]:
    """The step after which a run starts or resumes, and the state to do so with."""
    saved = checkpoints.latest_step() or 0
    if saved:
        state = checkpoints.restore(experiment.abstract_state)
        log(f"going on from {checkpoints.path(saved)}")
    else:
        state = experiment.init_state()
    rollbacks = read_rollbacks(checkpoints.workdir)
    start = skip_past(saved, broadcast_from_process_0(rollbacks))
    if start > saved:
        log(f"steps {saved + 1} to {start} are left out: one of them diverged")
        state = dataclasses.replace(state, step=state.step + (start - saved))
    return start, state


def plan_rollback(
    experiment: Experiment, checkpoints: CheckpointManager, ledger: Ledger, error: DivergedError
) -> None:
    """Writes down which steps `restore` will leave out.

    Raises:
      DivergedError: the config asks for no rollback, or one would not help.
    """
    workdir, policy = checkpoints.workdir, experiment.settings.on_divergence
    advice = f"see {workdir / DIVERGENCE} and docs/faults.md"
    done = len(broadcast_from_process_0(read_rollbacks(workdir)))
    if policy != "rollback":
        others = "rollback" if policy == "skip" else "skip or rollback"
        advice += f"; --config.on_divergence={others} goes on without that batch"
    elif done == divergence.MAX_ROLLBACKS:
        advice += f"; {done} rollbacks have not helped"
    elif error.step < experiment.total_steps:
        checkpoints.wait()
        to = checkpoints.latest_step() or 0
        if jax.process_index() == 0:
            append_rollback(workdir, to=to, past=error.step, reason=str(error))
        ledger.write_rollback(to=to, past=error.step)
        log(f"{error}: goes back to step {to}")
        return
    raise DivergedError(f"{error}; {advice}", step=error.step) from error
