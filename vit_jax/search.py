# SPDX-License-Identifier: Apache-2.0
r"""Finds the images that a text describes, or that are similar to another image.

PATHS are files, folders (all images below them), patterns in quotes, or - for a list on stdin; the
last argument is the text. A model of images and texts compares its vector with those of all images,
and the most similar ones are printed with their scores, the cosines. With --image in place of the
text, any model will do. Images that can't be read are named and left out; then the exit code is 1.
It is 2 for bad input.

Examples:
  python -m vit_jax.search --workdir=runs/clip photos 'two dogs on a beach'
  python -m vit_jax.search --workdir=runs/clip --output=found.html photos 'two dogs on a beach'
  python -m vit_jax.search --workdir=runs/digits --image=seven.png --top_k=5 photos
"""

import argparse
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vit_jax.config.load import parse_overrides
from vit_jax.inference.source import (
    add_source,
    add_stream,
    check_source,
    check_stream,
    list_paths,
    log_source,
    read_source,
)
from vit_jax.observe.console import log, set_up
from vit_jax.pages import html
from vit_jax.utils.command import CommandParser, local_path, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import check_fresh, fresh_file
from vit_jax.utils.streams import print_result
from vit_jax.utils.text import printable

if TYPE_CHECKING:
    from vit_jax.inference.model import LoadedModel
    from vit_jax.inference.search import Match, Query

# Longest side of a picture of the page, in pixels, and most pictures: a browser holds all of them.
_SIZE, _MAX_PICTURES = 320, 500


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments, without overrides of the config; `text` is the query or None.

    Raises:
      UserError: they don't go together.
    """
    parser = CommandParser(prog="python -m vit_jax.search", description=__doc__)
    add_source(parser, images="PATHS", texts="any")
    add = parser.add_argument
    add(
        "PATHS",
        nargs="+",
        metavar="PATHS TEXT",
        help="Search these images for the text in the last argument.",
    )
    add("--image", metavar="FILE", help="Search for images similar to this one, without a text.")
    add(
        "--top_k",
        type=int,
        default=20,
        help="List this many of the most similar images. The default is %(default)s.",
    )
    add(
        "--output",
        type=local_path,
        metavar="FILE",
        help="Write a page (HTML) with the images to this file, which must not exist.",
    )
    add_stream(parser)
    args = parser.parse_intermixed_args(argv)
    check_stream(args)
    if args.output is not None and args.output.suffix not in (".html", ".htm"):
        raise UserError(f"--output={args.output}: expected a page, such as found.html")
    if args.output is not None and args.top_k > _MAX_PICTURES:
        raise UserError(f"--top_k={args.top_k} with --output: expected at most {_MAX_PICTURES}")
    args.text = None
    if args.image is None:
        args.text = args.PATHS.pop()
        if os.path.exists(args.text):
            raise UserError(
                f"the last argument, {args.text!r}, is a file or folder: expected a text to search "
                "for, such as 'two dogs on a beach', or --image=FILE"
            )
    check_source(args)
    return args


def search(args: argparse.Namespace, model: "LoadedModel", paths: list[str]) -> int:
    """Prints the most similar images, and writes the page; returns how many can't be read.

    Raises:
      UserError: none can be read, or the model can't do what is asked.
    """
    from vit_jax.data.corrupt import CorruptCounter
    from vit_jax.inference.search import embed_query, rank_images

    query: Query = embed_query(model, text=args.text, image=args.image, key="TEXT")
    log_source(model)
    corrupt, started = CorruptCounter(), time.perf_counter()
    found = rank_images(
        model,
        paths,
        query,
        top_k=args.top_k,
        batch_size=args.batch_size,
        corrupt=corrupt,
        num_threads=args.num_threads,
    )
    skipped = corrupt.counts.corrupt
    if not found:
        raise UserError(f"none of {skipped:,} images can be read; the lines above say why")
    width = len(str(len(found)))
    for rank, match in enumerate(found, 1):
        print_result(f"{rank:>{width}}  {match.score:6.3f}  {printable(match.path)}")
    count = len(paths) - skipped
    left_out = f", {skipped:,} can't be read and are left out" if skipped else ""
    seconds = time.perf_counter() - started
    log(f"{count:,} image{'' if count == 1 else 's'} in {seconds:.1f} s{left_out}")
    if args.output is None:
        log("--output=FILE.html writes a page with these images")
        return skipped
    notes = [
        f"The {len(found)} most similar of {count:,} images{left_out}. Scores are cosines.",
        f"Model: {model.source}",
    ]
    with fresh_file(args.output) as fresh:
        fresh.write_text(make_page(args, notes, found), encoding="utf-8")
    log(f"wrote {args.output}: open it in a browser")
    return skipped


def make_page(args: argparse.Namespace, notes: Sequence[str], found: Sequence["Match"]) -> str:
    """Makes a page of the images that were found, and of the one that was searched for."""
    from vit_jax.inference.search import make_thumbnail

    def show(path: str, name: str) -> str:
        picture, size = make_thumbnail(path, _SIZE)
        return html.make_figure(picture, size, alt=path, name=name, caption=[path])

    cards = [show(match.path, f"{i}. {match.score:.3f}") for i, match in enumerate(found, 1)]
    sections = [html.make_section("Found", cards, layout="pictures")]
    if args.image is not None:
        query = [show(args.image, "query")]
        sections.insert(0, html.make_section("Searched for", query, layout="pictures"))
    title = f"Images similar to {args.image}" if args.text is None else args.text
    return html.make_page(title, notes, sections)


def main(argv: Sequence[str]) -> int:
    """Searches, and returns the exit code."""
    overrides, rest = parse_overrides(list(argv))
    args = parse_arguments(rest)
    set_up(quiet=False, to_stderr=True)
    if args.output is not None:
        check_fresh(args.output)
    paths = list_paths(args)
    return 1 if search(args, read_source(args, overrides), paths) else 0


if __name__ == "__main__":
    run_command(main)
