# SPDX-License-Identifier: Apache-2.0
"""Evaluates checkpoints by the evaluators of an experiment."""

import argparse
import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.checkpoint.listing import find_checkpoint, is_step
from vit_jax.checkpoint.pretrained.hub import find_weights
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.checkpoint.workdir import find_step
from vit_jax.config.load import override_config
from vit_jax.config.reduced import reduce_for_evaluation
from vit_jax.data.classes import Classes
from vit_jax.evaluators.base import evaluate
from vit_jax.objectives.base import Params
from vit_jax.observe.console import log
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError
from vit_jax.utils.mirrors import find_local
from vit_jax.utils.text import show_names

_MAX_NAME = 100  # characters of changed config keys in the name of a file


def make_evaluation(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Experiment:
    """Returns the experiment of a config without what only training needs; its data is opened.

    Args:
      config: of a run.
      overrides: values by dotted key.

    Raises:
      UserError: the config is wrong, its data is missing, or it has no evaluator.
    """
    reduced = override_config(reduce_for_evaluation(config), overrides)
    experiment = Experiment.from_config(reduced, match_classes=False)
    if not experiment.evaluators:
        raise UserError(
            "evals is empty: expected evaluators, such as --config.evals.val.split=test "
            "with --config.evals.val.preprocess=..."
        )
    for evaluator in experiment.evaluators:
        evaluator.open()
    return experiment


class Judge:
    """Evaluates checkpoints, one after the other, by the evaluators of one experiment.

    Args:
      experiment: whose model, mesh and evaluators are used.
      workdir: of the run whose checkpoints have steps; None if any has.
      details: whether files of details are written to the workdir.
      changes: the config keys, with their values, in which each evaluator differs from that of the
        run does. They are part of the names of its files, so that those of the run are kept.

    Attributes:
      evaluators: those of the experiment, which know the classes of the weights that were loaded.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        workdir: Path | None = None,
        details: bool = False,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self._experiment, self._workdir, self._details = experiment, workdir, details
        self._changes = changes or {}
        self._initial = experiment.initial_params()
        self._notes: list[str] = []
        self._classes: Classes | None = None
        self.evaluators = experiment.evaluators

    @property
    def names(self) -> set[str]:
        """The names of the evaluators."""
        return {evaluator.name for evaluator in self.evaluators}

    @property
    def changes(self) -> dict[str, Any]:
        """The changed config keys of all evaluators, with their values."""
        return {key: value for keys in self._changes.values() for key, value in keys.items()}

    def load(self, source: str) -> tuple[Params, Params | None]:
        """Reads the parameters of a checkpoint and, if it has one, their average; see `place`.

        Args:
          source: as `load_pretrained` takes it.

        Raises:
          UserError: they can't be read, or for the reasons of `place`.
        """
        params = self._load(source)
        if not (Path(source) / "ema_params").is_dir():
            return params, None
        return params, self._load(f"{source}:ema_params")

    def record(self, source: str, loaded: tuple[Params, Params | None]) -> dict[str, Any]:
        """The results of all evaluators on what `load` gave, with `checkpoint` and `step`.

        The step is that of the run's checkpoint, None for other weights. `changes` are added if
        there are any.
        """
        path = Path(source)
        of_run = self._workdir is None or path.resolve().parts[:-2] == self._workdir.resolve().parts
        step = int(path.name) if is_step(path.name) and of_run else None
        record: dict[str, Any] = {"checkpoint": show_names(source), "step": step}
        if self.changes:
            record["changes"] = self.changes
        for evaluator in self.evaluators:
            details = None
            if self._workdir is not None and self._details:
                changes = _name_files(self._changes.get(evaluator.name, {}))
                which = _shorten(source) if step is None else str(step)
                details = (self._workdir, f"{changes}{which}")
            record |= evaluate(evaluator, *loaded, details=details)
        return record

    def _load(self, source: str) -> Params:
        weights = load_pretrained(source)
        log(f"evaluating {source} ({weights.layout})")
        return self.place(weights, source)

    def place(self, weights: Weights, source: str) -> Params:
        """Fits weights to the model, and moves them to the devices.

        How they were adapted is logged when it differs from the weights before. Evaluators of the
        head give their examples the labels that its classes have in the weights.

        Args:
          weights: of the same kind of model.
          source: their name in messages.

        Raises:
          UserError: they don't fit, or a head that is evaluated is missing or lacks classes of the
            data.
        """
        params, notes = self._experiment.fit_params(weights, self._initial)
        self._check_head(params, source)
        if notes != self._notes:
            for note in notes:
                log(f"  {note}")
        self._notes = notes
        self._match_classes(weights, source)
        return self._experiment.place_params(params)

    def _match_classes(self, weights: Weights, source: str) -> None:
        names, width = weights.class_names, getattr(self._experiment.model, "num_classes", 0)
        classes = Classes(len(names) if names else width, names, source)
        known = self._classes and dataclasses.replace(self._classes, owner=source)
        if not classes.count or classes == known:
            return
        # The heads of a linear probe are not in the model.
        if width and classes.count > width:
            raise UserError(
                f"{source}: {classes.count} class names, and its head has {width} classes: "
                "expected one each"
            )
        self._classes, matched = classes, []
        for evaluator in self._experiment.evaluators:
            if evaluator.judges_head:
                evaluator, note = evaluator.match(classes, key=f"evals.{evaluator.name}")
                if note:
                    log(f"  {evaluator.name}: {note}")
            matched.append(evaluator)
        self.evaluators = tuple(matched)

    def _check_head(self, params: Params, source: str) -> None:
        judged = [e.name for e in self._experiment.evaluators if e.judges_head]
        if not judged or "head" not in params:
            return
        kernel = params["head"]["kernel"]
        fresh = kernel is self._initial["head"]["kernel"]
        if fresh or not np.any(kernel):
            state = "does not fit this model" if fresh else "was published untrained, all zero"
            raise UserError(
                f"{source}: its head {state}, so evals.{judged[0]} would evaluate a random one: "
                "set the sections model and data to those of the checkpoint, or leave it out "
                f"with --config.evals.{judged[0]}=None"
            )


def _name_files(changes: Mapping[str, Any]) -> str:
    text = _shorten(",".join(f"{key}={value}" for key, value in changes.items()))
    if len(text) > _MAX_NAME:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        text = f"{text[:_MAX_NAME]}-{digest}"
    return f"{text}_" if text else ""


def _shorten(text: str) -> str:
    return re.sub(r"[^\w.,=-]+", "_", text)


def find_source(args: argparse.Namespace) -> str:
    """The weights that the arguments name, for `load_pretrained`; by default the newest checkpoint.

    Raises:
      UserError: there is no such checkpoint.
    """
    source = find_local(args.init_from) if args.init_from else str(args.workdir)
    if args.checkpoint:
        source = find_step(args.workdir, args.checkpoint)
    if not Path(source).is_dir() or find_weights(Path(source)) is not None:
        return source
    return str(find_checkpoint(Path(source)))
