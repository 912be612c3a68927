# SPDX-License-Identifier: Apache-2.0
"""What all evaluators have in common: their form, and the way over a split."""

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.objectives.base import Batch, Params
from vit_jax.observe.progress import ProgressLog
from vit_jax.parallel.mesh import process_shards, shard_batch
from vit_jax.runtime.preemption import interruptible
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import write_atomically
from vit_jax.utils.layout import EVALS


class Evaluator(Protocol):
    """Judges parameters by a split of a dataset."""

    @property
    def name(self) -> str:
        """Prefix of its metrics, such as `val`."""
        ...

    @property
    def every(self) -> int:
        """Steps between evaluations; 0 for the end only."""
        ...

    @property
    def data(self) -> DatasetSpec:
        """The split that is judged by."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names, without prefix, of metrics by which one checkpoint is better than another."""
        ...

    def open(self) -> None:
        """Opens all that it will read; a `UserError` says what is missing."""
        ...

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Results by metric.

        Args:
          params: to be judged.
          details: what the names of files with further results start with; None for no files.
        """
        ...


def evaluate(
    evaluator: Evaluator,
    params: Params,
    ema_params: Params | None,
    *,
    details: tuple[Path, int | str] | None = None,
) -> dict[str, float]:
    """Results on the raw parameters, `NAME/...`, and on their average, `NAME_ema/...`.

    Args:
      evaluator: that judges.
      params: raw parameters.
      ema_params: their average, if there is one.
      details: the workdir and the step, for files of further results, `evals/NAME_STEP...`; None
        for none.
    """
    trees = {evaluator.name: params}
    if ema_params is not None:
        trees[f"{evaluator.name}_ema"] = ema_params
    results = {}
    for prefix, tree in trees.items():
        files = None if details is None else details[0] / EVALS / f"{prefix}_{details[1]}"
        for metric, value in evaluator.run(tree, details=files).items():
            results[f"{prefix}/{metric}"] = value
    return results


def check_every(every: int, *, name: str) -> None:
    """Raises `UserError` unless `every` is a cadence."""
    if every < 0:
        raise UserError(f"evals.{name}.every={every}: expected steps, or 0 for the end only")


def replicate_outputs(fn: Callable, mesh: Mesh) -> Callable:
    """A jitted function whose results lie on every device whole."""
    return jax.jit(fn, out_shardings=NamedSharding(mesh, PartitionSpec()))


def map_split(
    fn: Callable[[Params, Batch], Any],
    params: Params,
    data: DatasetSpec,
    *,
    name: str,
    mesh: Mesh,
    corrupt: CorruptCounter,
) -> Generator[Any, None, None]:
    """Yields `fn(params, batch)` as arrays of the host for each batch of a split.

    The next batch is computed while one is looked at. How far it is, is said on the screen.

    Args:
      fn: jitted, from `replicate_outputs`.
      params: its first argument.
      data: the split.
      name: of the evaluator, for the screen.
      mesh: that the batches are put on.
      corrupt: counts the records that can't be read; their mask is 0.

    Raises:
      Preempted: the job was told to stop.
    """
    shards, num_shards = process_shards(mesh)
    batches = eval_batches(data, shards=shards, num_shards=num_shards, corrupt=corrupt)
    total = len(data.open())
    pace = ProgressLog(f"{name}: {data.split} of {data}", total=total, unit="images")
    pending = None
    for batch in interruptible(batches):
        queued = fn(params, shard_batch(batch, mesh))
        if pending is not None:
            yield jax.device_get(pending)
            pace.advance(data.batch_size)
        pending = queued
    yield jax.device_get(pending)


def write_details(details: Path, content: Any) -> None:
    """Writes results that are no single numbers as `DETAILS.json`."""
    write_file(Path(f"{details}.json"), json.dumps(content, indent=1) + "\n")


def write_file(path: Path, text: str) -> None:
    """Writes a file of details; only process 0 does."""
    if jax.process_index() == 0:
        write_atomically(path, text)
