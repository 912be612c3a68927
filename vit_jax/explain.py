# SPDX-License-Identifier: Apache-2.0
r"""Draws what a trained model sees in images, as PNG files and one HTML page.

IMAGES are files, folders, or patterns in quotes. The page needs no other file: open it in a
browser, or send it. The exit code is 2 for bad input; then nothing is written.

Examples:
  python -m vit_jax.explain runs/digits --output=digits_seen photos/3.png photos/8.png
  python -m vit_jax.explain --workdir=runs/digits --output=maps --figures=rollout,pca photos
  python -m vit_jax.explain --init_from=augreg+imagenet2012:Ti/16@384 --output=seen cat.jpg
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax.config.load import parse_overrides
from vit_jax.inference.source import add_source, check_source, load_source
from vit_jax.observe.console import log, set_up
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.pages import html
from vit_jax.utils.command import CommandParser, local_path, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import check_fresh, fresh_folder
from vit_jax.utils.signals import importing
from vit_jax.utils.suggestions import suggest

if TYPE_CHECKING:
    from vit_jax.inference.figures import Figure
    from vit_jax.inference.model import LoadedModel

PAGE = "index.html"
# The figures of `inference.figures`, by name and in order.
FIGURES = (
    "filters",
    "positions",
    "distance",
    "attention",
    "rollout",
    "similarity",
    "pca",
)

# Most images of a page: a browser holds all of it in memory.
_MAX_IMAGES = 64
_CLASSES = 5
# Wider figures take a row of their own; in pixels of the page.
_WIDE = 640


@dataclasses.dataclass(frozen=True)
class Section:
    """Figures under one heading.

    Attributes:
      title: heading.
      figures: figures in order.
      classes: class names and probabilities, the most probable first; empty for no such card.
    """

    title: str
    figures: Sequence["Figure"]
    classes: Sequence[tuple[str, float]] = ()


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's arguments, without overrides; `figures` becomes a list or None.

    Raises:
      UserError: an argument is invalid.
    """
    parser = CommandParser(prog="python -m vit_jax.explain", description=__doc__)
    add_source(parser, images="IMAGES")
    parser.add_argument("IMAGES", nargs="+", help="Explain these images.")
    parser.add_argument("--output", type=local_path, help="Make this folder, which must not exist.")
    parser.add_argument(
        "--figures",
        help=f"Draw these figures, separated by commas: {', '.join(FIGURES)}. The default is all "
        "that the model allows.",
    )
    parser.add_argument("--verbose", action="store_true", help="Print the name of each file.")
    args = parser.parse_intermixed_args(argv)
    if args.output is None:
        raise UserError("--output is missing: expected a folder to make")
    if "-" in (args.first, *args.IMAGES):
        raise UserError("IMAGES: expected files, folders or patterns; - is for vit_jax.predict")
    if args.figures is not None:
        args.figures = args.figures.split(",")
        for name in args.figures:
            if name not in FIGURES:
                raise UserError(f"--figures: {name!r} is unknown{suggest(name, FIGURES)}")
    check_source(args)
    return args


def choose_figures(model: "LoadedModel", wanted: Sequence[str] | None) -> list[str]:
    """Chooses the figures to draw: those wanted, or all that are possible.

    Raises:
      UserError: a wanted figure cannot be drawn.
    """
    from vit_jax.inference.figures import find_impossible

    impossible = find_impossible(model)
    for name in wanted or ():
        if name in impossible:
            raise UserError(f"--figures: {name} can't be drawn: {impossible[name]}")
    if wanted:
        return [name for name in FIGURES if name in wanted]
    for reason in dict.fromkeys(impossible.values()):
        names = ", ".join(name for name, why in impossible.items() if why == reason)
        log(f"not drawn: {names}: {reason}")
    return [name for name in FIGURES if name not in impossible]


def explain(model: "LoadedModel", paths: Sequence[str], names: Sequence[str]) -> list[Section]:
    """Draws the figures of these names for the model, and for each of the images.

    Raises:
      UserError: an image cannot be read.
    """
    from vit_jax.inference import figures as lib

    images = [model.preprocess(path) for path in paths]
    of_model = [lib.OF_MODEL[name](model) for name in names if name in lib.OF_MODEL]
    sections, views = [], []
    with ProgressLog("drawing", total=len(paths), unit="images") as progress:
        for path, image in zip(paths, images, strict=True):
            view = lib.make_view(model, image) if {*names} - lib.OF_MODEL.keys() else None
            drawn = [lib.OF_IMAGE[name](model, view) for name in names if name in lib.OF_IMAGE]
            sections.append(Section(path, drawn, _classify(model, image)))
            if any(name in lib.OF_VIEWS for name in names):
                views.append(view)
            progress.advance(1)
    of_model += [lib.OF_VIEWS[name](model, views) for name in names if name in lib.OF_VIEWS]
    return [Section("The model", of_model), *sections] if of_model else sections


def _classify(model: "LoadedModel", image: object) -> list[tuple[str, float]]:
    if not model.classifies:
        return []
    prediction = model(image)
    labels = prediction.top(_CLASSES)[0]
    return [(model.name_of(int(i)), float(prediction.probabilities[0, i])) for i in labels]


def refuse_any_size(model: "LoadedModel") -> None:
    """Raises `UserError` where images are columns of patches, of which figures are not drawn."""
    from vit_jax.models.interface import takes_any_size

    if takes_any_size(model.module):
        side = model.image_shape[1] * 16
        raise UserError(
            f"{model.source}: its images are prepared as patches of any size "
            f"({model.preparation.line}): expected a line for images of one size, such as "
            f"--preprocess='decode|resize({side})'"
        )


def write(folder: Path, title: str, notes: Sequence[str], sections: Sequence[Section]) -> list[str]:
    """Writes the pictures and the page to a folder, and returns the names of the files."""
    from vit_jax.inference.draw import encode_png

    written: list[str] = []

    def save(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        written.append(name)

    for number, section in enumerate(sections):
        for figure in section.figures:
            save(f"{_stem(section, number)}_{figure.name}.png", encode_png(figure.picture))
    page = html.make_page(title, notes, map(_show_section, sections))
    save(PAGE, page.encode())
    return written


def _show_section(section: Section) -> str:
    cards = []
    if section.classes:
        cards.append(html.make_card("Classes", html.make_bars(section.classes)))
    # Figures that take a whole row come last, so no row has gaps.
    cards += map(_show_figure, sorted(section.figures, key=_is_wide))
    return html.make_section(section.title, cards)


def _is_wide(figure: "Figure") -> bool:
    return figure.picture.width > _WIDE * figure.density


def _show_figure(figure: "Figure") -> str:
    from vit_jax.inference.draw import encode_png

    width, height = (side // figure.density for side in figure.picture.size)
    return html.make_figure(
        encode_png(figure.picture),
        (width, height),
        alt=figure.title,
        title=figure.title,
        caption=[figure.caption],
        wide=_is_wide(figure),
        sharp=figure.density == 1,
    )


def _stem(section: Section, number: int) -> str:
    from vit_jax.inference import figures as lib

    of_model = lib.OF_MODEL.keys() | lib.OF_VIEWS.keys()
    if any(figure.name in of_model for figure in section.figures):
        return "model"
    name = re.sub(r"[^\w.-]+", "_", Path(section.title).stem)
    return f"{number:02}_{name}"


def main(argv: Sequence[str]) -> None:
    """Draws the figures and logs where they are."""
    overrides, rest = parse_overrides(list(argv))
    args = parse_arguments(rest)
    set_up(quiet=False)
    check_fresh(args.output)
    with importing():
        from vit_jax.inference.images import find_images
    paths = find_images(args.IMAGES)
    if len(paths) > _MAX_IMAGES:
        raise UserError(f"{len(paths):,} images: expected at most {_MAX_IMAGES} for one page")
    model = load_source(args, overrides)
    refuse_any_size(model)
    names = choose_figures(model, args.figures)
    with fresh_folder(args.output) as folder:
        title = f"What {args.workdir or args.init_from or args.checkpoint} sees"
        notes = [f"Parameters: {model.source}", *model.notes]
        files = write(folder, title, notes, explain(model, paths, names))
    for name in files if args.verbose else ():
        log(f"wrote {args.output / name}")
    images = f"{len(paths)} image{'s' * (len(paths) != 1)}"
    log(f"wrote {args.output}: {len(files) - 1} pictures of {images} ({', '.join(names)})")
    log(f"open {args.output / PAGE} in a browser to see them together")


if __name__ == "__main__":
    run_command(main)
