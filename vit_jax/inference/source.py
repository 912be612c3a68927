# SPDX-License-Identifier: Apache-2.0
"""Command-line arguments that choose a trained model."""

import argparse
import io
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax.checkpoint.workdir import is_workdir
from vit_jax.config.load import parse_literal
from vit_jax.observe.console import log
from vit_jax.utils.class_names import normalize_name, read_lines
from vit_jax.utils.command import CommandParser, add_workdir
from vit_jax.utils.errors import UserError
from vit_jax.utils.mirrors import find_folder, find_local
from vit_jax.utils.signals import importing
from vit_jax.utils.suggestions import suggest_workdir

if TYPE_CHECKING:
    from vit_jax.inference.labels import TextClasses
    from vit_jax.inference.model import LoadedModel

# Config keys that can be overridden, with the arguments of `load_model` that they set.
_OVERRIDES = {
    "objective.loss": "loss",
    "objective.pixel_mean": "pixel_mean",
    "objective.pixel_std": "pixel_std",
    "adapt.posemb_resize": "posemb_resize",
}

_EXPECTED = "expected one of --workdir (or WORKDIR), --checkpoint=FILE and --init_from"
# Characters of `--labels` in an error.
_SHOWN = 60

# Values of `--labels` that are files, also if they are missing.
_FILE = re.compile(r"[^,]*[/\\][^,]*|[^,]*\.\w+|.*\.(txt|csv|tsv|json)")

_MISSING = f"--workdir, --checkpoint and --init_from are missing: {_EXPECTED}"


def add_source(
    parser: CommandParser, *, images: str | None = None, texts: str | None = None
) -> None:
    """Adds the arguments that `check_source` and `load_source` read.

    Args:
      parser: of the command.
      images: the name of the positional arguments that name images; None if there are none. The
        workdir is another one before them.
      texts: whether the command takes models of images and texts, and what for: "classes" that
        `--labels` has, see `load_labels`, or "any" texts of its own.
    """
    parser.set_defaults(images=images, texts_for=texts)
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
        add(
            "--workdir",
            type=find_folder,
            metavar="WORKDIR",
            help="Give WORKDIR by this option instead.",
        )
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
    if texts != "any":
        by_text = ' Or give them as texts, "a cat,a dog", to a model of images and texts.'
        add(
            "--labels",
            metavar="FILE" if texts is None else "LABELS",
            help="Read class names from this file, one a line."
            + ("" if texts is None else by_text),
        )
    if texts == "classes":
        add(
            "--templates",
            type=_parse_templates,
            help="Insert each text of --labels into these templates: one such as 'a photo of a "
            "{}.', several such as \"('a {}', 'one {}')\", a file with one a line, or one of name, "
            "photo and photos. The default is name, the text as it is.",
        )
    if texts is not None:
        add(
            "--tokenizer",
            metavar="LINE",
            help="Make tokens of texts by this line, such as 'clip(length=77)', where the weights "
            "do not state it.",
        )
    parser.add_parts()


def check_source(args: argparse.Namespace, *, needs_images: bool = True) -> None:
    """Checks that the arguments of `add_source` name one model, and sets `workdir`.

    Args:
      args: the parsed arguments.
      needs_images: whether the command has nothing to do without images.

    Raises:
      UserError: they name no model or several, or the workdir is missing.
    """
    step = args.checkpoint
    of_run = step is not None and (step.isdigit() or step in ("last", "best"))
    if args.images is not None:
        named = args.init_from is not None or (step is not None and not of_run)
        _sort_images(args, named=named, needed=needs_images)
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
        if given:
            raise UserError(f"{' and '.join(given)}: {_EXPECTED}")
        raise UserError(f"{_MISSING}{_describe_first(args)}")
    if args.workdir is not None and not args.workdir.is_dir():
        raise UserError(
            f"--workdir={args.workdir} is no folder; expected the workdir of a run"
            f"{suggest_workdir(args.workdir)}"
        )


def _describe_first(args: argparse.Namespace) -> str:
    """What the path in the place of WORKDIR is, where more paths follow it and no file has it."""
    images = [] if args.images is None else getattr(args, args.images)
    if len(images) < 2 or os.path.isfile(images[0]):
        return ""
    return f"; {images[0]!r} is not a workdir{suggest_workdir(Path(images[0]))}"


def _sort_images(args: argparse.Namespace, *, named: bool, needed: bool) -> None:
    """Takes the first positional argument as the workdir if it is one and no option is."""
    images = getattr(args, args.images)
    if args.first is not None:
        images.insert(0, args.first)
    given = ""
    if images and not named and args.workdir is None:
        folder = Path(find_local(images[0], key=args.images))
        if is_workdir(folder):
            args.workdir = folder
            del images[0]
            given = f" after {args.workdir}"
    if needed and not images:
        raise UserError(f"{args.images} are missing: expected images{given}")


def add_stream(parser: CommandParser) -> None:
    """Adds the arguments of commands that run a model over many images."""
    add = parser.add_argument
    add(
        "--batch_size",
        type=int,
        default=64,
        help="Process this many images at a time. The default is %(default)s.",
    )
    add(
        "--num_threads",
        type=int,
        help="Decode images in this many threads. The default is one for each core.",
    )


def check_stream(args: argparse.Namespace) -> None:
    """Checks the arguments of `add_stream`, and `top_k`; raises `UserError`."""
    for key, least in (("top_k", 1), ("batch_size", 1), ("num_threads", 0)):
        value = getattr(args, key)
        if value is not None and value < least:
            raise UserError(f"--{key}={value}: expected at least {least}")


def list_paths(args: argparse.Namespace) -> list[str]:
    """Lists the images that the positional arguments name, some of them on stdin.

    Raises:
      UserError: there are none.
    """
    with importing():
        from vit_jax.inference.images import STDIN, find_images
    paths = getattr(args, args.images)
    if STDIN in paths and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # Names of files may be of any bytes.
    return find_images(paths, lines=sys.stdin)


def load_source(args: argparse.Namespace, overrides: Mapping[str, Any]) -> "LoadedModel":
    """Loads the model that the arguments of `add_source` name, and logs its notes.

    Raises:
      UserError: see `read_source`.
    """
    model = read_source(args, overrides)
    log_source(model)
    return model


def log_source(model: "LoadedModel") -> None:
    """Logs where a model comes from, and notes about its weights."""
    log(f"model: {model.source}")
    for note in model.notes:
        log(f"  {note}")


def read_source(args: argparse.Namespace, overrides: Mapping[str, Any]) -> "LoadedModel":
    """Loads the model that the arguments of `add_source` name, without a word.

    Raises:
      UserError: the model cannot be read, an override is not one of a model, or labels are given
        to a model that does not take them.
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
    source = args.workdir or args.init_from or args.checkpoint
    labels = getattr(args, "labels", None)
    if getattr(args, "tokenizer", None) is not None:
        options["tokenizer"] = args.tokenizer
    names = None if labels is None else _read_labels(labels)
    by_file = labels is not None and _is_file(labels)
    for name in ("window", "stride"):
        if getattr(args, name, None) is not None:
            options[name] = getattr(args, name)
    try:
        model = load_model(
            source,
            checkpoint=args.checkpoint if of_run else None,
            params=args.params,
            preprocess=args.preprocess,
            class_names=tuple(map(normalize_name, names)) if names and by_file else None,
            parts=args.parts,
            **options,
        )
    except UserError as e:
        if str(e).startswith(("window=", "stride=")):  # Arguments in Python, and options here.
            raise UserError(f"--{e}") from None
        raise
    if labels is not None:
        _check_labels(args, labels, model)
    return model


def _check_labels(args: argparse.Namespace, labels: str, model: "LoadedModel") -> None:
    shown = labels if len(labels) <= _SHOWN else f"{labels[:_SHOWN]}..."
    if model.texts is None and not _is_file(labels):
        raise UserError(
            f"--labels={shown}: {model.source} has no text tower: expected a file with a class "
            "name a line, or a model that compares images with texts"
        )
    if model.texts is not None and args.texts_for is None:
        raise UserError(
            f"--labels={shown}: {model.source} compares images with texts, and this command takes "
            "no texts: leave --labels out"
        )


def load_labels(args: argparse.Namespace, model: "LoadedModel") -> "TextClasses | None":
    """Makes classes of the texts in `--labels`; None for a model with classes of its own.

    Raises:
      UserError: there are none, though the model needs them, or see `LoadedModel.embed_labels`.
    """
    if model.texts is None:
        if args.templates is not None:
            raise UserError(
                f"--templates={args.templates}: {model.source} has no text tower: leave it out"
            )
        if model.segmentation is None:
            model.check_classifies()
        return None
    if args.labels is None:
        model.check_classifies()  # Raises, since it has none.
        return None
    return model.embed_labels(_read_labels(args.labels), templates=args.templates, key="--labels")


def log_classes(args: argparse.Namespace, classes: "TextClasses") -> None:
    """Logs how many classes `load_labels` made, and of which prompts."""
    given = args.templates or "the labels as they are"
    prompts = given if isinstance(given, str) else ", ".join(map(repr, given))
    log(f"  classes by text: {len(classes.names):,}, prompts: {prompts}")


def _parse_templates(text: str) -> str | tuple[str, ...]:
    """One value, or the tuple or list of several, as `evals.NAME.templates` takes them."""
    value = parse_literal(text)
    return tuple(map(str, value)) if isinstance(value, tuple | list) else text


def _is_file(labels: str) -> bool:
    if os.path.isdir(labels):
        raise UserError(
            f"--labels={labels} is a folder: expected a file with a name a line, or texts "
            "separated by commas"
        )
    return os.path.isfile(labels) or _FILE.fullmatch(labels) is not None


def _read_labels(labels: str) -> list[str]:
    """The lines of a file, or the texts between commas."""
    if not _is_file(labels):
        return labels.split(",")
    names = read_lines(Path(labels), key=f"--labels={labels}", what="class name")
    if not names:
        raise UserError(f"--labels={labels} is empty: expected a class name a line")
    return names
