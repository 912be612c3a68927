# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

import dataclasses
import os
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.data.corrupt import CorruptCounter, Counts, check_counts
from vit_jax.data.fingerprint import fingerprint
from vit_jax.evaluators.base import Evaluator, evaluate
from vit_jax.evaluators.probes import Probes
from vit_jax.experiment import Experiment
from vit_jax.observe.console import say
from vit_jax.observe.profiler import Profiler
from vit_jax.observe.progress import Monitor
from vit_jax.observe.provenance import describe_run, say_changes
from vit_jax.observe.report import report_end, report_start
from vit_jax.observe.writer import MetricWriter, read_metrics
from vit_jax.optim.summary import describe_rates, group_params, summarize_params
from vit_jax.parallel.preemption import Preempted, PreemptionGuard
from vit_jax.parallel.processes import all_agree, host_names, sum_over_processes
from vit_jax.parallel.sharding import find_large_copies
from vit_jax.state import TrainState
from vit_jax.workdir import check_data, open_workdir, write_config, write_labels


def train(
    config: ConfigDict | Mapping[str, Any],
    workdir: str | os.PathLike[str],
    *,
    command: str | None = None,
) -> None:
    """Trains what the config describes, going on from the workdir's newest checkpoint.

    Args:
      config: of the experiment.
      workdir: folder for checkpoints, metrics and config; one experiment each.
      command: that was typed, to show what to do next; None where there was none.

    Raises:
      UserError: bad input.
      DivergedError: the loss is no longer finite.
      SaveError: a checkpoint can't be written.
      Preempted: SIGTERM came; the state is saved.
    """
    with PreemptionGuard() as guard:
        _train(config, os.fspath(workdir), command, guard)


def _train(
    config: ConfigDict | Mapping[str, Any],
    workdir: str,
    command: str | None,
    guard: PreemptionGuard,
) -> None:
    main_process = jax.process_index() == 0
    with all_agree():
        experiment = Experiment.from_config(config)
        notes = experiment.objective.notes()
        # Parameters that the config's rules do not fit are refused before anything is written.
        params = experiment.abstract_state.params
        class_names = experiment.train_data.info.class_names
        folder = open_workdir(workdir, experiment.config, class_names, experiment.resume)
    total = experiment.total_steps
    with CheckpointManager(folder, experiment.checkpoint, experiment.description) as checkpoints:
        start = checkpoints.latest_step() or 0
        missed = missed_evaluators(experiment, folder, start)
        if start >= total and not missed:
            say(f"nothing to do: {folder} is at step {start} of {total}")
        else:
            with all_agree():
                experiment.open_data()
                input_bytes = experiment.input_bytes()
                if main_process:
                    data = fingerprint(experiment.train_data.open())
                    checkpoints.run = describe_run(experiment.config, data=data)
                    before = checkpoints.read_run()
                    check_data(workdir, before, checkpoints.run, experiment.resume)
                    say_changes(before, checkpoints.run)
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
            for note in notes:
                say(note)
            for path, size in find_large_copies(experiment.abstract_state).items():
                say(f"on every device whole: {path}, {size / 2**20:.0f} MiB: no dimension divides")
            if start:
                state = checkpoints.restore(experiment.abstract_state)
                say(f"going on from {checkpoints.path(start)}")
            else:
                state = experiment.init_state()
            if main_process:
                write_config(folder, experiment.config)
                write_labels(folder, class_names)
            with MetricWriter(folder, step=start, active=main_process) as writer:
                profiler = Profiler(folder, experiment.profile, active=main_process)
                loop = (experiment, state, checkpoints, writer, profiler, guard)
                run(*loop, folder=folder, start=start, missed=missed)
        last = checkpoints.latest_step() or 0
        override = experiment.override_for_twice_as_long()
        probes = [e for e in experiment.evaluators if isinstance(e, Probes)]
        report_end(
            workdir=folder,
            step=last,
            total_steps=total,
            checkpoint=checkpoints.path(last),
            longer=None if command is None else f"{command} {override}",
            heads=probes[0].objective.head_names if probes else (),
            # The split that chooses comes first.
            judged_on=[e.name for e in sorted(probes, key=lambda e: not e.choose)],
        )


def run(
    experiment: Experiment,
    state: TrainState,
    checkpoints: CheckpointManager,
    writer: MetricWriter,
    profiler: Profiler,
    guard: PreemptionGuard,
    *,
    folder: Path,
    start: int,
    missed: Sequence[Evaluator],
) -> None:
    """Takes the steps after `start`, to the end, and the evaluations `missed` before it.

    Raises:
      UserError: too many images can't be read, in all processes at the same step.
      Preempted: the job was told to stop. The state after the last step is saved; evaluations due
        then are made up for when the run goes on.
    """
    total, batch_size = experiment.total_steps, experiment.train_data.batch_size
    corrupt, counts = CorruptCounter(), Counts()
    batches = experiment.train_batches(start, corrupt=corrupt)
    monitor = Monitor(writer, step=start, total_steps=total, batch_size=batch_size)
    with monitor, profiler:
        with monitor.paused():
            results = evaluate_all(missed, state, folder=folder, step=start, total=total)
        monitor.results(start, results)
        for step in range(start + 1, total + 1):
            with monitor.waiting():
                batch = next(batches)
            log = due(step, experiment.log_every, total)
            save = due(step, experiment.checkpoint.every, total)
            if log or save or step == start + 1:
                counts = Counts(*sum_over_processes(*dataclasses.astuple(corrupt.counts)))
                check_counts(counts, experiment.max_corrupt)
            state, metrics = experiment.train_step(state, batch)
            guard.has_progress()
            if log:
                metrics = metrics | {"data/corrupt": counts.corrupt}
            monitor.step(step, metrics, log=log)
            profiler.step(state)

            stop, results = guard.should_stop(), {}
            wanted = [e for e in experiment.evaluators if due(step, e.every, total)]
            if wanted and not stop:
                with monitor.paused():
                    try:
                        results = evaluate_all(wanted, state, folder=folder, step=step, total=total)
                    except Preempted:
                        # All of them again, when the run goes on.
                        stop = True
            monitor.results(step, results)
            if stop or save:
                with monitor.paused():
                    checkpoints.save(step, state, results)
                    if stop or step == total:
                        checkpoints.wait()
            if stop:
                raise Preempted(f"stopped after step {step} of {total}, which is saved")


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


class _CallableModule(types.ModuleType):
    """Makes `vit_jax.train(config, workdir)` work, although `vit_jax.train` is this module."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
