# SPDX-License-Identifier: Apache-2.0
"""Command-line arguments that choose a trained model."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.inference.model import LoadedModel, load_model
from vit_jax.observe.console import log
from vit_jax.utils.class_names import read_names
from vit_jax.utils.command import CommandParser
from vit_jax.utils.errors import UserError
from vit_jax.utils.suggestions import suggest_workdir

# Config keys that can be overridden, with the arguments of `load_model` that they set.
_OVERRIDES = {
    "objective.loss": "loss",
    "objective.pixel_mean": "pixel_mean",
    "objective.pixel_std": "pixel_std",
}


def add_source(parser: CommandParser) -> None:
    """Adds the arguments that `load_source` reads."""
    group = parser.add_argument_group(
        "the model",
        "--config.model.KEY=VALUE sets an argument of the model in place of what the weights say; "
        f"{' and '.join(f'--config.{key}' for key in _OVERRIDES)} are taken too.",
    )
    add = group.add_argument
    add("--workdir", type=Path, help="of the run")
    add("--checkpoint", help="a step of the run, last (the default), best, or the path of a file")
    add("--init_from", help="weights of any kind, as in a config")
    add(
        "--params",
        choices=("raw", "ema"),
        default="raw",
        help="of a run: the parameters as they are (raw, the default), or their average (ema)",
    )
    add("--preprocess", help="in place of that of the run's evaluation: 'decode|resize(224)'")
    add("--labels", type=Path, help="file with a class name a line")
    parser.add_parts()


def load_source(args: argparse.Namespace, overrides: Mapping[str, Any]) -> LoadedModel:
    """Loads the model that the arguments of `add_source` name, and logs its notes.

    Raises:
      UserError: they name no model or several, or the model cannot be read.
    """
    given = {
        f"--{name}={value}": value
        for name in ("workdir", "init_from", "checkpoint")
        if (value := getattr(args, name)) is not None
    }
    step = args.checkpoint
    of_run = step is not None and (step.isdigit() or step in ("last", "best"))
    if of_run and args.workdir is None:
        raise UserError(f"--checkpoint={step} is of a run: expected --workdir, or a file")
    if len(given) - of_run != 1:
        raise UserError(
            f"{' and '.join(given) or '--workdir, --checkpoint and --init_from are missing'}: "
            "expected one of --workdir, --checkpoint=FILE and --init_from"
        )
    if args.workdir is not None and not args.workdir.is_dir():
        raise UserError(
            f"--workdir={args.workdir} is no folder; expected the workdir of a run"
            f"{suggest_workdir(args.workdir)}"
        )
    options: dict[str, Any] = {"model": {}}
    for key, value in overrides.items():
        if key.startswith("model."):
            options["model"][key.removeprefix("model.")] = value
        elif key in _OVERRIDES:
            options[_OVERRIDES[key]] = value
        else:
            raise UserError(
                f"--config.{key}={value}: expected --config.model.KEY or one of "
                f"{', '.join(f'--config.{key}' for key in _OVERRIDES)}"
            )
    model = load_model(
        args.workdir or args.init_from or str(step),
        checkpoint=step if of_run else None,
        params=args.params,
        preprocess=args.preprocess,
        class_names=None if args.labels is None else _read_labels(args.labels),
        parts=args.parts,
        **options,
    )
    log(f"model: {model.source}")
    for note in model.notes:
        log(f"  {note}")
    return model


def _read_labels(file: Path) -> tuple[str, ...]:
    names = read_names(file, key=f"--labels={file}")
    if not names:
        raise UserError(f"--labels={file} is empty: expected a class name a line")
    return names
