# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax.checkpoint.manager import MAX_FAILURES, CheckpointManager, SaveError
from vit_jax.checkpoint.state import TrainState
from vit_jax.checkpoint.workdir import (
    check_data,
    lock_workdir,
    open_workdir,
    remove_workdir_on_error,
    write_config,
    write_labels,
    write_run,
)
from vit_jax.data.corrupt import CorruptCounter, Counts, check_counts
from vit_jax.data.fingerprint import fingerprint
from vit_jax.evaluators.base import Evaluator, evaluate
from vit_jax.evaluators.probes import Probes
from vit_jax.models.flops import train_flops
from vit_jax.observe import divergence
from vit_jax.observe.console import log
from vit_jax.observe.divergence import (
    DivergedError,
    Divergence,
    append_rollback,
    read_rollbacks,
    skip_past,
    write_dump,
)
from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.ledger import Ledger
from vit_jax.observe.profiler import Profiler
from vit_jax.observe.progress import Monitor
from vit_jax.observe.provenance import describe_run, say_changes
from vit_jax.observe.summary import report_end, report_start
from vit_jax.observe.trackers import Trackers, check_trackers
from vit_jax.observe.writer import MetricWriter
from vit_jax.optim.summary import describe_params, describe_rates, group_params, summarize_params
from vit_jax.pages.run_page import refresh_report
from vit_jax.parallel.sharding import find_large_copies
from vit_jax.runtime.chips import find_chip
from vit_jax.runtime.heartbeat import Heartbeat
from vit_jax.runtime.preemption import Preempted, PreemptionGuard
from vit_jax.runtime.processes import (
    all_agree,
    broadcast_from_process_0,
    host_names,
    sum_over_processes,
)
from vit_jax.runtime.stragglers import Straggler, Stragglers
from vit_jax.runtime.watchdog import Watchdog
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.layout import CHECKPOINTS, CONFIG, DIVERGENCE


@dataclasses.dataclass(frozen=True)
class Run:
    """What one start of a run works with."""

    experiment: Experiment
    folder: Path
    checkpoints: CheckpointManager
    guard: PreemptionGuard
    watchdog: Watchdog
    ledger: Ledger
    command: str | None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around what is not a step: it has its own limit, and its time is counted apart."""
        with self.watchdog.phase(name), self.ledger.phase(name):
            yield


def train(
    config: ConfigDict | Mapping[str, Any],
    workdir: str | os.PathLike[str],
    *,
    command: str | None = None,
    make_experiment: Callable[[ConfigDict | Mapping[str, Any]], Experiment] | None = None,
) -> None:
    """Trains what the config describes, going on from the workdir's newest whole checkpoint.

    Args:
      config: of the experiment.
      workdir: folder for checkpoints, metrics and config; one experiment each.
      command: that was typed, to show what to do next; None where there was none.
      make_experiment: of the config, in place of `Experiment.from_config`: to train with a part
        that no config describes.

    Raises:
      UserError: bad input.
      DivergedError: the loss is no longer finite.
      SaveError: a checkpoint can't be written.
      Preempted: SIGTERM came; the state is saved.
    """
    with PreemptionGuard() as guard, contextlib.ExitStack() as stack:
        main_process = jax.process_index() == 0
        with all_agree():
            experiment = (make_experiment or Experiment.from_config)(config)
            if main_process:
                check_trackers(experiment.tracking)
            # Parameters that the config's rules do not fit are refused before anything is written.
            _ = experiment.abstract_state
            names = experiment.train_data.info.class_names
            stack.enter_context(remove_workdir_on_error(Path(workdir), active=main_process))
            folder = open_workdir(os.fspath(workdir), experiment.config, names, experiment.resume)
            stack.enter_context(lock_workdir(folder, active=main_process))
        checkpoints = stack.enter_context(
            CheckpointManager(folder, experiment.checkpoint, experiment.description)
        )
        total, start = experiment.total_steps, checkpoints.latest_step() or 0
        missed = missed_evaluators(experiment, folder, start)
        if start >= total and not missed:
            log(f"nothing to do: {folder} is at step {start} of {total}")
        else:
            ledger = Ledger(folder, step=start, total_steps=total, active=main_process)
            watchdog = Watchdog(
                experiment.watchdog,
                workdir=folder,
                process=jax.process_index(),
                last_words=lambda phase: ledger.end(f"watchdog: {phase}"),
            )
            peers = Heartbeat(
                experiment.watchdog.peer,
                shared=(UserError, DivergedError, SaveError, Preempted, KeyboardInterrupt),
                last_words=lambda what: ledger.end(f"lost: {what}"),
            )
            run = Run(experiment, folder, checkpoints, guard, watchdog, ledger, command)
            with watchdog, _noting_the_end(run), peers:
                _train(run, missed)
        _report_end(experiment, folder, checkpoints, command)


@contextlib.contextmanager
def _noting_the_end(run: Run) -> Iterator[None]:
    def end(cause: str) -> None:
        run.ledger.end(cause)
        if jax.process_index() == 0 and (run.folder / CONFIG).exists():
            refresh_report(run.folder)

    try:
        yield
    except BaseException as e:
        causes = {
            Preempted: "SIGTERM",
            DivergedError: "divergence",
            SaveError: "no checkpoint can be written",
            KeyboardInterrupt: "interrupted",
        }
        end(causes.get(type(e), f"error: {type(e).__name__}"))
        raise
    end("finished")


def _train(run: Run, missed: Sequence[Evaluator]) -> None:
    """Prepares the run and takes its steps, going back where that is asked for."""
    experiment, folder, checkpoints = run.experiment, run.folder, run.checkpoints
    main_process = jax.process_index() == 0
    with all_agree():
        notes = experiment.objective.notes()
        experiment.open_data()
        input_bytes = experiment.input_bytes()
        if main_process:
            data = fingerprint(experiment.train_data.open())
            checkpoints.run = describe_run(experiment.config, data=data)
            before = checkpoints.read_run()
            check_data(str(folder), before, checkpoints.run, experiment.resume)
            say_changes(before, checkpoints.run)
    _report_start(experiment, input_bytes, notes)
    start, state = _restore(run)
    with all_agree():
        if main_process:
            write_config(folder, experiment.config)
            write_labels(folder, experiment.train_data.info.class_names)
            params = summarize_params(experiment.optimizer, experiment.abstract_state.params)
            what = {k: v for k, v in checkpoints.run.items() if k != "config"}
            write_run(folder, what | {"command": run.command} | describe_params(params))
    profiler = Profiler(folder, experiment.profile, active=main_process)
    with Trackers(experiment.tracking, folder, experiment.config, active=main_process) as trackers:
        while True:
            saved = checkpoints.latest_step() or 0  # what was noted of later steps was undone
            with MetricWriter(folder, step=saved, active=main_process, trackers=trackers) as writer:
                if start == 0:
                    judges = [f"{e.name}/{m}" for e in experiment.evaluators for m in e.metrics]
                    writer.write_config(experiment.config, judges)
                try:
                    take_steps(run, state, writer, profiler, start=start, missed=missed)
                    return
                except DivergedError as e:
                    del state
                    _plan_rollback(run, e)
            start, state = _restore(run)
            missed = ()


def _restore(run: Run) -> tuple[int, TrainState]:
    """The state to go on with, and the step after which it does."""
    experiment, checkpoints = run.experiment, run.checkpoints
    saved = checkpoints.latest_step() or 0
    if saved:
        state = checkpoints.restore(experiment.abstract_state)
        log(f"going on from {checkpoints.path(saved)}")
    else:
        state = experiment.init_state()
    start = skip_past(saved, broadcast_from_process_0(read_rollbacks(run.folder)))
    if start > saved:
        log(f"steps {saved + 1} to {start} are left out: one of them diverged")
        state = dataclasses.replace(state, step=state.step + (start - saved))
    return start, state


def _plan_rollback(run: Run, error: DivergedError) -> None:
    """Writes down which steps will be left out, or raises the error if that would not help."""
    experiment = run.experiment
    advice = f"see {run.folder / DIVERGENCE} and docs/faults.md"
    done = len(broadcast_from_process_0(read_rollbacks(run.folder)))
    if experiment.on_divergence != "rollback":
        others = "rollback" if experiment.on_divergence == "skip" else "skip or rollback"
        advice += f"; --config.on_divergence={others} goes on without that batch"
    elif done == divergence.MAX_ROLLBACKS:
        advice += f"; {done} rollbacks have not helped"
    elif error.step < experiment.total_steps:
        run.checkpoints.wait()
        to = run.checkpoints.latest_step() or 0
        if jax.process_index() == 0:
            append_rollback(run.folder, to=to, past=error.step, reason=str(error))
        run.ledger.write_rollback(to=to, past=error.step)
        log(f"{error}: goes back to step {to}")
        return
    raise DivergedError(f"{error}; {advice}", step=error.step) from error


def _report_start(
    experiment: Experiment, input_bytes: dict[str, int], notes: Sequence[str]
) -> None:
    params = experiment.abstract_state.params
    _, frozen = experiment.optimizer.rules.split(params)
    report_start(
        mesh=experiment.mesh,
        hosts=host_names(),
        params=params,
        frozen=frozen,
        input_bytes=input_bytes,
        groups=group_params(summarize_params(experiment.optimizer, params)),
        rates=describe_rates(experiment.optimizer),
    )
    kind = experiment.mesh.devices.flat[0].device_kind
    if experiment.model.float8 and not ((chip := find_chip(kind)) and chip.float8):
        log(f"precision=float8: {kind} is not known to multiply in float8: emulated, and slow")
    for note in notes:
        log(note)
    for path, size in find_large_copies(experiment.abstract_state).items():
        log(f"on every device whole: {path}, {size / 2**20:.0f} MiB: no dimension divides")


def _report_end(
    experiment: Experiment, folder: Path, checkpoints: CheckpointManager, command: str | None
) -> None:
    last = checkpoints.latest_step() or 0
    override = experiment.override_for_twice_as_long()
    probes = [e for e in experiment.evaluators if isinstance(e, Probes)]
    report_end(
        workdir=folder,
        step=last,
        total_steps=experiment.total_steps,
        checkpoint=folder / CHECKPOINTS / str(last),
        longer=None if command is None else f"{command} {override}",
        heads=probes[0].objective.head_names if probes else (),
        # The split that chooses comes first.
        judged_on=[e.name for e in sorted(probes, key=lambda e: not e.choose)],
    )


def take_steps(
    run: Run,
    state: TrainState,
    writer: MetricWriter,
    profiler: Profiler,
    *,
    start: int,
    missed: Sequence[Evaluator],
) -> None:
    """Takes the steps after `start`, to the end, and the evaluations `missed` before it.

    Raises:
      UserError: too many images can't be read, in all processes at the same step.
      DivergedError: a step before has diverged; nothing was saved since.
      Preempted: the job was told to stop. The state after the last step is saved; evaluations due
        then are made up for when the run goes on.
    """
    experiment, guard, folder = run.experiment, run.guard, run.folder
    total = experiment.total_steps
    corrupt, counts, stragglers = CorruptCounter(), Counts(), Stragglers()
    batches = experiment.train_batches(start, corrupt=corrupt)
    monitor = Monitor(
        writer,
        step=start,
        total_steps=total,
        batch_size=experiment.train_data.batch_size,
        on_divergence=experiment.on_divergence,
        max_loss=experiment.max_loss,
        dump=lambda found: _dump(experiment, folder, found),
        peak=_peak_images_per_sec(experiment),
    )
    monitor.saved(run.checkpoints.latest_step())
    with monitor, profiler:
        if missed:
            with monitor.paused(), run.phase("evaluation"):
                results = evaluate_all(missed, state, folder=folder, step=start, total=total)
            monitor.results(start, results)
        for step in range(start + 1, total + 1):
            with monitor.waiting(), stragglers.waiting(), run.ledger.phase("data_wait"):
                batch = next(batches)
            log = due(step, experiment.log_every, total)
            save = due(step, experiment.checkpoint.every, total)
            if log or save or step == start + 1:
                counts = Counts(*sum_over_processes(*dataclasses.astuple(corrupt.counts)))
                check_counts(counts, experiment.max_corrupt)
            if log:
                _name_straggler(run.ledger, step, stragglers.compare())
            if step == 1 and experiment.tracking.images:
                _write_images(experiment, batch, writer)
            state, metrics = experiment.train_step(state, batch)
            guard.has_progress()
            if log:
                metrics = metrics | {"data/corrupt": counts.corrupt}
            monitor.step(step, metrics, log=log)
            profiler.step(state)
            if step > start + 1:
                run.watchdog.beat()
                run.ledger.took(step - 1)
            if log:
                run.ledger.write_progress()

            if (every := experiment.tracking.histograms_every) and step % every == 0:
                with monitor.paused():
                    writer.write_histograms(step, experiment.measure_params(state.params))
            stop, results = guard.should_stop(), {}
            wanted = [e for e in experiment.evaluators if due(step, e.every, total)]
            if wanted and not stop:
                with monitor.paused(), run.phase("evaluation"):
                    try:
                        results = evaluate_all(wanted, state, folder=folder, step=step, total=total)
                    except Preempted:
                        # All of them again, when the run goes on.
                        stop = True
            _take_results(run, monitor, step, results)
            if stop or save:
                with monitor.paused(), run.phase("save"):
                    _save(run, step, state, results, last=stop or step == total)
                monitor.saved(run.checkpoints.latest_step())
            if stop:
                raise Preempted(f"stopped after step {step} of {total}, which is saved")


def _name_straggler(ledger: Ledger, step: int, found: Straggler | None) -> None:
    if found is None:
        return
    host = host_names()[found.process]
    log(
        f"step {step}: the others wait for process {found.process} on {host}: {found.wait:.0%} of "
        f"its time goes into waiting for its data, {found.others:.0%} of theirs"
    )
    ledger.write_straggler(found.process, host, wait=found.wait, others=found.others)


def _peak_images_per_sec(experiment: Experiment) -> float | None:
    """What the peak of the devices is for this model; None where either is not known."""
    devices = experiment.mesh.devices.flat
    chip = find_chip(devices[0].device_kind)
    config = experiment.config
    whole = config["objective"]["name"] == "supervised" and not config["optimizer"]["freeze"]
    if chip is None or not whole:
        return None
    flops = train_flops(experiment.model, experiment.train_data.image_shape()[:2])
    return chip.flops * len(devices) / flops


def _take_results(run: Run, monitor: Monitor, step: int, results: dict[str, float]) -> None:
    monitor.results(step, results)
    if results and jax.process_index() == 0:
        with monitor.paused(), run.phase("evaluation"):
            refresh_report(run.folder)


def _write_images(experiment: Experiment, batch: Any, writer: MetricWriter) -> None:
    """Writes a few images of a batch as the model sees them, from process 0."""
    if jax.process_index() == 0:
        images = experiment.augment_images(batch, experiment.tracking.images)
        writer.write_images(1, "train/images", images)


def _save(run: Run, step: int, state: TrainState, results: dict[str, float], *, last: bool) -> None:
    for attempt in range(MAX_FAILURES if last else 0):
        run.checkpoints.save(step, state, results)
        try:
            run.checkpoints.wait(must=True)
            break
        except SaveError as e:
            if attempt == MAX_FAILURES - 1:
                raise
            log(f"{e}: tries again")
            time.sleep(2**attempt)
    if not last:
        run.checkpoints.save(step, state, results)
    run.ledger.took(step)
    run.ledger.write_progress(saved=run.checkpoints.latest_step())


def _dump(experiment: Experiment, folder: Path, found: Divergence) -> None:
    """Writes what diverged to the workdir, from process 0, as far as that can be done."""
    if jax.process_index() == 0:
        try:
            write_dump(folder, found, *experiment.describe_step(found.step))
        except OSError as e:
            log(f"the batch of step {found.step} can't be written ({describe_error(e)})")


def evaluate_all(
    evaluators: Sequence[Evaluator], state: TrainState, *, folder: Path, step: int, total: int
) -> dict[str, float]:
    """The results of several evaluators; those after the last step write files of details."""
    details = (folder, step) if step == total else None
    results = {}
    for evaluator in evaluators:
        results |= evaluate(evaluator, state.params, state.ema_params, details=details)
    return results


def missed_evaluators(experiment: Experiment, folder: Path, step: int) -> list[Evaluator]:
    """Those that were due at a step that is saved, and have no results: SIGTERM came before."""
    wanted = [e for e in experiment.evaluators if due(step, e.every, experiment.total_steps)]
    if not step or not wanted:
        return []
    have: set[str] = set()
    # Only process 0 surely sees what it has written.
    main_process = jax.process_index() == 0
    for record in read_metrics(folder) if main_process else ():
        if record["step"] == step:
            have |= {name.partition("/")[0] for name in record}
    missed = sum_over_processes(*(int(main_process and e.name not in have) for e in wanted))
    return [e for e, is_missed in zip(wanted, missed, strict=True) if is_missed]


def due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every `every` steps (0: at the end only) happens now."""
    return step == total or (every > 0 and step % every == 0)
