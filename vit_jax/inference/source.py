# SPDX-License-Identifier: Apache-2.0
"""Command-line arguments that choose a trained model."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax.checkpoint.workdir import is_workdir
from vit_jax.observe.console import log
from vit_jax.utils.class_names import read_names
from vit_jax.utils.command import CommandParser, add_workdir
from vit_jax.utils.errors import UserError
from vit_jax.utils.signals import importing
from vit_jax.utils.suggestions import suggest_workdir

if TYPE_CHECKING:
    from vit_jax.inference.model import LoadedModel

# Config keys that can be overridden, with the arguments of `load_model` that they set.
_OVERRIDES = {
    "objective.loss": "loss",
    "objective.pixel_mean": "pixel_mean",
    "objective.pixel_std": "pixel_std",
}

_EXPECTED = "expected one of --workdir (or WORKDIR), --checkpoint=FILE and --init_from"
_MISSING = f"--workdir, --checkpoint and --init_from are missing: {_EXPECTED}"


def add_source(parser: CommandParser, *, images: str | None = None) -> None:
    """Adds the arguments that `check_source` and `load_source` read.

    Args:
      parser: of the command.
      images: the name of the positional arguments that name images; None if there are none. The
        workdir is another one before them.
    """
    parser.set_defaults(images=images)
    group = parser.add_argument_group(
        "the model",
        "One of WORKDIR, --checkpoint=FILE and --init_from names it. --config.model.KEY=VALUE "
        "sets an argument of the model in place of what is stored with the weights; "
        f"{' and '.join(f'--config.{key}' for key in _OVERRIDES)} can be set too.",
    )
    add = group.add_argument
    workdir = "Use the model of the run in this workdir."
    if images is None:
        add_workdir(group, workdir)
    else:
        add("first", nargs="?", metavar="WORKDIR", help=workdir)
        add("--workdir", type=Path, metavar="WORKDIR", help="Give WORKDIR by this option instead.")
    add(
        "--checkpoint",
        help="Use the checkpoint of this step of the run, or its `last` or `best` one; or use this "
        "file. The default is last.",
    )
    add(
        "--init_from",
        help="Use these weights, given as in a config: a file, a URL, or a name that "
        "`vit_jax models` lists.",
    )
    add(
        "--params",
        choices=("raw", "ema"),
        default="raw",
        help="Use the parameters of a run as they are (raw) or their average (ema). The default is "
        "%(default)s.",
    )
    add(
        "--preprocess",
        metavar="LINE",
        help="Prepare images by this line, such as 'decode|resize(224)'. The default is that of "
        "the evaluation of the model.",
    )
    add("--labels", type=Path, metavar="FILE", help="Read class names from this file, one a line.")
    parser.add_parts()


def check_source(args: argparse.Namespace) -> None:
    """Checks that the arguments of `add_source` name one model, and sets `workdir`.

    Raises:
      UserError: they name no model or several, or the workdir is missing.
    """
    step = args.checkpoint
    of_run = step is not None and (step.isdigit() or step in ("last", "best"))
    if args.images is not None:
        _sort_images(args, named=args.init_from is not None or (step is not None and not of_run))
    given = {
        f"--{name}={value}": value
        for name in ("workdir", "init_from", "checkpoint")
        if (value := getattr(args, name)) is not None
    }
    if of_run and args.workdir is None:
        raise UserError(
            f"--checkpoint={step} is of a run: expected --workdir (or WORKDIR), or a file"
        )
    if len(given) - of_run != 1:
        raise UserError(f"{' and '.join(given)}: {_EXPECTED}" if given else _MISSING)
    if args.workdir is not None and not args.workdir.is_dir():
        raise UserError(
            f"--workdir={args.workdir} is no folder; expected the workdir of a run"
            f"{suggest_workdir(args.workdir)}"
        )


def _sort_images(args: argparse.Namespace, *, named: bool) -> None:
    """Takes the first positional argument as the workdir if it is one and no option is."""
    images = getattr(args, args.images)
    if args.first is not None:
        images.insert(0, args.first)
    if named or args.workdir is not None or not is_workdir(Path(images[0])):
        return
    args.workdir = Path(images.pop(0))
    if not images:
        raise UserError(f"{args.images} are missing: expected images after {args.workdir}")


def load_source(args: argparse.Namespace, overrides: Mapping[str, Any]) -> "LoadedModel":
    """Loads the model that the arguments of `add_source` name, and logs its notes.

    Raises:
      UserError: the model cannot be read, or an override is not one of a model.
    """
    with importing():
        from vit_jax.inference.model import load_model

    of_run = args.workdir is not None
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
        args.workdir or args.init_from or args.checkpoint,
        checkpoint=args.checkpoint if of_run else None,
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
