# SPDX-License-Identifier: Apache-2.0
"""Audits a dataset with a model: near duplicates, and labels that are likely wrong."""

import concurrent.futures
import csv
import dataclasses
import hashlib
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from vit_jax.data.classes import Classes, match_labels
from vit_jax.data.ops.decode import ImageError
from vit_jax.data.sources.base import DatasetInfo, Source
from vit_jax.evaluators.knn import find_neighbours, share_votes
from vit_jax.inference.label_errors import find_label_errors
from vit_jax.inference.model import LoadedModel
from vit_jax.inference.near_duplicates import center, find_pairs, sketch
from vit_jax.models.interface import takes_any_size
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import write_atomically
from vit_jax.utils.layout import DUPLICATES, LABEL_ERRORS
from vit_jax.utils.text import encode_text, printable

Judge = Literal["classifier", "neighbours"]

# Names of the contact sheets, beside the tables.
DUPLICATES_SHEET = Path(DUPLICATES).with_suffix(".png").name
ERRORS_SHEET = Path(LABEL_ERRORS).with_suffix(".png").name

_BATCH = 64
# Most pairs of duplicates that are listed.
_MAX_PAIRS = 100_000
# Neighbours that vote on a label, and their temperature, as in DINO; more are fetched, since
# duplicates do not vote.
_NEIGHBOURS, _FETCHED, _TEMPERATURE = 20, 40, 0.07


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a source that can be read.

    Attributes:
      source: that they are of.
      info: classes of the dataset.
      index: position of each in the source, int64 `[n]`.
      splits: name of the split of each.
      labels: of each, int64 `[n]`; None if the data has no single label an image.
      digests: of the file of each.
      trained: whether the model was trained on it, bool `[n]`.
    """

    source: Source
    info: DatasetInfo
    index: np.ndarray
    splits: Sequence[str]
    labels: np.ndarray | None
    digests: Sequence[bytes | None]
    trained: np.ndarray

    def name_class(self, label: int) -> str:
        """The name of a class, or its number."""
        return self.info.class_names[label] if self.info.class_names else str(label)

    def name_label(self, number: int) -> str:
        """The name of the label of an image; empty without labels."""
        return "" if self.labels is None else self.name_class(int(self.labels[number]))


@dataclasses.dataclass(frozen=True)
class Duplicate:
    """Two images, by their numbers among `Images`.

    Attributes:
      kind: `file` if the files are equal, `pixels` if the prepared images are, `near` otherwise.
      cosine: between their features.
    """

    first: int
    second: int
    kind: Literal["file", "pixels", "near"]
    cosine: float


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A label that is likely wrong, of an image by its number among `Images`.

    Attributes:
      suggested: the likely class.
      label_probability: probability of the given label.
      suggested_probability: probability of `suggested`.
      judge: what the probabilities are from.
    """

    image: int
    suggested: int
    label_probability: float
    suggested_probability: float
    judge: Judge

    @property
    def score(self) -> float:
        """How much more probable the suggested class is, 0 to 1."""
        return self.suggested_probability - self.label_probability


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
      images: that were compared, those that the model can take.
      duplicates: those with different labels first, then those in different splits.
      suspects: the most certain first.
      lines: a report.
    """

    images: Images
    duplicates: Sequence[Duplicate]
    suspects: Sequence[Suspect]
    lines: Sequence[str]


def audit_images(
    model: LoadedModel,
    images: Images,
    *,
    name: str,
    min_cosine: float,
    judge: Judge | None,
    num_threads: int,
) -> Audit:
    """Compares all images with each other and with their labels.

    Images are compared by the tokens of the middle block, which depend on the layout of an image
    and hardly on its class. Labels are judged by confident learning, from the probabilities of the
    classifier, or of a vote of the nearest neighbours among the other images.

    Args:
      model: whose features and probabilities are used.
      images: of the dataset.
      name: of the dataset.
      min_cosine: least cosine of near duplicates.
      judge: what judges labels. None is the classifier for images that it was not trained on, if
        it has the classes of the data, and the neighbours for others.
      num_threads: that decode.

    Raises:
      UserError: the classifier is to judge, and has other classes, or the model takes patches of
        images of any size.
    """
    columns, info = None, images.info
    lines: list[str] = []
    if images.labels is None:
        check_model(model)
    else:
        columns = check_judge(model, info, name, judge, lines)
    layers = {"tokens": _choose_layer(model)}
    if images.labels is not None:
        layers["features"] = "pre_logits"
        if columns is not None:
            layers["logits"] = "logits"
    kept, hashes, rows = _compute(model, images, layers, num_threads)
    images = _take(images, kept)
    duplicates, more = _find_duplicates(images, hashes, rows.pop("tokens"), min_cosine)
    lines += _report_duplicates(images, duplicates, more, min_cosine)
    if images.labels is None:
        lines.append("labels are not judged: expected data with one label an image")
        return Audit(images, duplicates, [], lines)
    probabilities = None if columns is None else model.predict(rows["logits"]).probabilities
    if columns is not None and probabilities is not None:
        probabilities = probabilities[:, columns]
        sums = probabilities.sum(axis=1, keepdims=True)
        probabilities = probabilities / np.maximum(sums, np.finfo(np.float32).tiny)
    by_neighbours = np.full(len(kept), judge == "neighbours" or columns is None)
    if judge is None:
        by_neighbours |= images.trained
    elif judge == "classifier" and images.trained.any():
        lines.append(
            f"warning: the model was trained on {images.trained.sum():,} of these images, and may "
            "have learned their wrong labels; --judge=neighbours depends less on them"
        )
    suspects: list[Suspect] = []
    if by_neighbours.any():
        votes = _vote(model, rows["features"], images.labels, info.num_classes, duplicates)
        suspects += _judge(images, votes, by_neighbours, "neighbours", lines)
    if probabilities is not None and not by_neighbours.all():
        suspects += _judge(images, probabilities, ~by_neighbours, "classifier", lines)
    suspects.sort(key=lambda suspect: -suspect.score)
    return Audit(images, duplicates, suspects, lines)


def _choose_layer(model: LoadedModel) -> str:
    """The output of the middle block, or the features of a model without blocks."""
    blocks = [x for x in model.layers if re.search(r"(^|/)(encoderblock|MixerBlock)_\d+$", x)]
    return blocks[(len(blocks) - 1) // 2] if blocks else "pre_logits"


def check_model(model: LoadedModel) -> None:
    """Checks that a model can compare images.

    Raises:
      UserError: it takes patches of images of any size.
    """
    if takes_any_size(model.module):
        raise UserError(
            f"--model: {model.source} takes images of any size: expected a model for one size"
        )


def check_judge(
    model: LoadedModel, info: DatasetInfo, name: str, judge: Judge | None, lines: list[str]
) -> np.ndarray | None:
    """Returns the class of the model for each class of the data; None if neighbours are to judge.

    A note is added to `lines`. See `audit_images` for the arguments and errors.
    """
    check_model(model)
    if judge == "neighbours":
        return None
    try:
        model.check_classifies()
        classes = Classes(model.num_classes, model.class_names, model.source)
        columns, note = match_labels(Classes.of(info, name), classes, key="--model")
    except UserError as e:
        if judge is not None:
            raise
        lines.append(f"labels are judged by neighbours: {e}")
        return None
    lines += [note] if note else []
    return columns


def _compute(
    model: LoadedModel, images: Images, layers: dict[str, str], num_threads: int
) -> tuple[np.ndarray, list[bytes], dict[str, np.ndarray]]:
    """Runs the model over all images.

    Returns the numbers of those that the model can take, a hash of their pixels as it takes them,
    and float32 `[n, ...]` for each layer, of which `tokens` are sketched. Raises `UserError` if it
    can take none.
    """
    kept: list[int] = []
    hashes: list[bytes] = []
    rows: dict[str, list[np.ndarray]] = {key: [] for key in layers}
    size = model.round_up(min(_BATCH, model.pad_rows(len(images.index))))
    with (
        ProgressLog("features", total=len(images.index), unit="images") as progress,
        concurrent.futures.ThreadPoolExecutor(num_threads) as pool,
    ):
        for start in range(0, len(images.index), size):
            numbers = range(start, min(start + size, len(images.index)))
            prepared = list(pool.map(lambda i: prepare_image(model, images, i), numbers))
            good = [i for i, image in zip(numbers, prepared, strict=True) if image is not None]
            batch = np.zeros((size, *model.image_shape), np.uint8)
            if not good:
                progress.advance(len(numbers))
                continue
            batch[: len(good)] = [image for image in prepared if image is not None]
            started = {key: model.start(batch, layer=layer) for key, layer in layers.items()}
            for key, values in started.items():
                found = np.asarray(values)[: len(good)]
                rows[key].append(sketch(found) if key == "tokens" else found)
            kept += good
            hashes += [hashlib.blake2b(x.tobytes(), digest_size=16).digest() for x in batch]
            del hashes[len(kept) :]
            progress.advance(len(numbers))
    if not kept:
        raise UserError(
            f"--model: none of the {len(images.index):,} readable images can be prepared as "
            f"{model.source} takes them; expected images for {model.preparation.line}"
        )
    stacked = {key: np.concatenate(parts) for key, parts in rows.items()}
    flat = {key: x.reshape(len(x), -1) for key, x in stacked.items()}
    return np.array(kept, np.int64), hashes, flat


def prepare_image(model: LoadedModel, images: Images, number: int) -> np.ndarray | None:
    """The image with a number as the model takes it, uint8 `image_shape`; None if it cannot."""
    try:
        return model.preparation(images.source[int(images.index[number])]["image"])
    except ImageError:
        return None


def _take(images: Images, kept: np.ndarray) -> Images:
    return dataclasses.replace(
        images,
        index=images.index[kept],
        splits=[images.splits[i] for i in kept],
        labels=None if images.labels is None else images.labels[kept],
        digests=[images.digests[i] for i in kept],
        trained=images.trained[kept],
    )


def _find_duplicates(
    images: Images, hashes: Sequence[bytes], tokens: np.ndarray, min_cosine: float
) -> tuple[list[Duplicate], int]:
    """Finds pairs in the order of `Audit`, and returns how many more there are.

    Equal images are listed without a comparison: rounding can leave their cosine just below 1, and
    centered features have no direction where they equal the mean.
    """
    pairs = find_pairs(center(tokens), min_cosine, limit=_MAX_PAIRS)
    both = zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    cosines = dict(zip(both, pairs.cosine.tolist(), strict=True))
    more = pairs.total - len(cosines)
    if not more:
        groups: dict[bytes, list[int]] = {}
        for number, pixels in enumerate(hashes):
            groups.setdefault(pixels, []).append(number)
        equal = itertools.chain.from_iterable(
            itertools.combinations(group, 2) for group in groups.values()
        )
        for pair in itertools.islice(equal, _MAX_PAIRS):
            cosines.setdefault(pair, 1.0)
    found = []
    for (i, j), cosine in cosines.items():
        same_file = images.digests[i] is not None and images.digests[i] == images.digests[j]
        kind = "file" if same_file else "pixels" if hashes[i] == hashes[j] else "near"
        found.append(Duplicate(i, j, kind, cosine))
    found.sort(key=lambda pair: (not _differ(images, pair), not _leaks(images, pair), -pair.cosine))
    return found, more


def _differ(images: Images, pair: Duplicate) -> bool:
    """Whether the labels of a pair contradict each other."""
    labels = images.labels
    return labels is not None and labels[pair.first] != labels[pair.second]


def _leaks(images: Images, pair: Duplicate) -> bool:
    return images.splits[pair.first] != images.splits[pair.second]


def _report_duplicates(
    images: Images, duplicates: Sequence[Duplicate], more: int, min_cosine: float
) -> Iterator[str]:
    beyond = f", and {more:,} more" if more else ""
    kinds = {
        "file": "of equal files",
        "pixels": "of equal pixels",
        "near": f"with a cosine of {min_cosine:g} or more",
    }
    counts = [
        f"{sum(pair.kind == kind for pair in duplicates):,} {text}" for kind, text in kinds.items()
    ]
    yield f"duplicates: pairs of images: {', '.join(counts)}{beyond}"
    across = sum(_leaks(images, pair) for pair in duplicates)
    if across:
        yield f"  in several splits, which makes results too good: {across:,}"
    differ = sum(_differ(images, pair) for pair in duplicates)
    if differ:
        yield f"  with different labels: {differ:,}"
    if sum(pair.kind == "near" for pair in duplicates) > len(images.index):
        text = "the threshold is too low for this model; see --min_cosine"
        yield f"  more near pairs than images: {text}"


def _vote(
    model: LoadedModel,
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    duplicates: Sequence[Duplicate],
) -> np.ndarray:
    """Probabilities by the nearest other images, float32 `[n, num_classes]`.

    An image does not vote on itself, nor on its duplicates, which may have the same wrong label.
    """
    count = len(features)
    unit = center(features)
    k = min(_FETCHED, count)
    near, found = find_neighbours(unit, unit, k=k, mesh=model.mesh, name="labels")
    copies: dict[int, set[int]] = {}
    for pair in duplicates:
        copies.setdefault(pair.first, set()).add(pair.second)
        copies.setdefault(pair.second, set()).add(pair.first)
    near = np.where(found == np.arange(count)[:, None], -np.inf, near)
    for i, others in copies.items():
        near[i] = np.where(np.isin(found[i], list(others)), -np.inf, near[i])
    order = np.argsort(-near, axis=1, kind="stable")[:, :_NEIGHBOURS]
    near, found = (np.take_along_axis(x, order, axis=1) for x in (near, found))
    votes = share_votes(near, labels[found], num_classes=num_classes, temperature=_TEMPERATURE)
    return votes.astype(np.float32)


def _judge(
    images: Images, probabilities: np.ndarray, rows: np.ndarray, judge: Judge, lines: list[str]
) -> list[Suspect]:
    """Finds label errors among some of the images, and adds a line about them."""
    assert images.labels is not None
    numbers = np.flatnonzero(rows)
    p, labels = probabilities[numbers], images.labels[numbers]
    errors = find_label_errors(p, labels)
    lines.append(
        f"likely label errors among {len(numbers):,} images judged by the {judge}: "
        f"{len(errors.index):,}; estimated {errors.estimated:,.0f} "
        f"({errors.estimated / len(numbers):.1%})"
    )
    return [
        Suspect(int(numbers[i]), int(c), float(p[i, labels[i]]), float(p[i, c]), judge)
        for i, c in zip(errors.index, errors.suggested, strict=True)
    ]


def write_tables(folder: Path, audit: Audit) -> list[Path]:
    """Writes the duplicates and the suspects as tables (CSV); returns their paths."""
    images = audit.images

    def facts(number: int) -> list[str]:
        path = printable(images.source.describe(int(images.index[number])))
        return [path, images.splits[number], images.name_label(number)]

    pairs = [
        [pair.kind, f"{pair.cosine:.4f}", *facts(pair.first), *facts(pair.second)]
        for pair in audit.duplicates
    ]
    suspects = [
        [
            *facts(one.image),
            images.name_class(one.suggested),
            f"{one.score:.4f}",
            f"{one.label_probability:.4f}",
            f"{one.suggested_probability:.4f}",
            one.judge,
        ]
        for one in audit.suspects
    ]
    header = ["image", "split", "label"]
    sides = [f"{side}_{name}" for side in ("first", "second") for name in header]
    numbers = ["score", "label_probability", "suggested_probability", "judge"]
    _write_csv(folder / DUPLICATES, [["kind", "cosine", *sides], *pairs])
    if images.labels is None:  # A table of an earlier check would be of other data.
        (folder / LABEL_ERRORS).unlink(missing_ok=True)
        return [folder / DUPLICATES]
    _write_csv(folder / LABEL_ERRORS, [[*header, "suggested", *numbers], *suspects])
    return [folder / DUPLICATES, folder / LABEL_ERRORS]


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, encode_text(stream.getvalue()))
    except OSError as e:
        raise UserError(f"--output={path.parent}: {e.strerror or e}") from None
