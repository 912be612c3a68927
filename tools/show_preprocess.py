# SPDX-License-Identifier: Apache-2.0
"""Renders what preprocessing makes of images: a contact sheet, and a page that explains it.

    python -m tools.show_preprocess --images FOLDER --preprocess LINE [LINE ...]

Each row is an image: unchanged, then as each line prepares it, several times where a line draws at
random. Without --images, two images are drawn whose shapes show what is cut off or squashed.
"""

import argparse
import dataclasses
import html
import sys
from pathlib import Path

import cv2
import numpy as np

from vit_jax.data.ops.decode import decode_image
from vit_jax.data.ops.transforms import Decode, Features, Random, apply
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.utils.errors import UserError

LINES = (
    "decode|inception_crop(224)|flip_lr",
    "decode|resize(224)",
    "decode|resize_small(256)|central_crop(224)",
)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FONT, _SCALE, _LINE_HEIGHT, _GAP = cv2.FONT_HERSHEY_SIMPLEX, 0.4, 16, 8


@dataclasses.dataclass(frozen=True)
class Column:
    """One line of preprocessing, and its results for each of the images."""

    title: str
    results: list[list[np.ndarray]]


def list_images(folder: Path, count: int) -> list[tuple[str, bytes]]:
    """Names and contents of the first `count` images anywhere below `folder`.

    Raises:
      UserError: there are none.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not paths:
        raise UserError(f"--images={folder}: expected a folder with {', '.join(_SUFFIXES)} in it")
    return [(str(p.relative_to(folder)), p.read_bytes()) for p in paths[:count]]


def draw_images() -> list[tuple[str, bytes]]:
    """Two encoded images, one wide and one high, with a grid and circles."""
    drawn = []
    for name, height, width in (("wide", 240, 400), ("high", 360, 240)):
        image = np.full((height, width, 3), (225, 235, 240), np.uint8)
        for x in range(0, width, 40):
            cv2.line(image, (x, 0), (x, height), (190, 205, 215), 1)
        for y in range(0, height, 40):
            cv2.line(image, (0, y), (width, y), (190, 205, 215), 1)
        cv2.circle(image, (width // 2, height // 2), 70, (200, 120, 40), -1)
        cv2.circle(image, (width // 5, height // 5), 25, (40, 160, 80), -1)
        cv2.rectangle(
            image, (width - 70, height - 70), (width - 20, height - 20), (60, 60, 200), -1
        )
        cv2.rectangle(image, (0, 0), (width - 1, height - 1), (90, 90, 90), 4)
        drawn.append((name, cv2.imencode(".png", image)[1].tobytes()))
    return drawn


def run_line(line: str, images: list[tuple[str, bytes]], *, draws: int, seed: int) -> Column:
    """What a line makes of each image, `draws` times if it draws at random.

    Raises:
      UserError: a wrong line, or an image that can't be read.
    """
    ops = parse_preprocess(line, key="--preprocess")
    if not isinstance(ops[0], Decode):
        raise UserError(f"--preprocess: {line!r}: expected 'decode' first")
    times = draws if any(isinstance(op, Random) for op in ops) else 1
    results = []
    for i, (name, encoded) in enumerate(images):
        row = []
        for draw in range(times):
            features: Features = {"image": encoded, "label": np.int32(0)}
            try:
                row.append(apply(ops, features, np.random.default_rng((seed, i, draw)))["image"])
            except ValueError as e:
                raise UserError(f"{name}: {e}") from None
        results.append(row)
    return Column(line, results)


def make_sheet(columns: list[Column]) -> np.ndarray:
    """All results in one uint8 RGB image, a row for each image, under their titles."""
    shown = [image for column in columns for row in column.results for image in row]
    side = max(max(image.shape[:2]) for image in shown)
    widths = [len(c.results[0]) * (side + _GAP) - _GAP for c in columns]
    titles = [_wrap(c.title, width) for c, width in zip(columns, widths, strict=True)]
    top = _GAP + _LINE_HEIGHT * max(map(len, titles))
    height = top + len(columns[0].results) * (side + _GAP)
    sheet = np.full((height, sum(widths) + 3 * _GAP * len(columns), 3), 255, np.uint8)
    left = _GAP
    for column, width, title in zip(columns, widths, titles, strict=True):
        for i, text in enumerate(title):
            place = (left, _LINE_HEIGHT * (i + 1))
            cv2.putText(sheet, text, place, _FONT, _SCALE, (0, 0, 0), 1, cv2.LINE_AA)
        for i, row in enumerate(column.results):
            for j, image in enumerate(row):
                y, x = top + i * (side + _GAP), left + j * (side + _GAP)
                sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
        left += width + 3 * _GAP
    return sheet


def make_page(images: list[tuple[str, bytes]], columns: list[Column], sheet: str) -> str:
    """An HTML page with the sheet, its columns and its images."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{'x'.join(map(str, decode_image(x).shape[:2]))}</td>"
        f"<td>{len(x):,}</td></tr>\n"
        for name, x in images
    )
    lines = "".join(
        f"<li><code>{html.escape(c.title)}</code>, {len(c.results[0])} of each image</li>\n"
        for c in columns
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Preprocessing</title>'
        "<style>body{font-family:sans-serif;margin:2em}td,th{padding:.2em 1em;text-align:left}"
        "</style></head>\n<body><h1>Preprocessing</h1>\n"
        f"<p>From left to right:</p>\n<ol>\n{lines}</ol>\n"
        f'<p><img src="{html.escape(sheet)}" alt="contact sheet"></p>\n'
        "<table><tr><th>image, from top to bottom</th><th>height x width</th><th>bytes</th></tr>\n"
        f"{rows}</table></body></html>\n"
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images, in it or below it")
    parser.add_argument("--preprocess", nargs="+", default=LINES, metavar="LINE")
    parser.add_argument("--out", type=Path, default=Path("build/preprocess"), metavar="FOLDER")
    parser.add_argument("--count", type=int, default=6, help="images to show")
    parser.add_argument("--draws", type=int, default=4, help="of each line that draws at random")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Writes the sheet and the page, and names them; the exit code."""
    args = parse_args(argv)
    try:
        images = list_images(args.images, args.count) if args.images else draw_images()
        columns = [run_line(x, images, draws=args.draws, seed=args.seed) for x in args.preprocess]
        side = max(max(x.shape[:2]) for c in columns for row in c.results for x in row)
        fit = f"decode|resize_long({side}, 'area')"
        originals = run_line(fit, images, draws=1, seed=args.seed).results
        columns.insert(0, Column("the image", originals))
        args.out.mkdir(parents=True, exist_ok=True)
        sheet, page = args.out / "sheet.png", args.out / "index.html"
        png = cv2.imencode(".png", make_sheet(columns)[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
        sheet.write_bytes(png[1].tobytes())
        page.write_text(make_page(images, columns, sheet.name), encoding="utf-8")
    except UserError as e:
        print(e)
        return 1
    print(f"wrote {sheet}\nwrote {page}")
    return 0


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken after the bars of a preprocessing line."""
    lines = [""]
    for part in text.replace("|", "|\n").split("\n"):
        if lines[-1] and cv2.getTextSize(lines[-1] + part, _FONT, _SCALE, 1)[0][0] > width:
            lines.append("")
        lines[-1] += part
    return lines


if __name__ == "__main__":
    sys.exit(main())
