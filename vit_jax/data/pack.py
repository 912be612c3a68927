# SPDX-License-Identifier: Apache-2.0
"""Packs a dataset for fast reading: smaller JPEGs in few files, or their pixels.

All splits are packed, with labels and captions, in the order of the source; but for splits whose
labels are missing. A command that was killed resumes if
it is run again. Images whose shorter side is at most --short_side are copied unchanged.

Several machines that see DST each pack a part, --part=0/64 to --part=63/64, in any order. The same
command with --join then checks that all parts are complete and makes the dataset of them. DST may
be in a bucket, gs://BUCKET/PATH or s3://BUCKET/PATH.

Examples:
  python -m vit_jax.data.pack folder:/data/birds /fast/birds --short_side=256
  python -m vit_jax.main ... --config.data.name=packed:/fast/birds

  python -m vit_jax.data.pack folder:/data/birds /fast/birds_raw --raw=256
  python -m vit_jax.main ... --config.data.name=raw:/fast/birds_raw

  python -m vit_jax.data.pack folder:/data/birds /shared/birds --part=3/64
  python -m vit_jax.data.pack folder:/data/birds /shared/birds --join

  python -m vit_jax.data.pack folder:/data/birds gs://bucket/birds
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from vit_jax.observe.console import log, set_up
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.utils.bounds import MAX_TABLE, open_npz, open_outside
from vit_jax.utils.command import CommandParser, print_error, run_command
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.files import atomic_file, write_atomically
from vit_jax.utils.registry import find_parts, trust_parts
from vit_jax.utils.signals import importing
from vit_jax.utils.text import describe_size

if TYPE_CHECKING:
    from vit_jax.data.corrupt import CorruptCounter
    from vit_jax.data.pack_parts import Part, Record
    from vit_jax.data.pack_target import Target
    from vit_jax.data.sources.base import Dataset, Source
    from vit_jax.data.sources.packed import Manifest, Shard
    from vit_jax.data.sources.tfds import TfdsDataset

_BLOCK = 512  # bytes of a block, as `stat` counts them


@dataclasses.dataclass(frozen=True)
class Packed:
    """One example.

    Attributes:
      image: None if it can't be read.
      labels: int32 `[labels]`.
      captions: as UTF-8; none if they can't be read.
    """

    image: Any
    labels: np.ndarray
    captions: tuple[bytes, ...] = ()


def shrink_jpeg(encoded: Any, *, short_side: int, quality: int) -> bytes:
    """Scales an image to a shorter side of at most `short_side`, keeping the aspect ratio.

    Takes the bytes of a file, or uint8 `[height, width, 3]`, and returns a JPEG of `quality` 1 to
    100; the bytes of a smaller image are returned unchanged. Raises `ImageError` if it can't be
    read, or written as a JPEG.
    """
    import cv2

    from vit_jax.data.ops.decode import ImageError, decode_image
    from vit_jax.data.ops.geometry import resize_image
    from vit_jax.data.ops.transforms import ResizeSmall

    image = decode_image(encoded)  # This also checks files that are copied unchanged.
    if min(image.shape[:2]) > short_side:
        height, width = ResizeSmall(short_side).shape(*image.shape[:2])
        image = resize_image(image, height, width, "area")
    elif isinstance(encoded, bytes):
        return encoded
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    done, jpeg = cv2.imencode(".jpg", image[..., ::-1], options)
    if not done:
        raise ImageError(f"a JPEG can't hold an image of {image.shape[1]}x{image.shape[0]} pixels")
    return jpeg.tobytes()


def make_square(encoded: Any, *, size: int) -> np.ndarray:
    """The middle of the image as uint8 `[size, size, 3]`, its shorter side scaled to `size`.

    Raises `ImageError` if it can't be read.
    """
    from vit_jax.data.ops.decode import decode_image
    from vit_jax.data.ops.transforms import CentralCrop, ResizeSmall

    image = ResizeSmall(size, method="area").change(decode_image(encoded))
    return CentralCrop(size).change(image)


def pack(
    manifest: Manifest,
    shards: Sequence[Shard],
    target: Target,
    *,
    open_split: Callable[[str], Source],
    num_threads: int,
) -> int:
    """Writes those of `shards` that are missing; returns how many of their images can't be read.

    Raises `OSError` or `RuntimeError` if a file can't be written.
    """
    from vit_jax.data.corrupt import CorruptCounter

    corrupt, counter = 0, CorruptCounter()
    images, there = manifest.image_files(), target.names()
    total = sum(shard.stop - shard.start for shard in shards)
    progress = ProgressLog("packing", total=total, unit="images")
    with progress, concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        for split, group in itertools.groupby(shards, key=lambda shard: shard.split):
            source, own = None, list(group)
            names = [(images[shard.name].name, f"{shard.name}.npz") for shard in own]
            target.fetch(labels for image, labels in names if there.issuperset((image, labels)))
            for shard, (image, labels) in zip(own, names, strict=True):
                if not (target.folder / labels).exists():
                    source = source or open_split(split)
                    examples = _prepare(source, shard, manifest, pool, num_threads, counter)
                    _write_shard(examples, shard, images[shard.name], manifest, target.folder)
                    target.send(image)
                    target.send(labels)
                corrupt += _count_missing(target.folder / labels)
                target.drop(image, labels)
                progress.advance(shard.stop - shard.start)
    return corrupt


def _count_missing(path: Path) -> int:
    """How many images of a shard could not be read; raises `UserError` if its file is damaged."""
    try:
        with open_outside(path, max_bytes=MAX_TABLE) as file, open_npz(file) as arrays:
            return int(np.sum(~arrays["good"]))
    # Damaged files raise errors of many types.
    except Exception as e:
        raise UserError(
            f"{path} can't be read: {describe_error(e)}; delete it, and the same command writes "
            "its shard again"
        ) from None


def _prepare(
    source: Source,
    shard: Shard,
    manifest: Manifest,
    pool: concurrent.futures.ThreadPoolExecutor,
    num_threads: int,
    corrupt: CorruptCounter,
) -> Iterator[Packed]:
    """Examples in order, a few of them prepared ahead."""
    from vit_jax.data.ops.decode import ImageError
    from vit_jax.data.sources.base import Rows

    def prepare(index: int) -> Packed:
        label = np.int32(0)
        if isinstance(source, Rows) and manifest.num_classes:
            label = source.label(index)
        try:
            features = source[index]
            label = features.get("label", label)
            image = shrink(features["image"])
        except ImageError as e:
            corrupt.add(source.describe(index), e)
            return Packed(None, labels(label))
        captions: Sequence[str] = ()
        if manifest.captions:
            try:
                captions = features["text"] if "text" in features else source.captions(index)
            except ImageError as e:
                corrupt.add(source.describe(index), e)
        encoded = tuple(caption.encode("utf-8", "replace") for caption in captions)
        return Packed(image, labels(label), encoded)

    def labels(label: Any) -> np.ndarray:
        return _as_integers(label) if manifest.num_classes else np.zeros(0, np.int32)

    if manifest.raw is None:
        options = {"short_side": manifest.short_side, "quality": manifest.quality}
        shrink = functools.partial(shrink_jpeg, **options)
    else:
        shrink = functools.partial(make_square, size=manifest.raw)
    indices = iter(range(shard.start, shard.stop))
    while chunk := list(itertools.islice(indices, 16 * num_threads)):
        source.ahead(chunk, captions=manifest.captions)
        yield from pool.map(prepare, chunk)


def _as_integers(label: Any) -> np.ndarray:
    several = np.flatnonzero(label) if np.ndim(label) else [label]
    return np.asarray(several, np.int32)


def _write_shard(
    examples: Iterator[Packed], shard: Shard, images: Shard, manifest: Manifest, folder: Path
) -> None:
    """Writes the images of a shard and, once they are on the disk, its labels and captions.

    `images` is the file that has them, with the rows that it has.
    """
    from vit_jax.data.sources.packed import CAPTIONS, PLACES
    from vit_jax.data.sources.ranges import LocalRanges
    from vit_jax.data.sources.riegeli import find_records

    path = folder / images.name
    if manifest.raw is None:
        written = _write_jpegs(examples, path)
    else:
        rows, size = images.stop - images.start, manifest.raw**2 * 3
        written = _write_pixels(examples, path, size, first=shard.start - images.start, rows=rows)
    labels, good, captions = [], [], []
    for example in written:
        labels.append(example.labels)
        good.append(example.image is not None)
        captions.append(example.captions)
    arrays = {
        "labels": np.concatenate(labels),
        "counts": np.array(list(map(len, labels)), np.int32),
        "good": np.array(good),
    }
    if manifest.captions:
        texts = list(itertools.chain(*captions))
        values = (
            np.frombuffer(b"".join(texts), np.uint8),
            np.array(list(map(len, texts)), np.int64),
            np.array(list(map(len, captions)), np.int64),
        )
        arrays |= dict(zip(CAPTIONS, values, strict=True))
    if manifest.raw is None:
        ranges = LocalRanges([str(path)])
        places = find_records(functools.partial(ranges.read, 0), len(labels))
        arrays[PLACES] = np.array(places, np.int64)
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_atomically(folder / f"{shard.name}.npz", file.getvalue(), sync=True)


def _write_jpegs(examples: Iterator[Packed], path: Path) -> Iterator[Packed]:
    from array_record.python.array_record_module import ArrayRecordWriter

    with atomic_file(path, sync=True) as temporary:
        # JPEGs can't be compressed further; groups of one are read at any place at once.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for example in examples:
                writer.write(example.image or b"")
                yield example
        finally:
            writer.close()


def _write_pixels(
    examples: Iterator[Packed], path: Path, size: int, *, first: int, rows: int
) -> Iterator[Packed]:
    """Writes images of `size` bytes from row `first` of a file of `rows` rows on."""
    # The whole file is reserved, so that a full disk is noticed now.
    _reserve(path, size * rows)
    with path.open("r+b") as file:
        file.seek(size * first)
        for example in examples:
            file.write(bytes(size) if example.image is None else example.image.tobytes())
            yield example
        file.flush()
        os.fsync(file.fileno())


def _reserve(path: Path, size: int) -> None:
    """Reserves the bytes of a file on the disk, and keeps those that are written.

    Raises `UserError` if they don't fit, and leaves the file as it was.
    """
    with path.open("ab") as file:
        before = os.fstat(file.fileno())
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as e:
            # Some file systems keep the part that they could reserve.
            file.truncate(before.st_size)
            if not before.st_size:
                path.unlink()
            needed = max(size - _BLOCK * before.st_blocks, 0)
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"{path} can't be written: {e.strerror}; it needs {needed:,} bytes more, and "
                f"{free:,} are free: choose another folder as DST, or a smaller --raw"
            ) from None


def main(argv: Sequence[str]) -> int:
    """Packs the dataset, a part of it, or joins the parts; logs what was written.

    Returns 1 if a bucket does not answer, so that a job tries again, and else 0.
    """
    args = _parse(argv)
    set_up(quiet=False)
    for name in ("short_side", "quality", "raw", "shard_size", "num_threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: expected at least 1")
    if args.quality > 100:
        raise UserError(f"--quality={args.quality}: expected 1 to 100")
    with importing():
        from vit_jax.data.pack_parts import parse_part
        from vit_jax.data.pack_target import BucketError, open_target
    part = None if args.part is None else parse_part(args.part)
    trust_parts(find_parts(args.SRC))
    try:
        with open_target(args.DST, temporary=args.temporary) as target:
            _write(args, part, target)
    except BucketError as e:
        print_error(e)
        return 1
    return 0


def _write(args: argparse.Namespace, part: Part | None, target: Target) -> None:
    """Writes what the arguments ask for."""
    with importing():
        from vit_jax.data.loader import count_threads
        from vit_jax.data.pack_parts import list_part_files
        from vit_jax.data.sources import find_dataset
        from vit_jax.data.sources.packed import MANIFEST
    if target.remote:
        log(f"writes files to {target.home} first, and sends them to {target.place}")
        there = target.names()
        target.fetch(there.intersection((MANIFEST, *list_part_files(there))))
    if args.join:
        _join(_settings(args), target)
        return
    dataset = find_dataset(args.SRC, data_dir=args.data_dir)
    manifest = _make_manifest(args, dataset, part, remote=target.remote)

    def open_split(split: str) -> Source:
        return dataset.open(split, key="split")

    work = functools.partial(
        pack, target=target, open_split=open_split, num_threads=count_threads(args.num_threads)
    )
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        if part is not None:
            _pack_part(part, manifest, target, work, open_split)
        elif target.remote:
            _pack_bucket(manifest, target, work, open_split)
            _join(_settings(args), target)
        else:
            _report(manifest, target, _pack_all(manifest, target.folder, work, open_split))
    # ArrayRecordWriter raises RuntimeError if the disk is full.
    except (OSError, RuntimeError) as e:
        advice = "; choose another folder as --temporary" if target.remote else ""
        raise UserError(f"DST={str(target.folder)!r} can't be written: {e}{advice}") from None


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the manifest that arguments give."""
    return {
        "source": args.SRC,
        "short_side": None if args.raw else args.short_side,
        "quality": None if args.raw else args.quality,
        "raw": args.raw,
        "shard_size": args.shard_size,
    }


def _make_manifest(
    args: argparse.Namespace, dataset: Dataset | TfdsDataset, part: Part | None, *, remote: bool
) -> Manifest:
    """The manifest of what is to be packed; raises `UserError` if that can't be."""
    from vit_jax.data.pack_target import MAX_OBJECT
    from vit_jax.data.sources import find_labelled
    from vit_jax.data.sources.base import Dataset
    from vit_jax.data.sources.packed import Manifest, check_manifest

    info = dataset.info
    if info.unlabelled is not None:
        maps = "depth images" if info.pixel_depth else "masks"
        raise UserError(
            f"SRC={args.SRC!r} has {maps}, which a pack does not hold: train on it as it is, or "
            "list its images with other labels in a manifest"
        )
    splits, unlabelled = find_labelled(dataset)
    for error in unlabelled:
        log(f"not packed: {error}")
    manifest = Manifest(
        **_settings(args),
        splits=splits,
        num_classes=info.num_classes,
        multi_label=info.multi_label,
        class_names=info.class_names,
        cut=isinstance(dataset, Dataset) and dataset.cut,
        captions=info.captions,
        parts=part.count if part and args.raw else 1,
    )
    try:
        check_manifest(manifest)
    except ValueError as e:
        raise UserError(f"what would be packed could not be read: {e}") from None
    if remote and args.raw:
        if (size := args.raw**2 * 3) * args.shard_size > MAX_OBJECT:
            raise UserError(
                f"--shard_size={args.shard_size}: expected at most {MAX_OBJECT // size:,} with "
                f"--raw={args.raw}, since an object in a bucket has at most "
                f"{describe_size(MAX_OBJECT)}"
            )
        # An object is written whole: each shard has one.
        manifest = dataclasses.replace(manifest, parts=len(manifest.shards()))
    return manifest


def _check_same(manifest: Manifest, folder: Path) -> None:
    """Raises `UserError` if the folder holds another pack."""
    from vit_jax.data.pack_parts import check_fields
    from vit_jax.data.sources.packed import read_manifest

    key = f"DST={str(folder)!r}"
    check_fields(read_manifest(folder, key=key), manifest, f"{key} holds another pack:")


def _pack_all(
    manifest: Manifest,
    folder: Path,
    work: Callable[..., int],
    open_split: Callable[[str], Source],
) -> int:
    """Packs everything; returns how many images can't be read.

    Until all of it is there, the folder has a record of the source, as a part has.
    """
    from vit_jax.data.pack_parts import Part, claim, list_parts, lock
    from vit_jax.data.sources.packed import MANIFEST

    only, path = Part(0, 1), folder / MANIFEST
    record = folder / only.file
    if parts := [part for part in list_parts(folder) if part != only]:
        _refuse_parts(folder, parts)
    if is_there := path.exists():
        _check_same(manifest, folder)
    if is_there and not record.exists():
        with open(path, "r+b") as file:
            lock(file, busy=f"DST={str(folder)!r}: another process is packing there")
            return work(manifest, manifest.shards())
    with claim(folder, only, _make_record(manifest, open_split)):
        if not is_there:
            _write_manifest(manifest, folder)
        corrupt = work(manifest, manifest.shards())
        record.unlink()
    return corrupt


def _pack_bucket(
    manifest: Manifest,
    target: Target,
    work: Callable[..., int],
    open_split: Callable[[str], Source],
) -> None:
    """Packs everything into a bucket, as the only part of a job; what is there is kept."""
    from vit_jax.data.pack_parts import Part, list_parts
    from vit_jax.data.sources.packed import MANIFEST

    only = Part(0, 1)
    if parts := [part for part in list_parts(target.folder) if part != only]:
        _refuse_parts(target.folder, parts)
    if (target.folder / MANIFEST).exists():
        _check_same(manifest, target.folder)
        work(manifest, manifest.shards())
    else:
        _work_on(only, manifest, target, work, open_split)


def _refuse_parts(folder: Path, parts: Sequence[Part]) -> NoReturn:
    raise UserError(
        f"DST={str(folder)!r} has parts of a pack, such as {parts[0]}: expected --part or --join; "
        "choose another folder, or delete it"
    )


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    from vit_jax.data.sources.packed import MANIFEST

    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    write_atomically(folder / MANIFEST, f"{text}\n", sync=True)


def _pack_part(
    part: Part,
    manifest: Manifest,
    target: Target,
    work: Callable[..., int],
    open_split: Callable[[str], Source],
) -> None:
    """Packs a part."""
    from vit_jax.data.sources.packed import MANIFEST, select_part

    folder = target.folder
    shards = select_part(manifest.shards(), part.number, part.count)
    if (folder / MANIFEST).exists():
        _check_same(manifest, folder)
        if target.names().issuperset(f"{shard.name}.npz" for shard in shards):
            log(f"part {part} is complete, and DST={str(folder)!r} has been joined")
            return
        raise UserError(
            f"DST={str(folder)!r} holds a pack that lacks shards of part {part}: expected the same "
            "command without --part; or delete pack.json, pack all parts again and join them"
        )
    corrupt = _work_on(part, manifest, target, work, open_split)
    total = sum(shard.stop - shard.start for shard in shards)
    log(f"packed part {part}, {total:,} images in {len(shards):,} shards, in {folder}")
    if corrupt:
        log(f"  {corrupt:,} of them can't be read: their places are empty")
    log("  once all parts are complete, the same command with --join instead makes the dataset")


def _work_on(
    part: Part,
    manifest: Manifest,
    target: Target,
    work: Callable[..., int],
    open_split: Callable[[str], Source],
) -> int:
    """Writes the record of a part and its shards; returns how many images can't be read."""
    from vit_jax.data.pack_parts import claim
    from vit_jax.data.sources.packed import select_part

    with claim(target.folder, part, _make_record(manifest, open_split)):
        target.send(part.file)
        return work(manifest, select_part(manifest.shards(), part.number, part.count))


def _make_record(manifest: Manifest, open_split: Callable[[str], Source]) -> Record:
    """What the parts of a pack must agree on, and a command with what it is repeated for."""
    from vit_jax.data.fingerprint import fingerprint
    from vit_jax.data.pack_parts import Record

    splits = [split for split, length in manifest.splits.items() if length]
    return Record(manifest, {split: fingerprint(open_split(split)) for split in splits})


def _join(settings: dict[str, Any], target: Target) -> None:
    """Checks all parts, and makes a dataset of them.

    `pack.json`, without which nothing is read, is written last. The records of the parts are
    removed then, and nothing else is changed.
    """
    from vit_jax.data.pack_parts import check_fields, check_parts, list_parts
    from vit_jax.data.sources.packed import MANIFEST, check_objects, open_files, read_manifest

    folder = target.folder
    key = f"DST={str(folder)!r}"
    if not folder.is_dir():
        raise UserError(f"{key} does not exist: run --part=0/N to --part=N-1/N first")
    try:
        joined = (folder / MANIFEST).exists()
        if joined:
            manifest = read_manifest(folder, key=key)
        else:
            manifest = check_parts(folder, target.names()).manifest
        check_fields(manifest, settings, f"{key} holds another pack:")
        advice = "delete the files of that shard, and run its part again"
        _, good, _, records = open_files(target.place, manifest, key=key, advice=advice)
        if target.remote:
            check_objects(records, key=key, advice=advice)
        if not joined:
            _write_manifest(manifest, folder)
            target.send(MANIFEST)
        for part in list_parts(folder):
            target.remove(part.file)
    except OSError as e:
        raise UserError(f"{key}: the parts can't be joined: {e}") from None
    _report(manifest, target, int(np.sum(~good)))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m vit_jax.data.pack", description=__doc__)
    add = parser.add_argument
    add(
        "SRC",
        help="Pack this dataset, given as data.name in a config, such as folder:/data/birds.",
    )
    add("DST", help="Write to this folder, or to gs://BUCKET/PATH or s3://BUCKET/PATH.")
    add(
        "--short_side",
        type=int,
        default=256,
        help="Scale images down to this shorter side. The default is %(default)s.",
    )
    add(
        "--quality",
        type=int,
        default=90,
        help="Write JPEGs of this quality, 1 to 100. The default is %(default)s.",
    )
    add(
        "--raw",
        type=int,
        metavar="SIZE",
        help="Write the pixels of the middle of each image, SIZE x SIZE, instead of JPEGs.",
    )
    add("--data_dir", help="Read TFDS datasets from this folder.")
    add(
        "--shard_size",
        type=int,
        default=4096,
        help="Write this many examples to a file. The default is %(default)s.",
    )
    add(
        "--num_threads",
        type=int,
        help="Work in this many threads. The default is one for each core.",
    )
    add(
        "--temporary",
        metavar="FOLDER",
        help="Write the files of a pack in a bucket to this folder first, where they take the "
        "space of one shard. The default is below ~/.cache.",
    )
    some = parser.add_mutually_exclusive_group()
    some.add_argument(
        "--part",
        metavar="NUMBER/COUNT",
        help="Pack one part of several, 0/64 to 63/64, which run anywhere that DST is seen.",
    )
    some.add_argument(
        "--join",
        action="store_true",
        help="Check that all parts in DST are complete, and make the dataset of them.",
    )
    return parser.parse_args(argv)


def _report(manifest: Manifest, target: Target, corrupt: int) -> None:
    total, size = sum(manifest.splits.values()), ""
    if not target.remote:
        bytes = sum(path.stat().st_size for path in target.folder.iterdir())
        size = f", {describe_size(bytes)}"
    log(f"packed {total:,} images{size}, in {target.place}")
    for split, length in manifest.splits.items():
        log(f"  {split:<15} {length:>12,} examples")
    if corrupt:
        log(f"  {corrupt:,} of them can't be read: their places are empty")
    log(f"  read it with    --config.data.name={manifest.kind}:{target.place}")


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; the same command resumes with what is missing")
