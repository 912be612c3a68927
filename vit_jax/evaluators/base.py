# SPDX-License-Identifier: Apache-2.0
"""The base class of evaluators: it goes over a split on the mesh and writes files of details."""

import abc
import dataclasses
import functools
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.data.classes import Classes
from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.objectives.base import Batch, Objective, Params
from vit_jax.observe.console import log
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.parallel.mesh import process_shards, shard_batch
from vit_jax.runtime.preemption import interruptible
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import write_atomically
from vit_jax.utils.layout import EVALS
from vit_jax.utils.text import describe_type

# By name, arrays of one value or row for each example of a batch, `[batch, ...]`.
Columns = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator(abc.ABC):
    """Judges parameters by a split of a dataset.

    A subclass defines `metrics`, `judge_batch` and `run`, which calls `sum_split` for sums over the
    split, or `map_split` to handle one batch at a time. Its fields are the keys of its section of
    the config; `name`, `data`, `objective` and `mesh` are passed to it.

    Attributes:
      name: prefix of its metrics, such as `val`.
      data: the split.
      objective: its predictions are evaluated.
      mesh: batches are sharded over it.
      every: steps between evaluations; 0 for the end only.
      needs_labels: whether batches must have `label`.
      takes_any_size: whether images may be of another size than in training.
      takes_patches: whether images may be columns of patches of any number (`data.ops.patches`).
      judges_head: whether a trained head is evaluated, so that the dataset must have its classes.
      draws: whether its details are a picture, which is written at each evaluation of a run.
      choose: whether the best of several heads is chosen on this split at the end of a run.

    Raises:
      UserError: a value out of its range, or an objective or dataset that does not fit.
    """

    name: str
    data: DatasetSpec
    objective: Objective
    mesh: Mesh
    every: int = 0

    needs_labels: ClassVar[bool] = True
    takes_any_size: ClassVar[bool] = False
    takes_patches: ClassVar[bool] = True
    judges_head: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    choose = False

    @property
    def reads_params(self) -> bool:
        """Whether results depend on the parameters; else there are none of their average."""
        return True

    def __post_init__(self) -> None:
        self.check(self.every >= 0, "every", "steps, or 0 for the end only")

    def check(self, valid: bool, key: str, expected: str) -> None:
        """Raises a `UserError` that gives the value of a field, unless it is valid."""
        if not valid:
            value = getattr(self, key)
            raise UserError(f"evals.{self.name}.{key}={value}: expected {expected}")

    @property
    @abc.abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names, without prefix, of the metrics by which checkpoints can be compared."""

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the heads that are evaluated one by one, as the metrics `HEAD_top1`; or none."""
        return ()

    @abc.abstractmethod
    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Judges each example of a batch; traced by `jit`, on the mesh.

        Args:
          params: see `Objective.predict`.
          batch: `image` uint8 `[batch, height, width, channels]`; `label` int32 `[batch]`, or
            float32 `[batch, classes]` of zeros and ones where examples have several labels; `mask`
            float32 `[batch]`, 0 for examples that do not count.

        Returns:
          Columns of which `sum_split` gives the sum, and columns that it gives as they are.
        """

    @abc.abstractmethod
    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns results by metric, and the `count` of examples.

        Args:
          params: parameters on the mesh.
          details: prefix of the names of files with further results; None for no files.

        Raises:
          UserError: no image can be read.
          Preempted: the job was asked to stop.
        """

    def match(self, classes: Classes, *, key: str) -> tuple[Self, str]:
        """Gives the examples of the split the labels of a head; see `DatasetSpec.match`."""
        data, note = self.data.match(classes, key=key)
        return (self if data is self.data else dataclasses.replace(self, data=data)), note

    def open(self) -> None:
        """Opens all data that is read; raises `UserError` where some is missing."""
        self.data.open()

    def sum_split(self, params: Params) -> tuple[dict[str, np.ndarray], int, dict[str, np.ndarray]]:
        """Goes over the split with `judge_batch`; records that can't be read are left out.

        Returns the float64 sums of its first columns, the number of examples, and the rows
        `[examples, ...]` of its other columns, with their positions in the split as `index`.
        The errors are those of `run`.
        """
        total: dict[str, Any] = {}
        collected: list[dict[str, np.ndarray]] = []
        for sums, columns in self.map_split(self.sum_batch, params):
            for k, v in sums.items():
                total[k] = total.get(k, 0.0) + np.asarray(v, np.float64)
            collected.append(columns)
        count = int(total.pop("count"))
        if not count:
            raise self.nothing_to_read(self.data)
        columns = {k: np.concatenate([c[k] for c in collected]) for k in collected[0]}
        index = np.flatnonzero(columns.pop("mask"))
        return total, count, {k: v[index] for k, v in columns.items()} | {"index": index}

    @functools.cached_property
    def sum_batch(self) -> Callable[[Params, Batch], tuple[dict[str, jax.Array], Columns]]:
        """`judge_batch`, jitted, for use with `map_split`.

        It returns the sums of the first columns over the examples whose mask is 1, with their
        `count`, and the other columns, with the `mask`.
        """

        def sum_batch(params: Params, batch: Batch) -> tuple[dict[str, jax.Array], Columns]:
            summed, others = self.judge_batch(params, batch)
            mask = batch["mask"]
            sums = {k: jnp.sum(v.T * mask, axis=-1).T for k, v in summed.items()}
            return {**sums, "count": jnp.sum(mask)}, {**others, "mask": mask}

        return self.jit(sum_batch)

    def jit(self, fn: Callable) -> Callable:
        """Compiles a function whose results are replicated on all devices of the mesh."""
        return jax.jit(fn, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def map_split(
        self, fn: Callable[[Params, Batch], Any], params: Params, data: DatasetSpec | None = None
    ) -> Generator[Any, None, None]:
        """Yields `fn(params, batch)` as numpy arrays for each batch of a split; logs progress.

        The next batch is dispatched before the results of one are fetched. `fn` is from `jit` and
        takes the batches of `judge_batch`; `data` is another split than that of the evaluator.
        Raises `Preempted` where the job was asked to stop.
        """
        data = data or self.data
        shards, num_shards = process_shards(self.mesh)
        batches = eval_batches(data, shards=shards, num_shards=num_shards, corrupt=self._corrupt)
        total = len(data.open())
        work = f"{self.name}: {data.split} of {data}"
        pending = None
        with ProgressLog(work, total=total, unit="images") as progress:
            for batch in interruptible(batches):
                queued = fn(params, shard_batch(batch, self.mesh))
                if pending is not None:
                    yield jax.device_get(pending)
                    progress.advance(data.batch_size)
                pending = queued
        yield jax.device_get(pending)

    def nothing_to_read(self, data: DatasetSpec) -> UserError:
        """The error for a split of which no image can be read."""
        return UserError(f"evals.{self.name}: no image of {data.split} can be read")

    @functools.cached_property
    def _corrupt(self) -> CorruptCounter:
        # One for all evaluations, so that each record is named once in the log.
        return CorruptCounter()


def evaluate(
    evaluator: Evaluator,
    params: Params,
    ema_params: Params | None,
    *,
    details: tuple[Path, int | str] | None = None,
) -> dict[str, float]:
    """Results on the raw parameters, `NAME/...`, and on their average, `NAME_ema/...`.

    `details` are the workdir and the step, for files of further results, `evals/NAME_STEP...`.

    Raises:
      UserError: the evaluator raises it, or a result is no number.
    """
    trees = {evaluator.name: params}
    if ema_params is not None and evaluator.reads_params:
        trees[f"{evaluator.name}_ema"] = ema_params
    results = {}
    for prefix, tree in trees.items():
        files = None if details is None else details[0] / EVALS / f"{prefix}_{details[1]}"
        found = evaluator.run(tree, details=files)
        if not isinstance(found, dict):
            raise UserError(
                f"evals.{evaluator.name}: run gives a {type(found).__name__}; expected a dict"
            )
        for metric, value in found.items():
            results[f"{prefix}/{metric}"] = _to_number(value, f"evals.{evaluator.name}: {metric}")
    return results


def _to_number(value: Any, where: str) -> float:
    """A Python number from one of Python, or from a scalar of numpy or JAX; integers remain so."""
    if isinstance(value, int | float | np.generic | np.ndarray | jax.Array) and not np.ndim(value):
        scalar = np.asarray(value)
        if any(jnp.issubdtype(scalar.dtype, kind) for kind in (np.bool_, np.integer, jnp.floating)):
            return scalar.item()
    raise UserError(f"{where} is {describe_type(value)}; expected a single number")


def write_details(details: Path | None, content: Any) -> None:
    """Writes results that are no single numbers as `DETAILS.json`; None for no file."""
    if details is not None:
        write_file(Path(f"{details}.json"), f"{json.dumps(content, indent=1)}\n")


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file of details; only process 0 does. An error is logged, and ends no run."""
    if jax.process_index() == 0:
        try:
            write_atomically(path, content)
        except OSError as e:
            log(f"{path} can't be written ({e.strerror}): continues without it")
