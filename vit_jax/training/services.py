# SPDX-License-Identifier: Apache-2.0
"""The services of one training process: what happens between the steps."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from vit_jax.checkpoint.manager import (
    MAX_FAILURES,
    CheckpointManager,
    SaveError,
)
from vit_jax.checkpoint.state import TrainState
from vit_jax.data.corrupt import CorruptCounter, Counts, check_counts
from vit_jax.data.pipeline import read_step
from vit_jax.evaluators.base import Evaluator, evaluate
from vit_jax.models.flops import train_flops
from vit_jax.observe.console import log
from vit_jax.observe.divergence import Divergence, write_dump
from vit_jax.observe.early_stopping import Stop, read_values
from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.ledger import Ledger
from vit_jax.observe.profiler import Profiler
from vit_jax.observe.progress import Monitor
from vit_jax.observe.trackers import Trackers
from vit_jax.observe.writer import MetricWriter
from vit_jax.pages.run_page import refresh_report
from vit_jax.runtime.chips import find_chip
from vit_jax.runtime.preemption import Preempted, PreemptionGuard
from vit_jax.runtime.processes import (
    broadcast_from_process_0,
    host_names,
    sum_over_processes,
)
from vit_jax.runtime.stragglers import Stragglers
from vit_jax.training.experiment import Experiment
from vit_jax.training.phases import Phases
from vit_jax.training.previews import measure_params, preview_images
from vit_jax.training.step import layer_names
from vit_jax.utils.errors import describe_error


class Services:
    """The services of one training process, which the loop calls in its order.

    Args:
      experiment: that is trained.
      folder: the workdir.
      checkpoints: of the workdir.
      guard: takes SIGTERM and Ctrl-C.
      phases: the clock.
      ledger: of the workdir.
      trackers: that get the metrics too.
      on_record: see `train`.

    Attributes:
      corrupt: counts the records that this process can't read.
      skipped: the steps since the start that diverged and changed nothing.
      last_step: step at which the run ends, as far as is known.
      stop_reason: why that is before the last step of the config; None if it is not.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        checkpoints: CheckpointManager,
        *,
        guard: PreemptionGuard,
        phases: Phases,
        ledger: Ledger,
        trackers: Trackers,
        on_record: Callable[[dict[str, Any]], object] | None = None,
    ):
        self.experiment, self.folder, self.checkpoints = experiment, folder, checkpoints
        self.last_step, self.stop_reason = experiment.total_steps, None
        self._on_record = on_record
        self.phases, self.ledger = phases, ledger
        self.corrupt, self._counts = CorruptCounter(), Counts()
        self.skipped: list[int] = []
        self._guard, self._trackers = guard, trackers
        self._main = jax.process_index() == 0
        self._profiler = Profiler(folder, experiment.settings.profile, active=self._main)
        self._stragglers = Stragglers(phases.seconds)

    @contextlib.contextmanager
    def recording(self, start: int) -> Iterator[None]:
        """Around the steps after `start`: opens the metric files, and follows the steps.

        Records of steps after the newest checkpoint, which are taken again, are dropped.
        """
        experiment, settings = self.experiment, self.experiment.settings
        saved = self.checkpoints.latest_step()
        unlogged = self.checkpoints.read_run().get("unlogged") if self._main else None
        self._start = start
        writer = MetricWriter(
            self.folder,
            step=saved or 0,
            active=self._main,
            trackers=self._trackers,
            on_record=self._on_record,
        )
        self._judged = read_judged(self.folder, settings.stop, saved or 0)
        # Metrics that have a record at this step: they are recorded once.
        self._recorded = start, names_at(self.folder, start) if self._main else set()
        with writer:
            if start == 0:
                judges = [f"{e.name}/{m}" for e in experiment.evaluators for m in e.metrics]
                writer.write_config(experiment.config, judges)
            self._writer = writer
            self._monitor = Monitor(
                writer,
                step=start,
                total_steps=experiment.total_steps,
                batch_size=experiment.train_data.images_per_step,
                seconds=self.phases.seconds,
                on_divergence=settings.on_divergence,
                max_loss=settings.max_loss,
                dump=self._dump,
                peak=_peak_images_per_sec(experiment),
                unlogged=unlogged,
                warn=experiment.objective.warnings,
            )
            self.skipped = self._monitor.skipped
            self._monitor.saved(saved)
            with self._monitor, self._profiler:
                yield

    def check_input(self, step: int, batch: Any) -> None:
        """Counts corrupt records and names a process that the others wait for, when due.

        Raises:
          UserError: too many records are corrupt.
        """
        log_is_due, settings = self._log_is_due(step), self.experiment.settings
        if log_is_due or self.save_is_due(step) or step == self._start + 1:
            counts = sum_over_processes(*dataclasses.astuple(self.corrupt.counts))
            self._counts = Counts(*counts)
            check_counts(self._counts, settings.data.max_corrupt)
        if log_is_due and step > 1:
            self._name_straggler(step)
        shows_images = settings.tracking.images and "image" in batch
        if step == 1 and shows_images and self._main:
            images = preview_images(self.experiment, batch, settings.tracking.images)
            self._writer.write_images(1, "train/images", images)

    def annotate(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Marks a step in the profile."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def record(self, step: int, metrics: dict[str, Any], state: TrainState) -> None:
        """Takes the metrics of a dispatched step, and handles those of the step before.

        Raises:
          DivergedError: the step before diverged.
        """
        self._guard.allow_saving()
        if log_is_due := self._log_is_due(step):
            metrics = metrics | {"data/corrupt": self._counts.corrupt}
        self._monitor.step(step, metrics, log=log_is_due)
        self._profiler.step(state)
        if step > self._start + 1:
            self.phases.step_taken()
            self.ledger.took(step - 1)
        if log_is_due:
            self.ledger.write_progress()
        every = self.experiment.settings.tracking.histograms_every
        if every and step % every == 0:
            self._monitor.flush()
            with self.phases("evaluation"):
                histograms = measure_params(state.params, self.experiment.mesh)
                self._writer.write_histograms(step, histograms)

    def told_to_stop(self) -> bool:
        """Whether any process was asked to stop; all ask at the same step."""
        return self._guard.should_stop()

    def stopped(self, text: str) -> Preempted:
        """The error that ends a run that was asked to stop."""
        return self._guard.stopped(text)

    def evaluate_if_due(self, step: int, state: TrainState) -> dict[str, float] | None:
        """The results of the evaluators that are due; None where it was told to stop meanwhile."""
        wanted = [e for e in self.experiment.evaluators if is_due(step, e.every, self.last_step)]
        try:
            return self.evaluate(wanted, step, state)
        except Preempted:
            return None

    def ends_early(self, step: int) -> bool:
        """Whether the run ends after this step, before the last one of its config."""
        if step == self.last_step:
            return False
        stop = self.experiment.settings.stop
        reason = stop.find_reason(self._judged) or self._find_answer(step)
        if reason is not None:
            self.last_step, self.stop_reason = step, reason
            log(f"step {step}: the run ends: {reason}")
        return reason is not None

    def _find_answer(self, step: int) -> str | None:
        """What `on_record` returned to end the run; the same in all processes."""
        if self._on_record is None:
            return None
        # Records are written one step late, and before an evaluation.
        due = self._log_is_due(step) or self._log_is_due(step - 1) or step <= self._start + 2
        due = due or any(is_due(step, e.every, 0) for e in self.experiment.evaluators)
        return broadcast_from_process_0(self._writer.stop_reason) if due else None

    def evaluate_at_end(self, step: int, state: TrainState) -> dict[str, float] | None:
        """The results of all evaluators, with details, after a step that `ends_early`.

        None where the run was told to stop meanwhile.
        """
        try:
            return self.evaluate(self.experiment.evaluators, step, state)
        except Preempted:
            return None

    def evaluate(
        self, evaluators: Sequence[Evaluator], step: int, state: TrainState
    ) -> dict[str, float]:
        """Runs evaluators and records their results.

        Those that draw write their picture each time, the others details at the last step.

        Raises:
          Preempted: the run was asked to stop; there are no results.
        """
        if not evaluators:
            return {}
        self._monitor.flush()
        last = step == self.last_step
        with self.phases("evaluation"):
            results: dict[str, float] = {}
            for evaluator in evaluators:
                details = (self.folder, step) if last or evaluator.draws else None
                results |= evaluate(evaluator, state.params, state.ema_params, details=details)
            self._record_results(step, results)
            if self._main:
                refresh_report(self.folder)
        return results

    def _record_results(self, step: int, results: dict[str, float]) -> None:
        at, names = self._recorded
        names = names if at == step else set[str]()
        self._monitor.results(step, {k: v for k, v in results.items() if k not in names})
        self._recorded = step, names | results.keys()
        metric = self.experiment.settings.stop.metric
        if metric in results:
            self._judged[step] = results[metric]

    def save_is_due(self, step: int) -> bool:
        """Whether the step has a checkpoint."""
        every = self.experiment.settings.checkpoint.every
        return is_due(step, every, self.last_step)

    def save(self, step: int, state: TrainState, results: dict[str, float], *, last: bool) -> None:
        """Writes a checkpoint: in the background, or right now if no other is to come.

        Raises:
          SaveError: it can't be written.
        """
        self._monitor.flush()
        with self.phases("save"):
            save = functools.partial(
                self.checkpoints.save, step, state, results, unlogged=self._monitor.unlogged
            )
            if not last:
                save()
            for attempt in range(MAX_FAILURES if last else 0):
                try:
                    save()
                    self.checkpoints.wait(must=True)
                    break
                except SaveError as e:
                    if attempt == MAX_FAILURES - 1:
                        raise
                    log(f"{e}: tries again")
                    time.sleep(2**attempt)
            saved = self.checkpoints.latest_step()
            self.ledger.took(step)
            self.ledger.write_progress(saved=saved)
        self._monitor.saved(saved)

    def _log_is_due(self, step: int) -> bool:
        """Whether a step is logged; the first one shows the loss before training."""
        every = self.experiment.settings.log_every
        assert every is not None  # build_parts has replaced None.
        return step == 1 or is_due(step, every, self.experiment.total_steps)

    def _name_straggler(self, step: int) -> None:
        found = self._stragglers.compare()
        if found is None:
            return
        host = host_names()[found.process]
        log(
            f"step {step}: the others wait for process {found.process} on {host}: {found.wait:.0%} "
            f"of its time goes into waiting for its data, {found.others:.0%} of theirs"
        )
        self.ledger.write_straggler(found.process, host, wait=found.wait, others=found.others)

    def _dump(self, found: Divergence) -> None:
        """Writes the batch of a step that diverged, from process 0, as far as that can be done."""
        if not self._main:
            return
        experiment, settings = self.experiment, self.experiment.settings
        try:
            batch, records = read_step(
                experiment.train_data, seed=settings.seed, step=found.step - 1
            )
            trained, _ = experiment.optimizer.rules.split(experiment.abstract_state.params)
            write_dump(self.folder, found, batch, records, layer_names(trained))
        except OSError as e:
            log(f"the batch of step {found.step} can't be written ({describe_error(e)})")


def read_judged(folder: Path, stop: Stop, step: int) -> dict[int, float]:
    """The values by step, up to `step`, of the metric that may end the run; in all processes."""
    if stop.metric is None:
        return {}
    # Only process 0 surely sees what it has written.
    values = read_values(folder, stop.metric, until=step) if jax.process_index() == 0 else {}
    return dict(broadcast_from_process_0(list(values.items())))


def names_at(folder: Path, step: int) -> set[str]:
    """The names of the metrics that have a record at a step."""
    return {name for record in read_metrics(folder) if record["step"] == step for name in record}


def missed_evaluators(
    experiment: Experiment, folder: Path, step: int, *, last_step: int
) -> list[Evaluator]:
    """The evaluators that were due at a saved step and have no results: SIGTERM came before."""
    wanted = [e for e in experiment.evaluators if is_due(step, e.every, last_step)]
    if not step or not wanted:
        return []
    main_process = jax.process_index() == 0
    names = names_at(folder, step) if main_process else set()
    have = {name.partition("/")[0] for name in names}
    missed = sum_over_processes(*(int(main_process and e.name not in have) for e in wanted))
    return [e for e, is_missed in zip(wanted, missed, strict=True) if is_missed]


def is_due(step: int, every: int, total: int) -> bool:
    """Whether what happens every `every` steps (0: at the end only) happens at a step."""
    return step == total or (every > 0 and step % every == 0)


def _peak_images_per_sec(experiment: Experiment) -> float | None:
    """The speed at the devices' peak for this model; None where either is not known."""
    devices = experiment.mesh.devices.flat
    chip = find_chip(devices[0].device_kind)
    if chip is None or not experiment.trains_whole_model:
        return None
    flops = train_flops(experiment.model, experiment.train_data.image_shape()[:2])
    images = experiment.train_data.packing.images_per_row
    return chip.flops * len(devices) / flops * images
