# SPDX-License-Identifier: Apache-2.0
"""Reads every image of a dataset, reports errors and oddities, and writes a contact sheet.

With --config, and --config.KEY=VALUE as for training, the splits, the batch size, the classes and
the preprocessing are those that a run would use, and what it would refuse is reported.

With --model, images are compared by the features of a trained model, which finds near duplicates,
and labels by its predictions, which finds labels that are likely wrong (confident learning). Both
are written as tables and as contact sheets. They change no exit code.

The exit code is 1 if a run would be refused, if images can't be read, or if an operation of the
preprocessing refuses them.

Examples:
  python -m vit_jax.data.check folder:/data/birds
  python -m vit_jax.data.check folder:/data/birds --config=folder --config.data.batch_size=64
  python -m vit_jax.data.check folder:/data/birds --model=runs/birds
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.config.load import find_file, load_config, parse_overrides
from vit_jax.observe.console import log, set_up
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.utils.command import CommandParser, local_path, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import CHECK
from vit_jax.utils.registry import find_parts, trust_parts
from vit_jax.utils.signals import importing
from vit_jax.utils.streams import print_result
from vit_jax.utils.text import printable

if TYPE_CHECKING:
    from vit_jax.data.ops.transforms import Features, Op
    from vit_jax.data.pipeline import DatasetSpec
    from vit_jax.data.sources.base import Dataset, DatasetInfo, Source
    from vit_jax.data.sources.tfds import TfdsDataset
    from vit_jax.data.tokenizers import Tokenizer
    from vit_jax.inference.dataset_audit import Audit
    from vit_jax.inference.model import LoadedModel
    from vit_jax.training.experiment import Experiment

# Formats by file name ending.
_ENDINGS = {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}
_ENDINGS |= dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_USUAL_MODES = ("RGB", "L")
# A size is odd if a side is below _SMALL, the longer one above _LONG times the shorter, or if there
# are more than _MANY pixels.
_SMALL, _LONG, _MANY = 8, 8, 2**26

_MIN_COSINE = 0.98  # of near duplicates
_JUDGES = ("classifier", "neighbours")

# Examples of an epoch where a config can't have its own: no warm-up is longer.
_EPOCH = 10**9
_SHARE = 0.02  # of a target, that is worth a name

_LISTED = 10  # names in the report of each kind of finding
_SHEET = 8  # rows and columns of the contact sheet
_TILE = 96  # least pixels of the longer side of an image there
_LARGE_TILE = 128  # most pixels of it in the sheets of --model, which a report shows too
_POINTS = 12  # least size of the font of the names below the images
_LONGEST = 200  # characters of such a name
_LATIN = 0x250  # the font of the captions has no characters from here on


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
      captions: lengths of its captions in tokens, or in characters without a tokenizer; None if it
        is not to have any.
      depths: the least and the greatest in metres, and the share of pixels that have one; None
        without depths of pixels.
    """

    record: str
    digest: bytes | None = None
    label: int | None = None
    size: tuple[int, int] | None = None
    corrupt: str | None = None
    odd: tuple[str, ...] = ()
    captions: tuple[int, ...] | None = None
    depths: tuple[float, float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Measure:
    """How captions are measured.

    Attributes:
      count: gives the length of one, in tokens or characters.
      needed: whether an image without captions is of no use.
    """

    count: Callable[[str], int]
    needed: bool


@dataclasses.dataclass(frozen=True)
class Line:
    """A preprocessing line, and which records it is for, bool `[records]`; None for all."""

    key: str
    ops: Sequence[Op]
    records: np.ndarray | None


def find_lines(
    experiment: Experiment, dataset: Dataset | TfdsDataset, name: str, split: str
) -> list[Line]:
    """The preprocessing of each split that an experiment reads, for the records of `split`."""
    from vit_jax.data.ops.fused import fuse
    from vit_jax.data.preprocess import parse_preprocess

    lines, rows = [], _find_rows(dataset, name, split)
    for spec in (experiment.train_data, *(e.data for e in experiment.evaluators)):
        # A split that is not there is reported by `check_run`.
        with contextlib.suppress(UserError):
            if spec.name == name:
                records = np.isin(rows, _find_rows(dataset, name, spec.split))
                lines.append(Line(f"{spec.key}.preprocess", fuse(spec.ops()), records))
                for view, _, line in spec.views:
                    key = f"{spec.key}.views.{view}"
                    lines.append(Line(key, fuse(parse_preprocess(line, key=key)), records))
    return lines


def _find_rows(dataset: Dataset | TfdsDataset, name: str, split: str) -> np.ndarray:
    """Numbers of the records of a split among those of all splits, one after the other."""
    from vit_jax.data.sources.base import select

    lengths = dataset.lengths
    first = dict(zip(lengths, itertools.accumulate(lengths.values(), initial=0), strict=False))
    parts = select(split, lengths, name=name, key="split")
    return np.concatenate([np.arange(start, stop) + first[n] for n, start, stop in parts])


def inspect_record(
    source: Source, index: int, lines: Iterable[Line] = (), measure: Measure | None = None
) -> Finding:
    """Reads and decodes one record, and prepares it as the lines for it say.

    With `measure`, its captions are measured.
    """
    from vit_jax.data.ops.decode import ImageError, decode_image
    from vit_jax.data.ops.transforms import apply

    record = source.describe(index)
    try:
        features = source[index]
    except ImageError as e:
        return Finding(record, corrupt=str(e))
    encoded, label = features["image"], features.get("label")
    finding = Finding(
        record,
        digest=hashlib.blake2b(encoded, digest_size=16).digest(),
        label=int(label) if label is not None and np.ndim(label) == 0 else None,
    )
    depth = features.get("label_map")
    if depth is not None and depth.dtype.kind == "f":
        known = depth[depth > 0]
        ends = (float(known.min()), float(known.max())) if known.size else (math.nan, math.nan)
        finding = dataclasses.replace(finding, depths=(*ends, known.size / max(depth.size, 1)))
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
    corrupt = captions = None
    if measure is not None:
        try:
            texts = source.captions(index)
            captions = tuple(map(measure.count, texts))
            odd += ["captions with control characters"] * any(map(_CONTROL.search, texts))
            odd += ["a caption twice"] * (len(set(texts)) < len(texts))
            if not texts:
                raise ImageError("it has no caption")
        except ImageError as e:
            corrupt = str(e) if measure.needed else None
            odd += ["no captions"] * (not measure.needed)
    for line in lines:
        if line.records is None or line.records[index]:
            try:
                apply(line.ops, features, np.random.default_rng(index))
            except ImageError as e:
                corrupt = f"{line.key}: {e}"
    return dataclasses.replace(
        finding, size=(height, width), odd=tuple(odd), corrupt=corrupt, captions=captions
    )


def _list_odd(encoded: bytes, ending: str) -> Iterator[str]:
    from PIL import Image

    from vit_jax.data.ops.decode import read_header

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


def inspect(
    source: Source,
    lines: Sequence[Line] = (),
    *,
    num_threads: int,
    measure: Measure | None = None,
) -> list[Finding]:
    """Inspects all records; progress is logged."""
    findings = []
    progress = ProgressLog("reading", total=len(source), unit="images")
    with progress, concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        # Chunks keep the queue of the pool short.
        size = 64 * num_threads
        for start in range(0, len(source), size):
            indices = range(start, min(start + size, len(source)))
            findings += pool.map(lambda i: inspect_record(source, i, lines, measure), indices)
            progress.advance(len(indices))
    return findings


def report(
    findings: Sequence[Finding],
    dataset: Dataset | TfdsDataset,
    input_shape: tuple[int, ...] | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[str]:
    """The lines of the report.

    Args:
      findings: of all records.
      dataset: that they are of.
      input_shape: starts with the height and width of the model's; None if it takes any size.
      tokenizer: which measured the captions; None if their characters were counted.
    """
    info = dataset.info
    good = [f for f in findings if f.size is not None]
    corrupt = [f for f in findings if f.corrupt is not None]
    classes = f"{info.num_classes:,} classes" if info.num_classes else "no labels"
    if info.pixel_classes:
        classes = f"{len(info.pixel_classes)} classes of pixels"
    if info.pixel_depth:
        classes = "the depth of each pixel"
    lines = [f"{len(findings):,} images, {classes}"]
    lines += _listing("corrupt", [f"{f.record}: {f.corrupt}" for f in corrupt])
    odd = collections.defaultdict(list)
    for finding in good:
        for word in finding.odd:
            odd[word].append(finding.record)
    for word in sorted(odd):
        lines += _listing(f"odd: {word}", odd[word])
    lines += _report_duplicates(findings, dataset)
    labels = [f.label for f in findings if f.label is not None]
    if labels:
        lines += _report_balance(np.bincount(labels, minlength=info.num_classes), info)
    if depths := [f.depths for f in findings if f.depths is not None]:
        lines += _report_depths(depths)
    if any(f.captions is not None for f in findings):
        lines += _report_captions([f.captions for f in findings if f.captions], tokenizer)
    if good:
        lines += _report_sizes([f.size for f in good if f.size], input_shape)
    return lines


def _report_depths(depths: Sequence[tuple[float, float, float]]) -> list[str]:
    known = [one for one in depths if one[2] > 0]
    if not known:
        return ["depths: no pixel of any image has one, so nothing can be learnt from them"]
    least, greatest = min(one[0] for one in known), max(one[1] for one in known)
    share = sum(one[2] for one in depths) / len(depths)
    lines = [f"depths: {least:.3g} to {greatest:.3g} m, of {share:.1%} of the pixels"]
    if len(known) < len(depths):
        lines.append(f"  images without any: {len(depths) - len(known):,}")
    return lines


def _listing(title: str, names: Sequence[str]) -> list[str]:
    more = [f"  and {len(names) - _LISTED:,} more"] if len(names) > _LISTED else []
    return [f"{title}: {len(names):,}", *(f"  {name}" for name in names[:_LISTED]), *more]


def _report_duplicates(findings: Iterable[Finding], dataset: Dataset | TfdsDataset) -> list[str]:
    same = collections.defaultdict(list)
    for finding in findings:
        if finding.size is not None:
            same[finding.digest].append(finding)
    groups = [group for group in same.values() if len(group) > 1]
    split_of = _find_splits(dataset) if groups else {}
    order, names, across = dict.fromkeys(split_of.values()), [], 0
    # Groups with contradicting labels come first, then those that are in several splits.
    for group in groups:
        labels = {f.label for f in group}
        found = {split_of.get(f.record) for f in group}
        splits = [split for split in order if split in found]
        across += len(splits) > 1
        note = " with different labels" * (len(labels) > 1)
        note += f", in {', '.join(splits)}" * (len(splits) > 1)
        rank = (len(labels) == 1, len(splits) < 2)
        names.append((rank, " = ".join(f.record for f in group[:3]) + note))
    lines = _listing("duplicates", [name for _, name in sorted(names, key=lambda n: n[0])])
    if across:
        lines.append(f"  in several splits, which makes results too good: {across:,}")
    return lines


def _find_splits(dataset: Dataset | TfdsDataset) -> dict[str, str]:
    """The split of each record, by its path; none for TFDS, which checks its own data."""
    from vit_jax.data.sources.base import Dataset

    if not isinstance(dataset, Dataset):
        return {}
    return {
        dataset.records.describe(int(row)): split
        for split, rows in dataset.splits.items()
        for row in rows
    }


def _report_balance(counts: np.ndarray, info: DatasetInfo) -> list[str]:
    order = np.argsort(-counts, kind="stable")
    shown = order if len(order) <= _LISTED else [*order[: _LISTED // 2], *order[-_LISTED // 2 :]]
    names = info.class_names or [str(label) for label in range(info.num_classes)]
    return [
        f"images of a class: {counts.min():,} to {counts.max():,}, median {np.median(counts):,.0f}",
        *(_bar(names[label], int(counts[label]), counts.max()) for label in shown),
    ]


def _report_captions(captions: Sequence[tuple[int, ...]], tokenizer: Tokenizer | None) -> list[str]:
    if not captions:
        return ["captions: none"]
    counts = np.array(list(map(len, captions)))
    lengths = np.array(list(itertools.chain(*captions)))
    unit = "characters" if tokenizer is None else "tokens"
    lines = [
        f"captions: {counts.sum():,}, {counts.min():,} to {counts.max():,} an image, "
        f"median {np.median(counts):,.0f}",
        f"{unit} of a caption: {lengths.min():,} to {lengths.max():,}, "
        f"median {np.median(lengths):,.0f}",
    ]
    if tokenizer is not None:
        cut = int(np.sum(lengths > tokenizer.length))
        lines.append(
            f"{tokenizer.describe()} cuts {cut:,} of {len(lengths):,} captions "
            f"({cut / len(lengths):.1%})"
        )
    return lines


def _report_sizes(
    sizes: Sequence[tuple[int, int]], input_shape: tuple[int, ...] | None
) -> list[str]:
    sides = np.array([min(size) for size in sizes])
    powers = np.floor(np.log2(sides)).astype(int)
    lines = [f"shorter side: {sides.min():,} to {sides.max():,}, median {np.median(sides):,.0f}"]
    counts = np.bincount(powers)
    for power in range(powers.min(), powers.max() + 1):
        span = f"{2**power:,} to {2 ** (power + 1) - 1:,}"
        lines.append(_bar(span, counts[power], counts.max()))
    if input_shape is not None:
        height, width = input_shape[:2]
        smaller = sum(h < height or w < width for h, w in sizes)
        lines.append(
            f"the model takes {height}x{width}: {smaller:,} of {len(sizes):,} images are smaller"
        )
    return lines


def _bar(name: str, count: int, largest: int) -> str:
    return f"  {name:<20.20} {count:>9,} {'#' * round(40 * count / max(largest, 1))}"


def load_experiment(
    args: argparse.Namespace, overrides: Mapping[str, Any]
) -> tuple[Experiment, list[str]]:
    """The experiment of `--config` on the dataset, and why a run of its length would be refused.

    Raises `UserError` if the config is invalid for data of any length.
    """
    import jax

    from vit_jax.training.experiment import Experiment

    own = {"data.name": args.SRC, "mesh": {}}
    if args.data_dir is not None:
        own["data.data_dir"] = args.data_dir
    config, device = load_config(args.config, {**overrides, **own}), jax.devices()[:1]
    try:
        return Experiment.from_config(config, devices=device), []
    except UserError as e:
        # A length in epochs depends on the number of images, which may be too small for a batch.
        return Experiment.from_config(config, devices=device, epoch_examples=_EPOCH), [str(e)]


def check_run(experiment: Experiment) -> tuple[list[str], list[str]]:
    """Opens all data that a run reads; returns lines on what is there, and on what is refused."""
    from vit_jax.config.build import count_examples

    lines, refused = [], []

    data = experiment.train_data

    def note(spec: DatasetSpec, check: Callable[[], Any]) -> None:
        try:
            check()
            length = len(spec.open())
        except UserError as e:
            refused.append(str(e))
            return
        batches = f", {length // data.batch_size:,} batches of {data.batch_size:,}"
        more = batches if spec is data else ""
        lines.append(f"{spec.key}.split={spec.split!r}: {length:,} images{more}")

    note(data, functools.partial(count_examples, data))
    for evaluator in experiment.evaluators:
        note(evaluator.data, evaluator.open)
    outputs, classes = getattr(experiment.model, "num_classes", 0), data.info.num_classes
    if outputs > classes:
        lines.append(
            f"model.num_classes={outputs:,}: {outputs - classes:,} of them are no class of the data"
        )
    return lines, refused


def prepare_images(sheet: DatasetSpec | Experiment) -> tuple[np.ndarray, list[str]]:
    """Training images as a model would see them, uint8 `[64, height, width, 3]`, and captions.

    These are the captions that the model learns, or else names of classes.
    """
    from vit_jax.data.ops.patches import find_patches, to_images
    from vit_jax.data.pipeline import DatasetSpec, read_examples

    data = sheet if isinstance(sheet, DatasetSpec) else sheet.train_data
    images_per_row = data.packing.images_per_row
    count = -(-(_SHEET**2) // images_per_row) * images_per_row
    data = dataclasses.replace(data, batch_size=count)
    if data.info.captions and not data.info.num_classes:
        data = dataclasses.replace(data, tokenizer=data.tokenizer or "bytes")
    captioned = data.find_tokenizer() is not None
    if isinstance(sheet, DatasetSpec):
        examples = read_examples(data, seed=0, step=0)
        images = np.stack([example["image"] for example in examples])
        if find_patches(data.ops()) is not None:
            images = to_images(images)
        labels: Any = [example.get("label") for example in examples]
        if data.info.pixel_classes:
            return images, [_name_pixels(example, data.info) for example in examples]
        if data.info.pixel_depth:
            return images, [_describe_depth(example["label_map"]) for example in examples]
    else:
        from vit_jax.training.previews import preview_first_batch

        images, labels = preview_first_batch(dataclasses.replace(sheet, train_data=data))
        images, labels = images[: _SHEET**2], None if labels is None else labels[: _SHEET**2]
        seed = sheet.settings.seed
        examples = read_examples(data, seed=seed, step=0) if captioned else []
    if captioned:
        return images, [printable(example.get("caption", "")) for example in examples]
    if labels is None:
        return images, [""] * len(images)
    return images, [caption(label, data.info) for label in labels]


def _name_pixels(example: Features, info: DatasetInfo) -> str:
    """The classes with the most pixels, without those that have none."""
    names: Sequence[str] = info.pixel_classes or []
    counts = np.bincount(example["label_map"].ravel(), minlength=len(names))[: len(names)]
    order = np.argsort(-counts, kind="stable")[:3]
    return " + ".join(names[i] for i in order if counts[i])


def _describe_depth(depth: np.ndarray) -> str:
    """The range of the depths that are known."""
    known = depth[depth > 0]
    return f"{known.min():.3g} to {known.max():.3g} m" if known.size else "no depth"


def caption(label: np.ndarray, info: DatasetInfo) -> str:
    """The name of a label, or of the classes of a target `[classes]`, the largest share first."""
    shares = np.asarray(label)
    if shares.ndim == 0:
        found = [int(shares)]
    else:
        # Smoothing gives each class the same small share.
        shares = shares - (shares.min() if len(shares) > 1 else 0)
        found = [i for i in np.argsort(-shares, kind="stable")[:3] if shares[i] > _SHARE]
    names = dict(enumerate(info.class_names or ()))
    return " + ".join(names.get(i, str(i)) for i in found)


def write_contact_sheet(
    path: Path, images: np.ndarray, captions: Sequence[str], *, lines: int = 1
) -> None:
    """Writes a PNG of images, uint8 `[n, height, width, 3 or 1]`; small ones are enlarged.

    Below each one is its caption, as far as it fits in a number of lines.
    """
    from PIL import Image, ImageDraw, ImageFont

    from vit_jax.utils.pictures import to_rgb

    images = to_rgb(images)
    images = np.pad(images, ((0, -len(images) % _SHEET), (0, 0), (0, 0), (0, 0)))
    times = -(-_TILE // max(images.shape[1:3]))
    images = images.repeat(times, axis=1).repeat(times, axis=2)
    # The sheet of large images is looked at from further away.
    points = max(_POINTS, images.shape[2] // 16)
    below = lines * (points + 2) + 3
    images = np.pad(images, ((0, 0), (1, below), (1, 1), (0, 0)))
    _, height, width, channels = images.shape
    rows = images.reshape(-1, _SHEET, height, width, channels).swapaxes(1, 2)
    sheet = Image.fromarray(rows.reshape(-1, _SHEET * width, channels))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(points)
    for place, text in enumerate(captions):
        row, column = divmod(place, _SHEET)
        text = "".join(c if ord(c) < _LATIN else "?" for c in text[:_LONGEST])
        top = (row + 1) * height - below
        for number, line in enumerate(_wrap(text, font, width - 2, lines)):
            at = (column * width + width // 2, top + number * (points + 2) + points // 2 + 2)
            draw.text(at, line, fill="white", font=font, anchor="mm")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "PNG")
    except OSError as e:
        raise UserError(f"--output={path.parent}: {e.strerror or e}") from None


def _wrap(text: str, font: Any, width: int, lines: int) -> Iterator[str]:
    """Breaks a text between words into lines of a width in pixels; what does not fit is cut."""
    words = text.split()
    for number in range(lines):
        count = len(words)
        if number < lines - 1:
            while count > 1 and font.getlength(" ".join(words[:count])) > width:
                count -= 1
        line, words = " ".join(words[:count]), words[count:]
        while line and font.getlength(line) > width:
            # An image may be too narrow for the dots themselves.
            kept = line.removesuffix("...")[:-1]
            line = f"{kept}..." if kept else ""
        if line:
            yield line


def _check_model(args: argparse.Namespace) -> None:
    """Checks the arguments about --model, and sets `output` and `min_cosine`."""
    from vit_jax.checkpoint.workdir import is_workdir

    for name in ("judge", "min_cosine"):
        value = getattr(args, name)
        if args.model is None and value is not None:
            raise UserError(f"--{name}={value}: expected --model with it")
    if args.judge not in (None, *_JUDGES):
        raise UserError(f"--judge={args.judge}: expected {' or '.join(_JUDGES)}")
    if args.min_cosine is None:
        args.min_cosine = _MIN_COSINE
    if not 0 < args.min_cosine <= 1:
        raise UserError(f"--min_cosine={args.min_cosine}: expected more than 0, and at most 1")
    if args.output is None:
        args.output = Path("runs/check")
        if args.model and is_workdir(Path(args.model)):
            args.output = Path(args.model) / CHECK


def find_trained_rows(
    model: LoadedModel, dataset: Dataset | TfdsDataset, name: str, split: str
) -> np.ndarray:
    """Which records of a split a model was trained on, as its run has it, bool `[records]`."""
    rows = _find_rows(dataset, name, split)
    data = model.config.get("data") or {}
    sources = data.get("mixture") or [data]
    trained = np.zeros(len(rows), bool)
    for source in sources:
        if source.get("name") and _is_same_data(source["name"], name) and source.get("split"):
            with contextlib.suppress(UserError):  # The data may have other splits by now.
                trained |= np.isin(rows, _find_rows(dataset, name, source["split"]))
    return trained


def _is_same_data(one: str, other: str) -> bool:
    kind, colon, path = one.partition(":")
    kind_too, _, path_too = other.partition(":")
    return kind == kind_too and (not colon or os.path.realpath(path) == os.path.realpath(path_too))


def audit(
    args: argparse.Namespace,
    model: LoadedModel,
    dataset: Dataset | TfdsDataset,
    source: Source,
    findings: Sequence[Finding],
) -> None:
    """Reports near duplicates and likely label errors, and writes their tables and sheets."""
    from vit_jax.inference.dataset_audit import Images, audit_images, write_tables

    info = dataset.info
    index = np.array([i for i, f in enumerate(findings) if f.size is not None], np.int64)
    names, lengths = list(dataset.lengths), list(dataset.lengths.values())
    rows = _find_rows(dataset, args.SRC, args.split)[index]
    places = np.searchsorted(np.cumsum(lengths), rows, side="right")
    labelled = bool(info.num_classes) and not info.multi_label
    images = Images(
        source,
        dataset.info,
        index,
        splits=[names[i] for i in places],
        labels=np.array([findings[i].label for i in index], np.int64) if labelled else None,
        digests=[findings[i].digest for i in index],
        trained=find_trained_rows(model, dataset, args.SRC, args.split)[index],
    )
    found = audit_images(
        model,
        images,
        name=args.SRC,
        min_cosine=args.min_cosine,
        judge=args.judge,
        num_threads=args.num_threads,
    )
    for line in found.lines:
        print_result(printable(line))
    for path in [*write_tables(args.output, found), *write_sheets(args.output, model, found)]:
        log(f"wrote {path}")


def write_sheets(folder: Path, model: LoadedModel, found: Audit) -> list[Path]:
    """Writes contact sheets of the first duplicates and suspects; returns their paths."""
    from vit_jax.inference.dataset_audit import DUPLICATES_SHEET, ERRORS_SHEET, prepare_image

    images = found.images
    pairs = [
        (number, f"{pair.cosine:.3f} {images.splits[number]} {images.name_label(number)}")
        for pair in found.duplicates[: _SHEET**2 // 2]
        for number in (pair.first, pair.second)
    ]
    suspects = [
        (one.image, f"{images.name_label(one.image)}, likely {images.name_class(one.suggested)}")
        for one in found.suspects[: _SHEET**2]
    ]
    written = []
    for name, tiles in ((DUPLICATES_SHEET, pairs), (ERRORS_SHEET, suspects)):
        read = [prepare_image(model, images, number) for number, _ in tiles]
        pictures = [_shrink(image) for image in read if image is not None]
        if pictures:
            captions = [
                text for image, (_, text) in zip(read, tiles, strict=True) if image is not None
            ]
            write_contact_sheet(folder / name, np.stack(pictures), captions, lines=2)
            written.append(folder / name)
        else:  # One of an earlier check would be wrong.
            (folder / name).unlink(missing_ok=True)
    return written


def _shrink(image: np.ndarray) -> np.ndarray:
    """Scales an image, uint8 `[height, width, channels]`, down to the size of a tile."""
    from PIL import Image

    from vit_jax.utils.pictures import to_rgb

    picture = Image.fromarray(to_rgb(image[None])[0])
    picture.thumbnail((_LARGE_TILE, _LARGE_TILE))
    return np.asarray(picture)


def main(argv: Sequence[str]) -> int:
    """Checks the dataset, logs the report, and returns the exit code."""
    parser = CommandParser(prog="python -m vit_jax.data.check", description=__doc__)
    parser.add_argument(
        "SRC",
        help="Check this dataset, given as data.name in a config, such as folder:/data/birds. "
        "Without folders for splits, each class is cut into 80 %% train, 10 %% validation and "
        "10 %% test.",
    )
    parser.add_argument(
        "--split",
        default="all",
        help="Check this split, which may have slices, as train[:98%%]. The default is all "
        "that have labels.",
    )
    parser.add_argument("--data_dir", help="Read TFDS datasets from this folder.")
    lines = parser.add_mutually_exclusive_group()
    lines.add_argument(
        "--config",
        help="Try the preprocessing of this config, show its augmentation, and check the data that "
        "its run reads. --config.KEY=VALUE overrides a key.",
    )
    lines.add_argument(
        "--preprocess",
        default="decode|inception_crop(224)|flip_lr",
        metavar="LINE",
        help="Try and show this preprocessing without a config. The default is %(default)r.",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="LINE",
        help="Count the tokens of captions by this tokenizer without a config, such as "
        "'clip(length=77)'. The default counts characters.",
    )
    parser.add_argument(
        "--model",
        metavar="SOURCE",
        help="Look for near duplicates and wrong labels with this model: a workdir, a file of "
        "weights, or a name that `vit_jax models` lists.",
    )
    parser.add_argument(
        "--judge",
        help="Judge labels by the probabilities of the classifier of --model, or by the votes of "
        "the nearest neighbours among the images: classifier or neighbours. The default is the "
        "classifier for images that it was not trained on, if it has their classes, and the "
        "neighbours for others.",
    )
    parser.add_argument(
        "--min_cosine",
        type=float,
        help="List pairs of images as near duplicates whose features have this cosine or more, "
        f"after the mean is subtracted. The default is {_MIN_COSINE}.",
    )
    parser.add_argument(
        "--output",
        type=local_path,
        help="Write contact_sheet.png, and with --model the tables, to this folder. The default is "
        "runs/check, or check in the workdir of --model, whose report then shows them.",
    )
    parser.add_argument(
        "--num_threads",
        type=int,
        default=os.cpu_count() or 1,
        help="Read in this many threads. The default is one for each core.",
    )
    overrides, rest = parse_overrides(list(argv))
    args = parser.parse_args(rest)
    set_up(quiet=False)
    if overrides and args.config is None:
        raise UserError(f"--config.{next(iter(overrides))}: expected --config=FILE with it")
    if args.tokenizer is not None and args.config is not None:
        raise UserError(f"--tokenizer={args.tokenizer}: expected --config.data.tokenizer with it")
    if args.num_threads < 1:
        raise UserError(f"--num_threads={args.num_threads}: expected at least 1")
    _check_model(args)
    if args.config is not None:
        find_file(args.config)
    with importing():
        from vit_jax.data.ops.fused import fuse
        from vit_jax.data.ops.patches import find_patches
        from vit_jax.data.pipeline import DatasetSpec
        from vit_jax.data.preprocess import parse_preprocess
        from vit_jax.data.sources import find_dataset, find_labelled
        from vit_jax.data.tokenizers import parse_tokenizer
    trust_parts(find_parts(f"{args.SRC}|{args.preprocess}|{args.tokenizer or ''}"))
    parse_preprocess(args.preprocess, key="--preprocess")
    if args.tokenizer is not None:
        _ = parse_tokenizer(args.tokenizer, key="--tokenizer").vocabulary
    dataset = find_dataset(args.SRC, data_dir=args.data_dir)
    if args.split == "all":
        splits, unlabelled = find_labelled(dataset)
        for error in unlabelled:
            log(f"not checked: {error}")
        if unlabelled:
            args.split = "+".join(split for split, length in splits.items() if length)
    source = dataset.open(args.split, key="--split")
    model = None
    if args.model is not None:
        from vit_jax.inference.dataset_audit import check_judge, check_model
        from vit_jax.inference.model import load_model

        model = load_model(args.model)
        log(f"model: {model.source}")
        if dataset.info.num_classes and not dataset.info.multi_label:
            check_judge(model, dataset.info, args.SRC, args.judge, [])
        else:
            check_model(model)
    refused, input_shape = [], None
    if args.config is None:
        count, line = _SHEET**2, args.preprocess
        sheet = DatasetSpec(args.SRC, args.split, line, count, args.data_dir, "check")
        sheet = dataclasses.replace(sheet, tokenizer=args.tokenizer)
        sheet.image_shape()
        lines = [Line("--preprocess", fuse(sheet.ops()), None)]
        sizes = (f"{split} {length:,}" for split, length in dataset.lengths.items())
        print_result(f"splits: {', '.join(sizes)}")
    else:
        sheet, refused = load_experiment(args, overrides)
        lines, input_shape = (
            find_lines(sheet, dataset, args.SRC, args.split),
            None if find_patches(sheet.train_data.ops()) else sheet.train_data.image_shape(),
        )
        found, missing = check_run(sheet)
        refused += [line for line in missing if line not in refused]
        for line in [*found, *(f"a run is refused: {line}" for line in refused)]:
            print_result(printable(line))
    data = sheet if isinstance(sheet, DatasetSpec) else sheet.train_data
    tokenizer = data.find_tokenizer() if dataset.info.captions else None
    needed = tokenizer is not None or not dataset.info.num_classes
    measure = Measure(tokenizer.count if tokenizer else len, needed)
    measure = measure if dataset.info.captions else None
    findings = inspect(source, lines, num_threads=args.num_threads, measure=measure)
    for line in report(findings, dataset, input_shape, tokenizer):
        print_result(printable(line))
    readable = any(f.size for f in findings)
    if model is not None and not readable:
        raise UserError(
            f"--model={args.model}: none of the {len(findings):,} images of {args.SRC} can be "
            "read; expected images to compare"
        )
    if model is not None:
        audit(args, model, dataset, source, findings)
    if not readable:
        log(f"no contact sheet: none of the {len(findings):,} images can be read")
    else:
        path = args.output / "contact_sheet.png"
        try:
            lines = 3 if measure is not None and measure.needed else 1
            write_contact_sheet(path, *prepare_images(sheet), lines=lines)
            log(f"wrote {path}")
        except UserError as e:
            if not refused:
                raise
            log(f"no contact sheet: {e}")
    return 1 if refused or any(f.corrupt for f in findings) else 0


if __name__ == "__main__":
    run_command(main)
