# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

import jax

from vit_jax.checkpoint.state import TrainState
from vit_jax.training.services import Services


def take_steps(run: Services, state: TrainState, *, start: int) -> None:
    """Takes the steps after `start`, to the end of the run, which may come early.

    Results come before the checkpoint: a run that is killed between them repeats the evaluation. A
    run that is asked to stop saves at once; evaluations that are due then are run on resume.

    Raises:
      UserError: too many images can't be read, in all processes at the same step.
      DivergedError: a step diverged.
      SaveError: a checkpoint can't be written.
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
    """
    experiment, phases, total = run.experiment, run.phases, run.experiment.total_steps
    batches = experiment.train_batches(start, corrupt=run.corrupt)
    for step in range(start + 1, total + 1):
        with phases("data_wait"):
            batch = next(batches)
        run.check_input(step, batch)
        # Outside of the guard: the first access copies the constants of the objective to devices.
        train_step = experiment.train_step_at(step)
        # A copy between host and device that is not asked for would hold up each step.
        with jax.transfer_guard("disallow"), run.annotate(step):
            state, metrics = train_step(state, batch)
        run.record(step, metrics, state)  # fetches the metrics of the step before
        stop = run.told_to_stop()
        results = None if stop else run.evaluate_if_due(step, state)
        if results is not None and run.ends_early(step):
            results = run.evaluate_at_end(step, state)
        stop = results is None
        if stop or run.save_is_due(step):
            run.save(step, state, results or {}, last=stop or step == run.last_step)
        if stop:
            raise run.stopped(f"stopped after step {step} of {total}, which is saved")
        if step == run.last_step:
            return
