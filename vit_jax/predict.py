# SPDX-License-Identifier: Apache-2.0
r"""Classifies images or their pixels by a trained model, or writes features of images or texts.

PATHS are files, folders (all images below them), patterns in quotes, or - for a list on stdin.
Images are prepared as in the evaluation of the model. Images that can't be read are named and left
out; then the exit code is 1. It is 2 for bad input.

Examples:
  python -m vit_jax.predict runs/digits photos
  python -m vit_jax.predict --workdir=runs/averaged --checkpoint=last --params=ema 'photos/**/*.png'
  python -m vit_jax.predict --workdir=runs/digits_segment --masks=masks photos
  find photos -name '*.jpg' | python -m vit_jax.predict --workdir=runs/digits --format=csv -
  python -m vit_jax.predict --workdir=runs/digits --output=classes.parquet --tta=flip photos
  python -m vit_jax.predict --checkpoint=vit.safetensors --labels=names.txt photos
  python -m vit_jax.predict --workdir=runs/clip --labels='a cat,a dog' photos
  python -m vit_jax.predict --init_from=augreg+imagenet2012:Ti/16@384 --top_k=3 photos
  python -m vit_jax.predict --workdir=runs/digits --embed --output=features.npz photos
  python -m vit_jax.predict --workdir=runs/digits --embed --layer=Transformer/encoderblock_2 \
      --output=tokens.parquet photos
  python -m vit_jax.predict --workdir=runs/clip --embed --texts=captions.txt --output=texts.npz
"""

import argparse
import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vit_jax.config.load import parse_overrides
from vit_jax.inference.source import (
    add_source,
    add_stream,
    check_source,
    check_stream,
    list_paths,
    load_labels,
    log_classes,
    log_source,
    read_source,
)
from vit_jax.observe.console import log, set_up
from vit_jax.utils.class_names import read_lines
from vit_jax.utils.command import CommandParser, local_path, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import check_fresh, fresh_file
from vit_jax.utils.streams import result_stream
from vit_jax.utils.text import printable

if TYPE_CHECKING:
    from vit_jax.inference.labels import TextClasses
    from vit_jax.inference.model import LoadedModel
    from vit_jax.inference.writers import Writer

PREDICTIONS = ("table", "csv", "json", "parquet")
FEATURES = ("npz", "parquet")
_ENDINGS = {".jsonl": "json", ".txt": "table"}
_PATH = 48  # columns of a path on the screen at most
_NAME = 24  # columns of a class name


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments, without overrides of the config; `format` is always set.

    Raises:
      UserError: they don't go together.
    """
    parser = CommandParser(prog="python -m vit_jax.predict", description=__doc__)
    add = parser.add_argument
    add_source(parser, images="PATHS", texts="classes")
    add("PATHS", nargs="*", help="Classify these images.")
    add("--output", type=local_path, help="Write the results to this file, which must not exist.")
    add(
        "--format",
        choices=(*PREDICTIONS, "npz"),
        help="Write the results in this format. The default follows from the ending of --output; "
        "on the screen it is table.",
    )
    add(
        "--top_k",
        type=int,
        default=5,
        help="List this many of the most probable classes. The default is %(default)s.",
    )
    add(
        "--masks",
        type=local_path,
        metavar="FOLDER",
        help="Write the mask of each image to this folder, which must not exist, and the image "
        "below the colours of its classes. The model must find the class of each pixel; the other "
        "results are then the shares of pixels of the classes.",
    )
    add(
        "--depth",
        type=local_path,
        metavar="FOLDER",
        help="Write the depth of each image to this folder, which must not exist, in millimetres "
        "as a PNG of 16 bits, and a picture of it. The model must find the depth of each pixel; "
        "the other results are then its least, mean and largest value in metres.",
    )
    add(
        "--window",
        type=int,
        metavar="PIXELS",
        help="Find the class or the depth of each pixel in windows with this side, one by one; the "
        "results are averaged where they overlap. The default is the whole image.",
    )
    add(
        "--stride",
        type=int,
        metavar="PIXELS",
        help="Take so many pixels from one window to the next. The default is --window.",
    )
    add("--embed", action="store_true", help="Write features in place of classes.")
    add(
        "--layer",
        help="Write the output of this layer, with --embed. The default is pre_logits, or "
        "image_embed of a model of images and texts; a wrong name prints all layers.",
    )
    add("--text", action="append", help="Embed this text, with --embed; may be repeated.")
    add(
        "--texts",
        type=local_path,
        metavar="FILE",
        help="Embed the lines of this file, with --embed.",
    )
    add("--tta", choices=("flip",), help="Average the results for each image and its mirror image.")
    add_stream(parser)
    args = parser.parse_intermixed_args(argv)
    check_stream(args)
    if args.layer is not None and not args.embed:
        raise UserError(f"--layer={args.layer}: expected --embed with it")
    for name in ("masks", "depth", "window"):
        if args.embed and (value := getattr(args, name)) is not None:
            raise UserError(f"--{name}={value}: expected no --embed with it")
    if args.stride is not None and args.window is None:
        raise UserError(f"--stride={args.stride}: expected --window with it")
    _choose_format(args)
    of_texts = args.text is not None or args.texts is not None
    check_source(args, needs_images=not of_texts)
    if of_texts:
        _check_texts(args)
    return args


def _check_texts(args: argparse.Namespace) -> None:
    option = "--text" if args.text is not None else f"--texts={args.texts}"
    if not args.embed:
        raise UserError(f"{option}: expected --embed with it, and --output=FILE")
    for name in ("layer", "tta", "labels", "templates"):
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name}={getattr(args, name)} is for images: leave it or {option} out"
            )
    if args.PATHS:
        raise UserError(
            f"{option} and {args.PATHS[0]!r}: expected texts or images, each in a file of its own"
        )


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
        from vit_jax.inference.writers import import_pyarrow

        import_pyarrow()
        if args.output is None:
            raise UserError("--output is missing: --format=parquet expects a file")


@contextlib.contextmanager
def open_writer(
    args: argparse.Namespace,
    names: Sequence[str],
    rows: Sequence[str],
    *,
    what: str = "image",
    value: str = "probability",
) -> Iterator["Writer"]:
    """What takes the results: the screen, or a file that appears when all are in it.

    Args:
      args: the arguments of the command.
      names: names of the classes.
      rows: paths of the images, or texts.
      what: name of the column of these.
      value: name of what each class has.
    """
    from vit_jax.inference.writers import FeatureNpzWriter, FeatureParquetWriter, ParquetWriter

    with contextlib.ExitStack() as stack:
        if args.output is None:
            yield _make_text_writer(args, result_stream(), names, rows, value)
            return
        fresh = stack.enter_context(fresh_file(args.output))
        if args.format == "npz":
            writer = FeatureNpzWriter(fresh, path_width=_width(rows), what=what)
        elif args.embed:
            writer = FeatureParquetWriter(fresh, what=what)
        elif args.format == "parquet":
            writer = ParquetWriter(fresh, name_of=names.__getitem__, value=value)
        else:
            stream = stack.enter_context(fresh.open("w", encoding="utf-8", newline=""))
            writer = _make_text_writer(args, stream, names, rows, value)
        with writer:
            yield writer


def _make_text_writer(
    args: argparse.Namespace, stream: Any, names: Sequence[str], paths: Sequence[str], value: str
) -> "Writer":
    from vit_jax.inference.writers import CsvWriter, JsonWriter, TableWriter

    if args.format == "csv":
        top_k = len(names) if value == "metres" else min(args.top_k, len(names))
        return CsvWriter(stream, name_of=names.__getitem__, top_k=top_k, value=value)
    if args.format == "json":
        return JsonWriter(stream, name_of=names.__getitem__, value=value)
    width = min(_width(paths), _PATH)
    # Names are cut where they stay distinct: texts may differ at their ends only.
    name_width = next(w for w in (_NAME, None) if len({n[:w] for n in names}) == len({*names}))
    return TableWriter(
        stream, name_of=names.__getitem__, path_width=width, name_width=name_width, value=value
    )


def _width(paths: Sequence[str]) -> int:
    return max(len(printable(path)) for path in paths)


def choose_classes(
    args: argparse.Namespace, model: "LoadedModel"
) -> tuple[str, Sequence[str], "TextClasses | None"]:
    """The layer to compute, the names of the classes, and the classes that are texts.

    Raises:
      UserError: the model can't do what is asked.
    """
    from vit_jax.inference.model import IMAGE_EMBED

    dense = None if args.embed else model.dense
    of_depth = dense is not None and model.segmentation is None
    for name, what, objective, fits in (
        ("masks", "class", "segmentation", dense is not None and not of_depth),
        ("depth", "depth", "depth", of_depth),
    ):
        if (value := getattr(args, name)) is not None and not fits:
            raise UserError(
                f"--{name}={value}: {model.source} does not find the {what} of each pixel: "
                f"expected a run with objective.name={objective!r}"
            )
    if dense is not None and args.templates is None:
        if not of_depth:
            return dense.output, model.list_names(), None
        from vit_jax.inference.masks import DEPTHS

        return dense.output, DEPTHS, None
    if not args.embed:
        classes = load_labels(args, model)
        if classes is None:
            return "logits", model.list_names(), None
        return IMAGE_EMBED, classes.names, classes
    if model.texts is not None and (args.labels or args.templates) is not None:
        raise UserError(
            "--labels and --templates are for classes: with --embed, expected --text or --texts"
        )
    layer = args.layer or ("pre_logits" if model.texts is None else IMAGE_EMBED)
    model.check_layer(layer)
    return layer, (), None


def predict(args: argparse.Namespace, model: "LoadedModel", paths: list[str]) -> int:
    """Writes the results of all images; returns how many could not be read.

    Raises:
      UserError: none could be read, or the model can't do what is asked.
    """
    import numpy as np

    from vit_jax.data.corrupt import CorruptCounter
    from vit_jax.inference.masks import ImageMask, MaskFolder, make_pixel_result
    from vit_jax.inference.stream import map_images

    layer, names, classes = choose_classes(args, model)
    log_source(model)
    if classes is not None:
        log_classes(args, classes)
    dense = model.dense is not None and layer == model.dense.output
    target = args.masks or args.depth
    folder = target and MaskFolder(target)
    compute = functools.partial(model.start, layer=layer, tta=args.tta)
    if dense and not args.embed:
        compute = functools.partial(model.start_pixels, tta=args.tta)
    corrupt, started, count = CorruptCounter(), time.perf_counter(), 0
    value = "probability"
    if dense:
        value = "share" if model.segmentation else "metres"
    with open_writer(args, names, paths, value=value) as writer:
        for kept, rows in map_images(
            model,
            paths,
            compute=compute,
            batch_size=min(args.batch_size, model.pixel_batch_size) if dense else args.batch_size,
            corrupt=corrupt,
            num_threads=args.num_threads,
        ):
            count += len(kept)
            if not kept:
                continue
            if args.embed:
                writer.write(kept, rows)
            elif dense:
                values = []
                for path, outputs in zip(kept, rows, strict=True):
                    found = make_pixel_result(model, path, outputs)
                    values.append(found.shares if isinstance(found, ImageMask) else found.summary)
                    if folder:
                        folder.write(found)
                if model.segmentation:
                    writer.write(kept, *_sort(np.stack(values), args.top_k))
                else:
                    places = np.tile(np.arange(len(names)), (len(kept), 1))
                    writer.write(kept, places, np.stack(values))
            else:
                prediction = model.judge(rows, classes)
                labels = prediction.top(args.top_k)
                probabilities = np.take_along_axis(prediction.probabilities, labels, axis=1)
                writer.write(kept, labels, probabilities)
        skipped = corrupt.counts.corrupt
        if not count:
            raise UserError(f"none of {skipped:,} images can be read; the lines above say why")
    seconds = time.perf_counter() - started
    left_out = f", {skipped:,} can't be read and are left out" if skipped else ""
    log(f"{count:,} image{'' if count == 1 else 's'} in {seconds:.1f} s{left_out}")
    if args.output is not None:
        log(f"wrote {args.output}")
    if folder:
        one, many = ("mask", "masks") if args.masks else ("depth image", "depth images")
        picture = "overlay" if args.masks else "picture"
        number = f"1 {one}, as PNG, and its {picture}"
        if count > 1:
            number = f"{count:,} {many}, as PNG, and as many {picture}s"
        log(f"wrote {target}: {number}")
    return skipped


def _sort(values: Any, k: int) -> tuple[Any, Any]:
    """The `k` classes of the highest values, int `[n, k]`, and these, of float `[n, classes]`."""
    import numpy as np

    labels = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return labels, np.take_along_axis(values, labels, axis=1)


def embed_texts(args: argparse.Namespace, model: "LoadedModel", texts: Sequence[str]) -> None:
    """Writes the unit vectors of texts.

    Raises:
      UserError: the model has no text tower, or its tokenizer is not known.
    """
    started = time.perf_counter()
    vectors = model.text_embed(texts)
    log_source(model)
    with open_writer(args, (), texts, what="text") as writer:
        writer.write(texts, vectors)
    seconds = time.perf_counter() - started
    log(f"{len(texts):,} text{'' if len(texts) == 1 else 's'} in {seconds:.1f} s")
    log(f"wrote {args.output}")


def _list_texts(args: argparse.Namespace) -> list[str]:
    from vit_jax.inference.texts import check_text

    texts = [check_text(text, key="--text") for text in args.text or ()]
    if args.texts is not None:
        key = f"--texts={args.texts}"
        lines = read_lines(args.texts, key=key, what="text")
        texts += [check_text(line, key=f"{key}: line {i}") for i, line in enumerate(lines, 1)]
    if not texts:
        raise UserError(f"--texts={args.texts} is empty: expected a text a line")
    return texts


def main(argv: Sequence[str]) -> int:
    """Predicts, and returns the exit code."""
    overrides, rest = parse_overrides(list(argv))
    args = parse_arguments(rest)
    set_up(quiet=False, to_stderr=args.output is None)
    if args.output is not None:
        check_fresh(args.output)
    if args.masks is not None:
        check_fresh(args.masks, key="--masks")
    if args.depth is not None:
        check_fresh(args.depth, key="--depth")
    if args.text is not None or args.texts is not None:
        texts = _list_texts(args)
        embed_texts(args, read_source(args, overrides), texts)
        return 0
    paths = list_paths(args)
    model = read_source(args, overrides)
    return 1 if predict(args, model, paths) else 0


if __name__ == "__main__":
    run_command(main)
