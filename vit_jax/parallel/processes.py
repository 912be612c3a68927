# SPDX-License-Identifier: Apache-2.0
"""Jobs of several processes: how they find each other, and how they stop together."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.utils.errors import UserError


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the job, if there is one.

    Args:
      coordinator: HOST:PORT of process 0; "auto" where JAX can find out all by itself (TPU pods,
        Slurm and others); None for a job of one process.
      num_processes: of the job; not with "auto".
      process_id: of this process, from 0; not with "auto".

    Raises:
      UserError: some of the three are missing, or the processes don't meet.
    """
    numbers = (num_processes, process_id)
    if coordinator is None and numbers == (None, None):
        return
    if coordinator is None or (
        numbers != (None, None) if coordinator == "auto" else None in numbers
    ):
        raise UserError(
            f"--coordinator={coordinator}, --num_processes={num_processes}, "
            f"--process_id={process_id}: expected all three, or --coordinator=auto alone"
        )
    # Else JAX takes SIGTERM for itself, and a job would not end by it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as e:
        raise UserError(f"--coordinator={coordinator}: {e}") from e


def sum_over_processes(*counts: int) -> list[int]:
    """The sums of each process's counts; all processes have to ask for them.

    Between processes numbers go as float32, in which those above 2**24 are rounded.
    """
    if jax.process_count() == 1:
        return list(counts)
    gathered = multihost_utils.process_allgather(np.array(counts, np.float32))
    return [int(total) for total in np.asarray(gathered, np.float64).sum(axis=0)]


@contextlib.contextmanager
def all_agree() -> Iterator[None]:
    """All processes go on, or none does: one that stopped alone would leave the others waiting.

    Raises:
      UserError: that of the block, or of another process.
    """
    error = None
    try:
        yield
    except UserError as e:
        error = e
    if jax.process_count() > 1:
        failed = np.atleast_1d(multihost_utils.process_allgather(np.asarray(error is not None)))
        if error is None and failed.any():
            error = UserError(
                f"process {int(failed.argmax())} refused its input; its line says why"
            )
    if error is not None:
        raise error
