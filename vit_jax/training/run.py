# SPDX-License-Identifier: Apache-2.0
"""Trains what a config describes: opens the workdir, restores, takes the steps, closes."""

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.manager import CheckpointManager, SaveError
from vit_jax.checkpoint.pretrained.load import check_source
from vit_jax.checkpoint.state import TrainState
from vit_jax.checkpoint.workdir import (
    lock_workdir,
    remove_workdir_on_error,
    write_config,
    write_labels,
    write_run,
)
from vit_jax.config.build import build_parts, count_examples
from vit_jax.config.load import list_modules, trust_config
from vit_jax.config.pins import find_pins, use_pins
from vit_jax.config.reduced import without_mesh
from vit_jax.config.schema import read_section
from vit_jax.data.fingerprint import fingerprint
from vit_jax.data.pipeline import plan_buffers
from vit_jax.evaluators.base import Evaluator
from vit_jax.models.interface import takes_any_size
from vit_jax.models.two_towers import TOWERS
from vit_jax.observe.console import log, log_progress
from vit_jax.observe.divergence import DivergedError
from vit_jax.observe.ledger import Ledger
from vit_jax.observe.provenance import describe_run, log_changes
from vit_jax.observe.summary import report_end, report_start
from vit_jax.observe.trackers import Trackers, check_trackers
from vit_jax.optim.summary import describe_params, describe_rates, group_params, summarize_params
from vit_jax.pages.run_page import refresh_report
from vit_jax.parallel.mesh import process_shards
from vit_jax.parallel.sharding import find_large_copies
from vit_jax.runtime.chips import find_chip
from vit_jax.runtime.heartbeat import Heartbeat
from vit_jax.runtime.preemption import Interrupted, Preempted, PreemptionGuard
from vit_jax.runtime.processes import broadcast_from_process_0, fail_together, host_names
from vit_jax.runtime.watchdog import Limits, Watchdog
from vit_jax.training.experiment import Experiment
from vit_jax.training.kernel_check import check_kernels
from vit_jax.training.loop import take_steps
from vit_jax.training.phases import Phases
from vit_jax.training.result import RunResult, read_result
from vit_jax.training.resume import check_data, open_workdir, plan_rollback, restore
from vit_jax.training.services import Services, missed_evaluators, read_judged
from vit_jax.utils.durations import LENGTH
from vit_jax.utils.errors import UserError, name_key
from vit_jax.utils.layout import CHECKPOINTS, CONFIG
from vit_jax.utils.mirrors import find_folder
from vit_jax.utils.text import describe_size


def train(
    config: ConfigDict | Mapping[str, Any],
    workdir: str | os.PathLike[str],
    *,
    command: str | None = None,
    make_experiment: Callable[[ConfigDict | Mapping[str, Any]], Experiment] | None = None,
    on_record: Callable[[dict[str, Any]], object] | None = None,
) -> RunResult:
    """Trains what the config describes; resumes from the workdir's newest whole checkpoint.

    Args:
      config: of the experiment; modules outside of this package that it names are imported.
      workdir: folder for checkpoints, metrics and config, or the URL of one in a bucket
        (`gs://BUCKET/PATH`, `s3://BUCKET/PATH`); one experiment each.
      command: that was typed, to show what to do next; None where there was none.
      make_experiment: of the config, in place of `Experiment.from_config`: to train with a part
        that no config describes.
      on_record: called in process 0 with each record of `metrics.jsonl` once it is written, such as
        `{"step": 50, "train/loss": 2.1, ...}`. If it returns True or a text with the reason, the
        run ends as at its last step: it evaluates, saves and reports. In a job of several processes
        all of them have to give it. Training resumes if `train` is called again.

    Returns:
      The metrics, the history and the newest checkpoint of the run.

    Raises:
      UserError: bad input.
      DivergedError: the loss is no longer finite.
      SaveError: a checkpoint can't be written.
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
    """
    if not isinstance(config, ConfigDict | Mapping):
        raise UserError(
            f"config={config!r}: expected a ConfigDict, as "
            "vit_jax.config.load.load_config(NAME) returns it"
        )
    if not isinstance(workdir, str | os.PathLike) or not os.fspath(workdir):
        raise UserError(f"workdir={workdir!r}: expected a folder for the run, such as runs/digits")
    if on_record is not None and not callable(on_record):
        raise UserError(f"on_record={on_record!r}: expected a function of a record")
    trust_config(config)
    main_process = jax.process_index() == 0
    phases = Phases()
    with fail_together():  # Requests to a bucket end by themselves, without the watchdog.
        workdir = find_folder(workdir)
        pins = find_pins(config, workdir)
    if pins:
        config = use_pins(config, broadcast_from_process_0(pins))
    with PreemptionGuard() as guard, contextlib.ExitStack() as stack:
        # Before the first file is opened, since a file system may hang.
        watchdog = stack.enter_context(
            Watchdog(
                _find_limits(config),
                phases.watched,
                workdir=workdir,
                process=jax.process_index(),
            )
        )
        with fail_together():
            check_sources(config, workdir)
            experiment = (make_experiment or Experiment.from_config)(config)
            settings = experiment.settings
            if main_process:
                check_trackers(settings.tracking)
            # Parameters that the config's rules do not fit are refused before anything is written.
            experiment.check()
            data = experiment.train_data
            check_kernels(experiment.model, data.image_shape(), per_row=data.packing.images_per_row)
            info = data.info
            names = info.class_names or info.pixel_classes
            stack.enter_context(remove_workdir_on_error(workdir, active=main_process))
            folder = open_workdir(
                os.fspath(workdir),
                experiment.config,
                names,
                settings.resume,
                resolve=lambda config: build_parts(without_mesh(config)).config,
                total_steps=experiment.total_steps,
            )
            stack.enter_context(lock_workdir(folder, active=main_process))
        checkpoints = stack.enter_context(
            CheckpointManager(
                folder, settings.checkpoint, experiment.description, keep=experiment.keep
            )
        )
        total, saved = experiment.total_steps, checkpoints.latest_step() or 0
        if saved > total:
            log(
                f"nothing is trained: {folder} is at step {saved}, past the {total} steps of the "
                f"config; expected a larger {_length_key(experiment)} to train longer"
            )
            return read_result(folder, step=saved, total_steps=total, stopped=None)
        reason = settings.stop.find_reason(read_judged(folder, settings.stop, saved))
        reason = None if saved == total else reason
        last_step = total if reason is None else saved
        missed = missed_evaluators(experiment, folder, saved, last_step=last_step)
        skipped: Sequence[int] = ()
        if saved == last_step and not missed:
            log(f"nothing to do: {folder} is at step {saved} of {total}")
        else:
            ledger = Ledger(
                folder, step=saved, total_steps=total, seconds=phases.seconds, active=main_process
            )
            with _watching(experiment, folder, watchdog, ledger):
                start, state = _prepare(experiment, folder, checkpoints, command)
                trackers = stack.enter_context(
                    Trackers(settings.tracking, folder, experiment.config, active=main_process)
                )
                run = Services(
                    experiment,
                    folder,
                    checkpoints,
                    guard=guard,
                    phases=phases,
                    ledger=ledger,
                    trackers=trackers,
                    on_record=on_record,
                )
                _take_steps(run, state, start=start, missed=missed)
                skipped, reason = run.skipped, run.stop_reason
                if reason is not None:
                    ledger.end_early(reason)
        _report_end(experiment, folder, checkpoints, command, skipped, reason)
        step = checkpoints.latest_step() or 0
        return read_result(folder, step=step, total_steps=total, stopped=reason)


def _find_limits(config: ConfigDict | Mapping[str, Any]) -> Limits:
    """Reads the limits of a config before all of it is read; a wrong section is refused later."""
    section: Any = config.get("watchdog") or {}
    try:
        return read_section("watchdog", dict(section))[0]
    except (UserError, TypeError, ValueError):
        return Limits()


def check_sources(config: ConfigDict | Mapping[str, Any], workdir: Path) -> None:
    """Refuses weights that don't exist, before the data is opened or prepared.

    Raises:
      UserError: `init_from` or the Gram teacher, where a run in the workdir would start from them,
        or the teacher.
    """
    objective: Any = config.get("objective")
    sources = {}
    starts = False
    with contextlib.suppress(UserError):  # A workdir that can't be read is refused later.
        starts = not list_steps(workdir)
    if starts:
        sources["init_from"] = config.get("init_from")
    if isinstance(objective, ConfigDict | Mapping):
        sources["objective.teacher"] = objective.get("teacher")
        if starts:
            sources["objective.gram_teacher"] = objective.get("gram_teacher")
    for key, source in sources.items():
        if isinstance(source, str) and source:
            try:
                check_source(source)
            except UserError as e:
                raise name_key(key, source, e) from e


@contextlib.contextmanager
def _watching(
    experiment: Experiment, folder: Path, watchdog: Watchdog, ledger: Ledger
) -> Iterator[None]:
    """Around a run: ends the process if it or another one hangs, and notes why the run ended."""
    watchdog.on_exit = lambda phase: ledger.end(f"watchdog: {phase}")
    heartbeat = Heartbeat(
        experiment.settings.watchdog.peer,
        shared=(UserError, DivergedError, SaveError, Preempted, KeyboardInterrupt),
        on_exit=lambda what: ledger.end(f"lost: {what}"),
    )

    def end(cause: str) -> None:
        ledger.end(cause)
        if jax.process_index() == 0 and (folder / CONFIG).exists():
            refresh_report(folder)

    try:
        with heartbeat:
            yield
    except BaseException as e:
        causes = {
            Preempted: "SIGTERM",
            Interrupted: "interrupted",
            DivergedError: "divergence",
            SaveError: "no checkpoint can be written",
            KeyboardInterrupt: "interrupted",
        }
        end(causes.get(type(e), f"error: {type(e).__name__}"))
        raise
    else:
        end("finished")
    finally:
        watchdog.stop()


def _prepare(
    experiment: Experiment, folder: Path, checkpoints: CheckpointManager, command: str | None
) -> tuple[int, TrainState]:
    """Opens the data and restores the state; only then writes what the workdir holds of a run."""
    settings, main_process = experiment.settings, jax.process_index() == 0
    with fail_together():
        # Weights that don't exist or don't fit are refused before data is read.
        starts = not checkpoints.latest_step()
        read = experiment.read_init_from() if starts else None
        weights = None if read is None else read[0]
        loaded = experiment.objective.load_params() if starts else None
        notes = experiment.objective.notes()
        # Every split that the run will need, so that a missing one is found at once.
        sizes = [f"train {count_examples(experiment.train_data):,}"]
        for evaluator in experiment.evaluators:
            evaluator.open()
            sizes.append(
                f"{evaluator.name} {len(evaluator.data.open()):,} ({evaluator.data.split})"
            )
        log(f"images: {', '.join(sizes)}")
        input_bytes = _count_input_bytes(experiment)
        if main_process:
            train_data = experiment.train_data
            data = fingerprint(train_data.open(), train_data.find_tokenizer())
            checkpoints.run = describe_run(experiment.config, data=data)
            before = checkpoints.read_run()
            check_data(str(folder), before, checkpoints.run, settings.resume)
            log_changes(before, checkpoints.run)
    _report_start(experiment, input_bytes, notes)
    log_progress("compiling ...")
    start, state = restore(experiment, checkpoints, weights, loaded)
    with fail_together():
        if main_process:
            write_config(folder, experiment.config)
            info = experiment.train_data.info
            write_labels(folder, info.class_names or info.pixel_classes)
            params = summarize_params(experiment.optimizer, experiment.abstract_state.params)
            what = {k: v for k, v in checkpoints.run.items() if k != "config"}
            write_run(folder, what | {"command": command} | describe_params(params))
    if experiment.feature_cache is not None:
        experiment.feature_cache.fill(state.params)
    return start, state


def _take_steps(
    run: Services, state: TrainState, *, start: int, missed: Sequence[Evaluator]
) -> None:
    """Takes the steps to the end of the run; rolls back where one diverges and may be left out.

    Args:
      run: the services.
      state: at `start`.
      start: the step after which to begin.
      missed: evaluators that were due at that step, and were not run.
    """
    while True:
        with run.recording(start):
            try:
                run.evaluate(missed, start, state)
                if start and run.ends_early(start):
                    run.evaluate(run.experiment.evaluators, start, state)
                    return
                return take_steps(run, state, start=start)
            except DivergedError as e:
                del state
                plan_rollback(run.experiment, run.checkpoints, run.ledger, e)
        start, state = restore(run.experiment, run.checkpoints)
        missed = ()


def _count_input_bytes(experiment: Experiment) -> dict[str, int]:
    """Memory for batches of this process, by what they are for: at most `data.max_ram_gb` each.

    Raises:
      UserError: that is too little.
    """
    shards, num_shards = process_shards(experiment.mesh)
    data = {"train": experiment.train_data} | {e.name: e.data for e in experiment.evaluators}
    return {
        name: plan_buffers(spec, num_shards=num_shards, shards=len(shards)).nbytes
        for name, spec in data.items()
    }


def _report_start(
    experiment: Experiment, input_bytes: dict[str, int], notes: Sequence[str]
) -> None:
    params = experiment.abstract_state.params
    _, frozen = experiment.optimizer.rules.split(params)
    report_start(
        mesh=experiment.mesh,
        hosts=host_names(),
        model=_describe_model(experiment),
        params=params,
        frozen=frozen,
        input_bytes=input_bytes,
        groups=group_params(summarize_params(experiment.optimizer, params)),
        rates=describe_rates(experiment.optimizer),
    )
    kind = experiment.mesh.devices.flat[0].device_kind
    towers = getattr(experiment.model, "towers", {"": experiment.model})
    float8 = any(getattr(tower, "float8", False) for tower in towers.values())
    if float8 and not ((chip := find_chip(kind)) and chip.float8):
        log(f"precision=float8: {kind} is not known to multiply in float8: emulated, and slow")
    for note in notes:
        log(note)
    for path, size in find_large_copies(experiment.abstract_state).items():
        log(f"replicated on every device: {path}, {describe_size(size)}: no dimension divides")


def _describe_model(experiment: Experiment) -> str:
    """Name and sizes of a model, as far as it has those of a Transformer of patches or tokens."""
    model = experiment.model
    sizes = _list_sizes(model)
    if hasattr(model, "towers"):
        sizes = [f"{TOWERS[p]} ({', '.join(_list_sizes(x))})" for p, x in model.towers.items()]
    height, width = experiment.train_data.image_shape()[:2]
    images = f"images {height}x{width}"
    if takes_any_size(model):
        budgets = [budget for budget, _ in experiment.train_data.budgets] or [height // width - 1]
        images = f"images of any size, up to {', '.join(f'{n:,}' for n in budgets)} patches"
        if (count := experiment.train_data.packing.images_per_row) > 1:
            images = f"images of any size, {count} in a row of {budgets[0]:,} patches"
    return ", ".join([experiment.config["model"]["name"], *sizes, images])


def _list_sizes(model: Any) -> list[str]:
    sizes = []
    for name, text in (
        ("num_layers", "layers {}"),
        ("hidden_size", "width {}"),
        ("num_heads", "heads {}"),
        ("context_length", "tokens {}"),
        ("vocab_size", "vocabulary {:,}"),
    ):
        if isinstance(size := getattr(model, name, None), int):
            sizes.append(text.format(size))
    patch = getattr(model, "stride", getattr(model, "patch_size", None))
    if drawn := getattr(model, "patch_sizes", ()):
        sizes.append(f"patches of {', '.join(map(str, drawn))} in turn")
    elif isinstance(patch, tuple):
        sizes.append(f"patches {'x'.join(map(str, patch))}")
    return sizes


def make_longer_command(command: str, experiment: Experiment, *, stopped: bool = False) -> str:
    """The command of a run with double length, in the unit that the config has.

    Of a run that was `stopped` by its results, it is the one with double patience.
    """
    key = _length_key(experiment)
    value = 2 * experiment.config[key]
    patience = experiment.settings.stop.patience
    if stopped and patience is not None:
        key, value = "stop.patience", 2 * patience
    override = f"--config.{key}"
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word == override:
            next(words, None)  # Its value.
        elif not word.startswith(f"{override}="):
            kept.append(word)
    return shlex.join([*kept, f"{override}={value}"])


def _length_key(experiment: Experiment) -> str:
    """The key of the config that states the length of the run."""
    return next(key for key in LENGTH if experiment.config[key] is not None)


def suggest_uses(experiment: Experiment, folder: Path, command: str | None) -> dict[str, str]:
    """What to do with the model, by the interpreter of `command`: what for, and what to type."""
    python = "python" if command is None else shlex.split(command)[0]
    workdir, modules = shlex.quote(str(folder)), list_modules(experiment.config)
    parts = f" --parts={','.join(modules)}" if modules else ""
    predict = f"{python} -m vit_jax.predict --workdir={workdir}{parts}"
    if experiment.objective.classifies:
        return {"to predict": f"{predict} IMAGES"}
    if experiment.objective.needs_label_maps:
        option = "depth" if experiment.train_data.info.pixel_depth else "masks"
        return {"to predict": f"{predict} --{option}={option} IMAGES"}
    # An average that the objective keeps is its teacher, which has the better features.
    teacher = experiment.objective.keeps_average
    params, part = (" --params=ema", ":ema_params") if teacher else ("", "")
    return {
        "features": f"{predict}{params} --embed --output=features.npz IMAGES",
        "to fine-tune": f"--config.init_from={workdir}{part} in a run on data with classes",
    }


def _report_end(
    experiment: Experiment,
    folder: Path,
    checkpoints: CheckpointManager,
    command: str | None,
    skipped: Sequence[int],
    stop_reason: str | None,
) -> None:
    last = checkpoints.latest_step() or 0
    probes = [e for e in experiment.evaluators if e.head_names]
    report_end(
        workdir=folder,
        step=last,
        total_steps=experiment.total_steps,
        checkpoint=folder / CHECKPOINTS / str(last),
        skipped=skipped,
        stop_reason=stop_reason,
        longer=None
        if command is None
        else make_longer_command(command, experiment, stopped=stop_reason is not None),
        uses=suggest_uses(experiment, folder, command),
        heads=probes[0].head_names if probes else (),
        # The split that chooses comes first.
        judged_on=[e.name for e in sorted(probes, key=lambda e: not e.choose)],
        details="by image" if experiment.train_data.info.pixel_depth else "by class",
    )
