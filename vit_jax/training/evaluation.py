# SPDX-License-Identifier: Apache-2.0
"""Evaluates checkpoints by the evaluators of an experiment."""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.checkpoint.listing import find_checkpoint
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.workdir import find_step
from vit_jax.evaluators.base import evaluate
from vit_jax.objectives.base import Params
from vit_jax.observe.console import log
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError


class Judge:
    """Evaluates checkpoints, one after the other, by the evaluators of one experiment.

    Args:
      experiment: whose model, mesh and evaluators are used.
      workdir: where details are written; None to write none.
    """

    def __init__(self, experiment: Experiment, *, workdir: Path | None = None):
        self._experiment, self._workdir = experiment, workdir
        self._initial = experiment.initial_params()
        self._notes: list[str] = []

    @property
    def names(self) -> set[str]:
        """The names of the evaluators."""
        return {evaluator.name for evaluator in self._experiment.evaluators}

    def load(self, source: str) -> tuple[Params, Params | None]:
        """Reads the parameters of a checkpoint and, if it has one, their average.

        How they were adapted is logged when it differs from the checkpoint before.

        Args:
          source: as `load_pretrained` takes it.

        Raises:
          UserError: they can't be read or don't fit, or a head that is judged is not in it.
        """
        params = self._load(source)
        if not (Path(source) / "ema_params").is_dir():
            return params, None
        return params, self._load(f"{source}:ema_params")

    def record(self, source: str, loaded: tuple[Params, Params | None]) -> dict[str, Any]:
        """The results of all evaluators on what `load` gave, with `checkpoint` and `step`.

        The step is that of the run's checkpoint, None for weights of another kind.
        """
        name = Path(source).name
        step = int(name) if name.isdigit() else None
        record: dict[str, Any] = {"checkpoint": source, "step": step}
        files = re.sub(r"[^\w.-]+", "_", source) if step is None else step
        details = None if self._workdir is None else (self._workdir, files)
        for evaluator in self._experiment.evaluators:
            record |= evaluate(evaluator, *loaded, details=details)
        return record

    def _load(self, source: str) -> Params:
        weights = load_pretrained(source)
        params, notes = self._experiment.fit_params(weights, self._initial)
        self._check_head(params, source)
        log(f"evaluating {source} ({weights.layout})")
        if notes != self._notes:
            for note in notes:
                log(f"  {note}")
        self._notes = notes
        return self._experiment.place_params(params)

    def _check_head(self, params: Params, source: str) -> None:
        judged = [e.name for e in self._experiment.evaluators if e.judges_head]
        if not judged or "head" not in params:
            return
        kernel = params["head"]["kernel"]
        fresh = kernel is self._initial["head"]["kernel"]
        if fresh or not np.any(kernel):
            state = "does not fit this model" if fresh else "was published untrained, all zero"
            raise UserError(
                f"{source}: its head {state}, so evals.{judged[0]} would judge a random one: "
                "set config.model and config.data to those of the checkpoint, or leave it out "
                f"with --config.evals.{judged[0]}=None"
            )


def find_source(args: argparse.Namespace) -> str:
    """The weights that the arguments name, for `load_pretrained`; by default the newest checkpoint.

    Raises:
      UserError: there is no such checkpoint.
    """
    source = args.init_from or str(args.workdir)
    if args.checkpoint:
        source = find_step(args.workdir, args.checkpoint)
    return str(find_checkpoint(Path(source))) if Path(source).is_dir() else source
