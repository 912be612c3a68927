# SPDX-License-Identifier: Apache-2.0
r"""Classifies images by a trained model, or writes their features.

PATHS are files, folders (all images below them), patterns in quotes, or - for a list on stdin. All
is prepared as in the evaluation of the model. Images that can't be read are named and left out;
then the exit code is 1. It is 2 for bad input.

Examples:
  python -m vit_jax.predict --workdir=runs/digits photos
  python -m vit_jax.predict --workdir=runs/digits --checkpoint=best --params=ema 'photos/**/*.png'
  find photos -name '*.jpg' | python -m vit_jax.predict --workdir=runs/digits --format=csv -
  python -m vit_jax.predict --workdir=runs/digits --output=classes.parquet --tta=flip photos
  python -m vit_jax.predict --checkpoint=vit.safetensors --labels=names.txt photos
  python -m vit_jax.predict --init_from=augreg+imagenet2012:Ti/16@384 --top_k=3 photos
  python -m vit_jax.predict --workdir=runs/digits --embed --output=features.npz photos
  python -m vit_jax.predict --workdir=runs/digits --embed --layer=Transformer/encoderblock_2 \
      --output=tokens.parquet photos
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.unlabeled import find_images
from vit_jax.inference.model import LoadedModel, load_model
from vit_jax.inference.stream import map_images
from vit_jax.inference.writers import (
    CsvWriter,
    FeatureNpzWriter,
    FeatureParquetWriter,
    JsonWriter,
    ParquetWriter,
    TableWriter,
    Writer,
    fresh_file,
    import_pyarrow,
)
from vit_jax.main import parse_overrides
from vit_jax.observe.console import CommandParser, run_command, say, set_up
from vit_jax.utils.errors import UserError

PREDICTIONS = ("table", "csv", "json", "parquet")
FEATURES = ("npz", "parquet")
_ENDINGS = {".jsonl": "json", ".txt": "table"}
_PATH = 48  # columns of a path on the screen at most

# Keys of a config that can be overridden, and the arguments of `load_model` that they become.
_OVERRIDES = {
    "objective.loss": "loss",
    "objective.pixel_mean": "pixel_mean",
    "objective.pixel_std": "pixel_std",
}


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say which model is taken; see `load_source`."""
    group = parser.add_argument_group(
        "the model",
        "--config.model.KEY=VALUE sets an argument of the model in place of what the weights say; "
        f"{' and '.join(f'--config.{key}' for key in _OVERRIDES)} are taken too.",
    )
    group.add_argument("--workdir", type=Path, help="of the run")
    group.add_argument(
        "--checkpoint", help="a step of the run, last (the default), best, or the path of a file"
    )
    group.add_argument("--init_from", help="weights of any kind, as in a config")
    group.add_argument(
        "--params",
        choices=("raw", "ema"),
        default="raw",
        help="of a run: the parameters as they are (raw, the default), or their average (ema)",
    )
    group.add_argument(
        "--preprocess", help="in place of that of the run's evaluation: 'decode|resize(224)'"
    )
    group.add_argument("--labels", type=Path, help="file with a class name a line")


def load_source(args: argparse.Namespace, overrides: Mapping[str, Any]) -> LoadedModel:
    """Loads the model that the arguments of `add_source` name, and says what was taken.

    Raises:
      UserError: they name none, or several, or it can't be read.
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
        raise UserError(f"--workdir={args.workdir}: there is no such folder")
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
        class_names=None if args.labels is None else _read_names(args.labels),
        **options,
    )
    say(f"model: {model.source}")
    for note in model.notes:
        say(f"  {note}")
    return model


def _read_names(file: Path) -> list[str]:
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"--labels={file} can't be read: {e}") from None
    if not names:
        raise UserError(f"--labels={file} is empty: expected a class name a line")
    return names


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments, without overrides of the config; `format` is always set.

    Raises:
      UserError: they don't go together.
    """
    parser = CommandParser(prog="python -m vit_jax.predict", description=__doc__)
    parser.add_argument("PATHS", nargs="+", help="files, folders, patterns, or - for stdin")
    add_source(parser)
    parser.add_argument("--output", type=Path, help="file to write; must not exist")
    parser.add_argument(
        "--format",
        choices=(*PREDICTIONS, "npz"),
        help="of the results; told by the ending of --output, else table",
    )
    parser.add_argument("--top_k", type=int, default=5, help="classes to list; %(default)s")
    parser.add_argument("--embed", action="store_true", help="write features, not classes")
    parser.add_argument(
        "--layer", help="of --embed: whose output; pre_logits. A wrong name lists all"
    )
    parser.add_argument("--tta", choices=("flip",), help="take the mean with the mirror image")
    parser.add_argument("--batch_size", type=int, default=64, help="images; %(default)s")
    parser.add_argument("--num_threads", type=int, help="that decode; one a core")
    args = parser.parse_intermixed_args(argv)
    for key, least in (("top_k", 1), ("batch_size", 1), ("num_threads", 0)):
        value = getattr(args, key)
        if value is not None and value < least:
            raise UserError(f"--{key}={value}: expected at least {least}")
    if args.layer is not None and not args.embed:
        raise UserError(f"--layer={args.layer}: expected --embed with it")
    _choose_format(args)
    return args


def _choose_format(args: argparse.Namespace) -> None:
    known = FEATURES if args.embed else PREDICTIONS
    if args.format is None:
        ending = "" if args.output is None else args.output.suffix
        args.format = _ENDINGS.get(ending, ending.removeprefix(".")) or "table"
    if args.embed and args.output is None:
        raise UserError("--output is missing: --embed expects a file, such as features.npz")
    if args.format not in known:
        raise UserError(
            f"--format={args.format} (--output={args.output}): expected {', '.join(known)} "
            f"{'with' if args.embed else 'without'} --embed"
        )
    if args.format == "parquet":
        import_pyarrow()
        if args.output is None:
            raise UserError("--output is missing: --format=parquet expects a file")


@contextlib.contextmanager
def open_writer(args: argparse.Namespace, model: LoadedModel, paths: list[str]) -> Iterator[Writer]:
    """What takes the results: the screen, or a file that appears when all are in it."""
    with contextlib.ExitStack() as stack:
        if args.output is None:
            yield _make_text_writer(args, sys.stdout, model, paths)
            return
        fresh = stack.enter_context(fresh_file(args.output))
        if args.embed:
            width = max(map(len, paths))
            npz = args.format == "npz"
            writer = (
                FeatureNpzWriter(fresh, path_width=width) if npz else FeatureParquetWriter(fresh)
            )
        elif args.format == "parquet":
            writer = ParquetWriter(fresh, name_of=model.name_of)
        else:
            stream = stack.enter_context(fresh.open("w", encoding="utf-8", newline=""))
            writer = _make_text_writer(args, stream, model, paths)
        with writer:
            yield writer


def _make_text_writer(
    args: argparse.Namespace, stream: Any, model: LoadedModel, paths: list[str]
) -> Writer:
    if args.format == "csv":
        top_k = min(args.top_k, model.module.num_classes)
        return CsvWriter(stream, name_of=model.name_of, top_k=top_k)
    if args.format == "json":
        return JsonWriter(stream, name_of=model.name_of)
    width = min(max(map(len, paths)), _PATH)
    return TableWriter(stream, name_of=model.name_of, path_width=width)


def predict(args: argparse.Namespace, model: LoadedModel, paths: list[str]) -> int:
    """Writes the results of all images; returns how many could not be read.

    Raises:
      UserError: none could be read, or the model can't do what is asked.
    """
    layer = "logits"
    if args.embed:
        layer = args.layer or "pre_logits"
        model.check_layer(layer)
    else:
        model.check_classifies()
    corrupt, started, count = CorruptCounter(), time.perf_counter(), 0
    with open_writer(args, model, paths) as writer:
        for kept, rows in map_images(
            model,
            paths,
            layer=layer,
            tta=args.tta,
            batch_size=args.batch_size,
            corrupt=corrupt,
            num_threads=args.num_threads,
        ):
            count += len(kept)
            if not kept:
                continue
            if args.embed:
                writer.write(kept, rows)
            else:
                prediction = model.predict(rows)
                labels = prediction.top(args.top_k)
                probabilities = np.take_along_axis(prediction.probabilities, labels, axis=1)
                writer.write(kept, labels, probabilities)
        skipped = corrupt.counts.corrupt
        if not count:
            raise UserError(f"none of {skipped:,} images can be read; the lines above say why")
    seconds = time.perf_counter() - started
    left_out = f", {skipped:,} can't be read and are left out" if skipped else ""
    say(f"{count:,} images in {seconds:.1f} s{left_out}")
    if args.output is not None:
        say(f"wrote {args.output}")
    return skipped


def main(argv: Sequence[str]) -> int:
    """Predicts, and returns the exit code."""
    overrides, rest = parse_overrides(list(argv))
    args = parse_arguments(rest)
    set_up(quiet=False, to_stderr=args.output is None)
    if args.output is not None and args.output.exists():
        raise UserError(f"--output={args.output} exists; remove it, or choose another name")
    paths = find_images(args.PATHS, lines=sys.stdin)
    model = load_source(args, overrides)
    return 1 if predict(args, model, paths) else 0


if __name__ == "__main__":
    run_command(main)
