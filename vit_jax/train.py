# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

import dataclasses
from pathlib import Path

import jax
from ml_collections import ConfigDict

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.data.corrupt import CorruptCounter, Counts, check_counts
from vit_jax.evaluators.base import evaluate
from vit_jax.evaluators.probes import Probes
from vit_jax.experiment import Experiment
from vit_jax.observe.console import say
from vit_jax.observe.profiler import Profiler
from vit_jax.observe.progress import Monitor
from vit_jax.observe.report import report_end, report_start
from vit_jax.observe.writer import MetricWriter
from vit_jax.optim.summary import describe_rates, group_params, summarize_params
from vit_jax.parallel.processes import all_agree, sum_over_processes
from vit_jax.state import TrainState
from vit_jax.workdir import open_workdir, write_config, write_labels


def train(config: ConfigDict, workdir: str, *, command: str) -> None:
    """Trains what the config describes, going on from the workdir's newest checkpoint.

    Args:
      config: of the experiment.
      workdir: folder for checkpoints, metrics and config; one experiment each.
      command: that was typed, to show what to do next.

    Raises:
      UserError: bad input.
      DivergedError: the loss is no longer finite.
    """
    main_process = jax.process_index() == 0
    with all_agree():
        experiment = Experiment.from_config(config)
        notes = experiment.objective.notes()
        # Parameters that the config's rules do not fit are refused before anything is written.
        params = experiment.abstract_state.params
        class_names = experiment.train_data.info.class_names
        folder = open_workdir(workdir, experiment.config, class_names)
    total = experiment.total_steps
    with CheckpointManager(folder, experiment.checkpoint, experiment.description) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start >= total:
            say(f"nothing to do: {folder} is at step {start} of {total}")
        else:
            with all_agree():
                experiment.open_data()
                input_bytes = experiment.input_bytes()
            _, frozen = experiment.optimizer.rules.split(params)
            report_start(
                mesh=experiment.mesh,
                params=params,
                frozen=frozen,
                input_bytes=input_bytes,
                groups=group_params(summarize_params(experiment.optimizer, params)),
                rates=describe_rates(experiment.optimizer),
            )
            for note in notes:
                say(note)
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
                run(experiment, state, checkpoints, writer, profiler, folder=folder, start=start)
        last = checkpoints.latest_step() or 0
        probes = [e for e in experiment.evaluators if isinstance(e, Probes)]
        report_end(
            workdir=folder,
            step=last,
            total_steps=total,
            checkpoint=checkpoints.path(last),
            longer=f"{command} {experiment.override_for_twice_as_long()}",
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
    *,
    folder: Path,
    start: int,
) -> None:
    """Takes the steps after `start`, to the end.

    Raises:
      UserError: too many images can't be read, in all processes at the same step.
    """
    total, batch_size = experiment.total_steps, experiment.train_data.batch_size
    corrupt, counts = CorruptCounter(), Counts()
    batches = experiment.train_batches(start, corrupt=corrupt)
    monitor = Monitor(writer, step=start, total_steps=total, batch_size=batch_size)
    with monitor, profiler:
        for step in range(start + 1, total + 1):
            with monitor.waiting():
                batch = next(batches)
            log = due(step, experiment.log_every, total)
            save = due(step, experiment.checkpoint.every, total)
            if log or save or step == start + 1:
                counts = Counts(*sum_over_processes(*dataclasses.astuple(corrupt.counts)))
                check_counts(counts, experiment.max_corrupt)
            state, metrics = experiment.train_step(state, batch)
            if log:
                metrics = metrics | {"data/corrupt": counts.corrupt}
            monitor.step(step, metrics, log=log)
            profiler.step(state)

            results = {}
            for evaluator in experiment.evaluators:
                if due(step, evaluator.every, total):
                    details = (folder, step) if step == total else None
                    with monitor.paused():
                        results |= evaluate(
                            evaluator, state.params, state.ema_params, details=details
                        )
            monitor.results(step, results)
            if save:
                with monitor.paused():
                    checkpoints.save(step, state, results)


def due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every `every` steps (0: at the end only) happens now."""
    return step == total or (every > 0 and step % every == 0)
