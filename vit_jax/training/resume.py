# SPDX-License-Identifier: Apache-2.0
"""Opens a workdir and resumes its run: what must be the same, and where training continues."""

import dataclasses
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.checkpoint.pretrained.base import check_base, describe_base
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.checkpoint.state import TrainState
from vit_jax.checkpoint.workdir import check_files, find_config, read_labels
from vit_jax.config.schema import CONTENT, Resume, may_change
from vit_jax.objectives.base import Params
from vit_jax.observe import divergence
from vit_jax.observe.console import log
from vit_jax.observe.divergence import (
    DivergedError,
    append_rollback,
    read_rollbacks,
    skip_past,
)
from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.ledger import Ledger, read_ledger
from vit_jax.runtime.processes import broadcast_from_process_0, fail_together
from vit_jax.training.experiment import Experiment
from vit_jax.training.step import follow_average
from vit_jax.utils.durations import LENGTH
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.files import check_writable
from vit_jax.utils.layout import CHECKPOINTS, CONFIG, DIVERGENCE, LABELS, METRICS, ROLLBACKS
from vit_jax.utils.nested import as_tuples, flatten_config
from vit_jax.utils.suggestions import suggest
from vit_jax.utils.text import encode_text

# The value of a key that a config does not have.
_ABSENT: Any = type("Absent", (), {"__repr__": lambda _: "not set"})()
_OTHER_SCHEDULE = (
    "; the learning rate follows the schedule of the new length from here on, so the result is not "
    "that of a run that had this length from its start"
)


def open_workdir(
    path: str,
    config: dict[str, Any],
    class_names: tuple[str, ...] | None = None,
    resume: Resume | None = None,
    *,
    resolve: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    total_steps: int | None = None,
    dry_run: bool = False,
) -> Path:
    """Creates a workdir, or checks that an existing one belongs to this experiment.

    Args:
      path: a local or shared folder.
      config: the resolved config.
      class_names: the names by label, or None where the data has none.
      resume: what may differ from the workdir's own config.
      resolve: returns a config with the defaults of keys that it lacks, or raises `UserError`; None
        where the defaults are not known.
      total_steps: of the config; None where it is not known.
      dry_run: whether all is checked and nothing is written.

    Raises:
      UserError: it can't be written to, belongs to another experiment or program, was trained with
        other class names, or has lost its checkpoints.
    """
    if encode_text(path) != os.fsencode(path):
        raise UserError(f"--workdir={path!r}: checkpoints can't be written there: expected UTF-8")
    resume = resume or Resume()
    workdir = Path(path)
    try:
        if dry_run:
            check_writable(workdir)
        else:
            workdir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=workdir):
                pass
        check_files(workdir)
        old_names = read_labels(workdir)
    except (OSError, ValueError) as e:
        raise UserError(f"--workdir={path!r} can't be used: {describe_error(e)}") from None
    newest = max(list_steps(workdir), default=0)  # raises where they can't be listed
    previous = find_config(workdir)
    keys = [*flatten_config(config), *flatten_config(previous or {})]
    for key in resume.keys:
        if key != CONTENT and not any(k == key or k.startswith(f"{key}.") for k in keys):
            options = {*keys, *(k.partition(".")[0] for k in keys), CONTENT}
            raise UserError(f"resume.allow: {key!r} is not a key{suggest(key, options)}")
    if previous is not None:
        trains = total_steps is None or newest < total_steps
        _compare(path, previous, config, resume, resolve, trains=trains)
        _check_progress(path, workdir)
    else:
        checkpoints = workdir / CHECKPOINTS
        if (workdir / METRICS).exists() or (checkpoints.exists() and any(checkpoints.iterdir())):
            raise UserError(
                f"--workdir={path!r} holds metrics or checkpoints but no {CONFIG}: it is not a "
                "workdir of vit_jax; choose another"
            )
    if class_names is not None and old_names is not None:
        _compare_labels(path, old_names, class_names)
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
    if now.get("config", {}).get("data", {}).get("tokenizer"):
        what += ", or other captions or another vocabulary,"
    if not resume.allows(CONTENT):
        raise UserError(
            f"--workdir={path!r}: {what} than those that it was trained on; bring them back, or "
            f"add --config.resume.allow={CONTENT}"
        )
    log(what)


def _compare(
    path: str,
    old: dict[str, Any],
    new: dict[str, Any],
    resume: Resume,
    resolve: Callable[[dict[str, Any]], Mapping[str, Any]] | None,
    *,
    trains: bool,
) -> None:
    changes = dict(_find_changes(_as_json(old), _as_json(new)))
    values: list[str] = []
    if added := [key for key, (before, _) in changes.items() if before is _ABSENT]:
        # A later version of the package has more keys; their defaults are what was there before.
        defaults = _find_defaults(old, resolve)
        if defaults is not None:
            added = [key for key in added if changes[key][1] == defaults.get(key)]
        values = [f"{key}={changes.pop(key)[1]!r}" for key in added]
    refused = {
        key: f"{key} is {before!r} there and {after!r} here"
        for key, (before, after) in changes.items()
        if not (may_change(key) or resume.allows(key))
    }
    if refused:
        raise UserError(
            f"--workdir={path!r} belongs to another experiment: {'; '.join(refused.values())}; "
            "choose another workdir, or the same value, or resume nevertheless with "
            f"--config.resume.allow={','.join(refused)}"
        )
    if values:
        log(f"config keys that the run was started without: {', '.join(values)}")
    for key, (before, after) in changes.items():
        other = trains and key in LENGTH and after is not None
        other = other and _depends_on_length(new.get("optimizer", {}))
        log(f"{key}: {before!r} before, {after!r} now{_OTHER_SCHEDULE * other}")


def _find_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yields the dotted keys whose values differ, with both values.

    A section in place of None, or the reverse, is one change. A key that only the new config has is
    one of `_ABSENT`; one that only the old config has becomes None.
    """
    for name in sorted(old.keys() | new.keys()):
        key, before, after = f"{prefix}{name}", old.get(name, _ABSENT), new.get(name)
        if isinstance(after, dict) and (before is _ABSENT or isinstance(before, dict)):
            before = {} if before is _ABSENT else before
            yield from _find_changes(before, after, f"{key}.")
        elif isinstance(before, dict) and name not in new:
            yield from _find_changes(before, {}, f"{key}.")
        elif before != after:
            yield key, (before, after)


def _find_defaults(
    old: dict[str, Any], resolve: Callable[[dict[str, Any]], Mapping[str, Any]] | None
) -> dict[str, Any] | None:
    """Returns the values of a config by dotted key, with its defaults; None if they are unknown."""
    try:
        return resolve and flatten_config(_as_json(resolve(as_tuples(old))))
    except UserError:
        return None


def _depends_on_length(optimizer: Mapping[str, Any]) -> bool:
    """Whether a schedule of the learning rate depends on the length of the run."""
    schedules = [optimizer, *(optimizer | own for _, own in optimizer.get("schedules") or ())]
    return any(
        schedule.get("schedule") not in ("constant", "rsqrt")
        or any(v for k, v in schedule.items() if "cooldown" in k or k.endswith("_percent"))
        for schedule in schedules
    )


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config as JSON has it, so that a tuple equals the list that is read back."""
    return json.loads(json.dumps(config))


def _check_progress(path: str, workdir: Path) -> None:
    """Raises `UserError` if checkpoints were written and none is left; logs what else is gone."""
    newest = max(list_steps(workdir), default=0)
    ledger, metrics = read_ledger(workdir), read_metrics(workdir)
    saved = max((record.get("saved") or 0 for record in ledger), default=0)
    if not newest and (saved or (metrics and not ledger)):
        before = f"step {saved} was saved" if saved else f"{METRICS} is of steps that were taken"
        raise UserError(
            f"--workdir={path!r}: {before}, and there is no checkpoint in "
            f"{workdir / CHECKPOINTS}: bring them back, or choose another workdir to start from "
            "scratch"
        )
    if saved > newest:
        log(f"the checkpoint of step {saved}, which was saved, is gone: the newest is of {newest}")
    elif not newest and metrics:
        log(f"{path} has no checkpoint yet: the run starts at step 0 again")


def restore(
    experiment: Experiment,
    checkpoints: CheckpointManager,
    weights: Weights | None = None,
    loaded: Params | None = None,
) -> tuple[int, TrainState]:
    """The step after which a run starts or resumes, and the state to do so with.

    `weights` are those of `init_from` and `loaded` those of `Objective.load_params`, which are read
    if need be.
    """
    saved, settings = checkpoints.latest_step() or 0, experiment.settings
    has_base = bool(settings.lora.rank)
    if weights is None and (has_base or not saved):
        weights = experiment.load_weights()
    if has_base and weights is not None and settings.init_from is not None:
        initialised = experiment.find_initialised(weights)
        checkpoints.base = describe_base(
            settings.init_from,
            weights,
            channels=experiment.train_data.image_shape()[2],
            adapt=settings.adapt,
            initialised=initialised,
        )
        # A checkpoint of an earlier version holds trained parameters alone.
        held = _read_initialised(checkpoints) if saved else initialised
        checkpoints.keep_params = functools.partial(experiment.keep, initialised=held)
    if saved:
        state = checkpoints.restore(experiment.abstract_state)
        if has_base and weights is not None:
            check_base(weights, checkpoints.read_base(), where="init_from")
            state = experiment.complete(state, weights)
            written = checkpoints.base["initialised"]
            checkpoints.keep_params = functools.partial(experiment.keep, initialised=written)
        log(f"resuming from {checkpoints.path(saved)}")
    else:
        state = experiment.init_state(weights, loaded)
    rollbacks = read_rollbacks(checkpoints.workdir)
    start = skip_past(saved, broadcast_from_process_0(rollbacks))
    if start > saved:
        log(f"steps {saved + 1} to {start} are left out: one of them diverged")
    if start and experiment.objective.keeps_average:
        follow = jax.jit(
            functools.partial(follow_average, step=start, objective=experiment.objective),
            donate_argnums=0,
            out_shardings=jax.tree.map(lambda x: x.sharding, experiment.abstract_state),
        )
        state = follow(state)
    elif start > saved:
        state = dataclasses.replace(state, step=state.step + (start - saved))
    return start, state


def _read_initialised(checkpoints: CheckpointManager) -> list[str]:
    """The frozen parameters that the newest checkpoint holds, in all processes."""
    with fail_together():
        base = checkpoints.read_base() if jax.process_index() == 0 else {}
    return broadcast_from_process_0(base.get("initialised", []))


def _record_rollback(workdir: Path, to: int, error: DivergedError) -> None:
    try:
        append_rollback(workdir, to=to, past=error.step, reason=str(error))
    except OSError as e:
        raise UserError(
            f"--workdir={str(workdir)!r}: {error}, and {DIVERGENCE}/{ROLLBACKS}, which has what "
            f"is left out, can't be written ({e.strerror})"
        ) from None


def plan_rollback(
    experiment: Experiment, checkpoints: CheckpointManager, ledger: Ledger, error: DivergedError
) -> None:
    """Writes down which steps `restore` will leave out.

    Raises:
      DivergedError: the config asks for no rollback, or one would not help.
      UserError: it can't be written down.
    """
    workdir, policy = checkpoints.workdir, experiment.settings.on_divergence
    advice = f"see {workdir / DIVERGENCE} and docs/faults.md"
    done = len(broadcast_from_process_0(read_rollbacks(workdir)))
    if policy != "rollback":
        others = "rollback" if policy == "skip" else "skip or rollback"
        advice += f"; --config.on_divergence={others} continues without that batch"
    elif done == divergence.MAX_ROLLBACKS:
        advice += f"; {done} rollbacks have not helped"
    elif error.step < experiment.total_steps:
        checkpoints.wait()
        to = checkpoints.latest_step() or 0
        with fail_together():
            if jax.process_index() == 0:
                _record_rollback(workdir, to, error)
        ledger.write_rollback(to=to, past=error.step)
        log(f"{error}: goes back to step {to}")
        return
    raise DivergedError(f"{error}; {advice}", step=error.step) from error
