# SPDX-License-Identifier: Apache-2.0
"""Reads every image of a dataset, reports errors and oddities, and writes a contact sheet.

The exit code is 1 if some images can't be read, or if an operation of the preprocessing refuses
them.

Examples:
  python -m vit_jax.data.check folder:/data/birds
  python -m vit_jax.data.check folder:/data/birds --config=configs/folder.py
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from vit_jax.config.load import load_config
from vit_jax.data.ops.decode import MAX_PIXELS, ImageError, decode_image, read_header
from vit_jax.data.ops.fused import fuse
from vit_jax.data.ops.transforms import Op, apply
from vit_jax.data.pipeline import DatasetSpec, train_batches
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.data.sources import find_dataset
from vit_jax.data.sources.base import DatasetInfo, Source
from vit_jax.observe.console import log, set_up
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.training.experiment import Experiment
from vit_jax.training.previews import preview_first_batch
from vit_jax.utils.command import CommandParser, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import find_parts, trust_parts
from vit_jax.utils.streams import print_result
from vit_jax.utils.text import printable

# Formats by file name ending.
_ENDINGS = {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}
_ENDINGS |= dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG")
_USUAL_MODES = ("RGB", "L")
# A size is odd if a side is below _SMALL, the longer one above _LONG times the shorter, or if there
# are more than _MANY pixels.
_SMALL, _LONG, _MANY = 8, 8, MAX_PIXELS // 2

_LISTED = 10  # names in the report of each kind of finding
_SHEET = 8  # rows and columns of the contact sheet
_TILE = 96  # least pixels of the longer side of an image there


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of reading one record.

    Attributes:
      record: its path, or dataset and position.
      digest: of the file; None if that can't be read.
      label: its class; None if it may have several.
      size: height and width; None for an image that can't be read.
      corrupt: the reason why it can't be read, or which operation refuses it.
      odd: kinds of oddities, such as "mode CMYK" or "PNG named .jpg".
    """

    record: str
    digest: bytes | None = None
    label: int | None = None
    size: tuple[int, int] | None = None
    corrupt: str | None = None
    odd: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Line:
    """A preprocessing line, and the names of the records that it is for; None for all."""

    key: str
    ops: Sequence[Op]
    records: frozenset[str] | None


def find_lines(experiment: Experiment, name: str) -> list[Line]:
    """The preprocessing of each split of a dataset that an experiment reads.

    A line is logged for an evaluator whose split is not there.
    """
    lines = []
    for spec in (experiment.train_data, *(e.data for e in experiment.evaluators)):
        if spec.name == name:
            try:
                source = spec.open()
            except UserError as e:
                log(f"{e}: images are not checked for {spec.key}.preprocess")
                continue
            records = frozenset(map(source.describe, range(len(source))))
            lines.append(Line(f"{spec.key}.preprocess", fuse(spec.ops()), records))
    return lines


def inspect_record(source: Source, index: int, lines: Iterable[Line] = ()) -> Finding:
    """Reads and decodes one record, and prepares it as the lines for it say."""
    record = source.describe(index)
    try:
        features = source[index]
    except ImageError as e:
        return Finding(record, corrupt=str(e))
    encoded, label = features["image"], features["label"]
    finding = Finding(
        record,
        digest=hashlib.blake2b(encoded, digest_size=16).digest(),
        label=int(label) if np.ndim(label) == 0 else None,
    )
    try:
        height, width = decode_image(encoded).shape[:2]
    except ImageError as e:
        return dataclasses.replace(finding, corrupt=str(e))
    odd = []
    if isinstance(encoded, bytes):
        odd += _list_odd(encoded, os.path.splitext(record)[1].lower())
    if min(height, width) < _SMALL:
        odd.append(f"a side below {_SMALL} pixels")
    if max(height, width) > _LONG * min(height, width):
        odd.append(f"more than {_LONG} times as long as wide")
    if height * width > _MANY:
        odd.append(f"more than {_MANY:,} pixels")
    corrupt = None
    for line in lines:
        if line.records is None or record in line.records:
            try:
                apply(line.ops, features, np.random.default_rng(index))
            except ImageError as e:
                corrupt = f"{line.key}: {e}"
    return dataclasses.replace(finding, size=(height, width), odd=tuple(odd), corrupt=corrupt)


def _list_odd(encoded: bytes, ending: str) -> Iterator[str]:
    kind, _ = read_header(encoded)
    if ending in _ENDINGS and kind != _ENDINGS[ending]:
        yield f"{kind or 'another format'} named {ending}"
    try:
        with Image.open(io.BytesIO(encoded)) as image:  # Reads only the header.
            if image.mode not in _USUAL_MODES:
                yield f"mode {image.mode}"
            if getattr(image, "n_frames", 1) > 1:
                yield "several frames, of which the first is used"
            if image.getexif().get(0x112, 1) != 1:
                yield "rotated by EXIF, which only decode(orient=True) applies"
    except Exception:  # Any error of Pillow on a broken header; the image itself was read.
        yield "a header that Pillow can't read"


def inspect(source: Source, lines: Sequence[Line] = (), *, num_threads: int) -> list[Finding]:
    """Inspects all records; progress is logged."""
    findings = []
    progress = ProgressLog("reading", total=len(source), unit="images")
    with progress, concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        # Chunks keep the queue of the pool short.
        size = 64 * num_threads
        for start in range(0, len(source), size):
            indices = range(start, min(start + size, len(source)))
            findings += pool.map(lambda i: inspect_record(source, i, lines), indices)
            progress.advance(len(indices))
    return findings


def report(findings: Sequence[Finding], info: DatasetInfo) -> list[str]:
    """The lines of the report."""
    good = [f for f in findings if f.size is not None]
    corrupt = [f for f in findings if f.corrupt is not None]
    lines = [f"{len(findings):,} images, {info.num_classes:,} classes"]
    lines += _listing("corrupt", [f"{f.record}: {f.corrupt}" for f in corrupt])
    odd = collections.defaultdict(list)
    for finding in good:
        for word in finding.odd:
            odd[word].append(finding.record)
    for word in sorted(odd):
        lines += _listing(f"odd: {word}", odd[word])
    lines += _report_duplicates(findings)
    labels = [f.label for f in findings if f.label is not None]
    if labels:
        lines += _report_balance(np.bincount(labels, minlength=info.num_classes), info)
    if good:
        lines += _report_sizes([f.size for f in good if f.size])
    return lines


def _listing(title: str, names: Sequence[str]) -> list[str]:
    more = [f"  and {len(names) - _LISTED:,} more"] if len(names) > _LISTED else []
    return [f"{title}: {len(names):,}", *(f"  {name}" for name in names[:_LISTED]), *more]


def _report_duplicates(findings: Iterable[Finding]) -> list[str]:
    same = collections.defaultdict(list)
    for finding in findings:
        if finding.digest is not None:
            same[finding.digest].append(finding)
    groups = [group for group in same.values() if len(group) > 1]
    names = []
    # Groups with contradicting labels come first.
    for group in sorted(groups, key=lambda g: len({f.label for f in g}) == 1):
        labels = {f.label for f in group}
        note = " with different labels" if len(labels) > 1 else ""
        names.append(" = ".join(f.record for f in group[:3]) + note)
    return _listing("duplicates", names)


def _report_balance(counts: np.ndarray, info: DatasetInfo) -> list[str]:
    order = np.argsort(-counts, kind="stable")
    shown = order if len(order) <= _LISTED else [*order[: _LISTED // 2], *order[-_LISTED // 2 :]]
    names = info.class_names or [str(label) for label in range(info.num_classes)]
    return [
        f"images of a class: {counts.min():,} to {counts.max():,}, median {np.median(counts):,.0f}",
        *(_bar(names[label], int(counts[label]), counts.max()) for label in shown),
    ]


def _report_sizes(sizes: Sequence[tuple[int, int]]) -> list[str]:
    sides = np.array([min(size) for size in sizes])
    powers = np.floor(np.log2(sides)).astype(int)
    lines = [f"shorter side: {sides.min():,} to {sides.max():,}, median {np.median(sides):,.0f}"]
    counts = np.bincount(powers)
    for power in range(powers.min(), powers.max() + 1):
        span = f"{2**power:,} to {2 ** (power + 1) - 1:,}"
        lines.append(_bar(span, counts[power], counts.max()))
    return lines


def _bar(name: str, count: int, largest: int) -> str:
    return f"  {name:<20.20} {count:>9,} {'#' * round(40 * count / max(largest, 1))}"


def load_experiment(args: argparse.Namespace) -> Experiment:
    """The experiment of `--config` on the dataset.

    Raises `UserError` if the config is invalid.
    """
    # The batch is for the sheet alone, and fits any number of devices.
    overrides = {
        "data.name": args.SRC,
        "data.batch_size": _SHEET**2,
        "optimizer.accum_steps": 1,
        "mesh": {},
    }
    if args.data_dir is not None:
        overrides["data.data_dir"] = args.data_dir
    return Experiment.from_config(load_config(args.config, overrides))


def prepare_images(sheet: DatasetSpec | Experiment) -> np.ndarray:
    """Training images as a model would see them, uint8 `[64, height, width, 3]`."""
    if isinstance(sheet, Experiment):
        return preview_first_batch(sheet)
    return next(train_batches(sheet, seed=0, step=0))["image"]


def write_contact_sheet(path: Path, images: np.ndarray) -> None:
    """Writes a PNG of images, uint8 `[64, height, width, 3]`; small ones are enlarged."""
    times = -(-_TILE // max(images.shape[1:3]))
    images = images.repeat(times, axis=1).repeat(times, axis=2)
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    _, height, width, channels = images.shape
    rows = images.reshape(_SHEET, -1, height, width, channels).swapaxes(1, 2)
    sheet = rows.reshape(_SHEET * height, -1, channels)
    png = cv2.imencode(".png", sheet[..., ::-1])[1].tobytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
    except OSError as e:
        raise UserError(f"--output={path.parent}: {e.strerror}") from None


def main(argv: Sequence[str]) -> int:
    """Checks the dataset, logs the report, and returns the exit code."""
    parser = CommandParser(prog="python -m vit_jax.data.check", description=__doc__)
    parser.add_argument("SRC", help="as data.name of a config, such as folder:/data/birds")
    parser.add_argument("--split", default="all", help="with slices; all by default")
    parser.add_argument("--data_dir", help="where TFDS keeps its datasets")
    lines = parser.add_mutually_exclusive_group()
    lines.add_argument("--config", help="whose lines are tried, and whose augmentation is shown")
    lines.add_argument(
        "--preprocess",
        default="decode|inception_crop(224)|flip_lr",
        help="to try and to show where there is no config; %(default)r by default",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/check"),
        help="folder for contact_sheet.png; %(default)s by default",
    )
    parser.add_argument("--num_threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    set_up(quiet=False)
    if args.num_threads < 1:
        raise UserError(f"--num_threads={args.num_threads}: expected at least 1")
    trust_parts(find_parts(f"{args.SRC}|{args.preprocess}"))
    parse_preprocess(args.preprocess, key="--preprocess")
    dataset = find_dataset(args.SRC, data_dir=args.data_dir)
    source = dataset.open(args.split, key="--split")
    if args.config is None:
        count, line = _SHEET**2, args.preprocess
        sheet = DatasetSpec(args.SRC, args.split, line, count, args.data_dir, "check")
        sheet.image_shape()
        lines = [Line("--preprocess", fuse(sheet.ops()), None)]
    else:
        sheet = load_experiment(args)
        lines = find_lines(sheet, args.SRC)
    findings = inspect(source, lines, num_threads=args.num_threads)
    for line in report(findings, dataset.info):
        print_result(printable(line))
    if any(f.size for f in findings):
        path = args.output / "contact_sheet.png"
        write_contact_sheet(path, prepare_images(sheet))
        log(f"wrote {path}")
    return 1 if any(f.corrupt for f in findings) else 0


if __name__ == "__main__":
    run_command(main)
