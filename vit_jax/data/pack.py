# SPDX-License-Identifier: Apache-2.0
"""Packs a dataset for fast reading: smaller JPEGs in few files, or their pixels.

All splits are packed, with labels and captions, in the order of the source; but for splits whose
labels are missing. A command that was killed resumes if
it is run again. Images whose shorter side is at most --short_side are copied unchanged.

Examples:
  python -m vit_jax.data.pack folder:/data/birds /fast/birds --short_side=256
  python -m vit_jax.main ... --config.data.name=packed:/fast/birds

  python -m vit_jax.data.pack folder:/data/birds /fast/birds_raw --raw=256
  python -m vit_jax.main ... --config.data.name=raw:/fast/birds_raw
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.observe.console import log, set_up
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.utils.command import CommandParser, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import atomic_file, write_atomically
from vit_jax.utils.registry import find_parts, trust_parts
from vit_jax.utils.signals import importing
from vit_jax.utils.text import describe_size

if TYPE_CHECKING:
    from vit_jax.data.corrupt import CorruptCounter
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
    manifest: Manifest, folder: Path, *, open_split: Callable[[str], Source], num_threads: int
) -> int:
    """Writes all missing shards, and returns how many images of all shards can't be read.

    Raises `OSError` or `RuntimeError` if a file can't be written.
    """
    from vit_jax.data.corrupt import CorruptCounter

    corrupt, counter, total = 0, CorruptCounter(), sum(manifest.splits.values())
    progress = ProgressLog("packing", total=total, unit="images")
    with progress, concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        for split, shards in itertools.groupby(manifest.shards(), key=lambda s: s.split):
            source = None
            for shard in shards:
                labels = folder / f"{shard.name}.npz"
                if not labels.exists():
                    source = source or open_split(split)
                    examples = _prepare(source, shard, manifest, pool, num_threads, counter)
                    _write_shard(examples, shard, manifest, folder)
                corrupt += int(np.sum(~np.load(labels)["good"]))
                progress.advance(shard.stop - shard.start)
    return corrupt


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
    examples: Iterator[Packed], shard: Shard, manifest: Manifest, folder: Path
) -> None:
    """Writes the images of a shard and, once they are on the disk, its labels and captions."""
    from vit_jax.data.sources.packed import CAPTIONS, PLACES
    from vit_jax.data.sources.ranges import LocalRanges
    from vit_jax.data.sources.riegeli import find_records

    write = _write_jpegs if manifest.raw is None else _write_pixels
    labels, good, captions = [], [], []
    for example in write(examples, shard, manifest, folder):
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
        ranges = LocalRanges([str(folder / f"{shard.name}.array_record")])
        places = find_records(functools.partial(ranges.read, 0), len(labels))
        arrays[PLACES] = np.array(places, np.int64)
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_atomically(folder / f"{shard.name}.npz", file.getvalue(), sync=True)


def _write_jpegs(
    examples: Iterator[Packed], shard: Shard, manifest: Manifest, folder: Path
) -> Iterator[Packed]:
    from array_record.python.array_record_module import ArrayRecordWriter

    path = folder / f"{shard.name}.array_record"
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
    examples: Iterator[Packed], shard: Shard, manifest: Manifest, folder: Path
) -> Iterator[Packed]:
    assert manifest.raw is not None
    size = manifest.raw**2 * 3
    path = folder / f"{shard.split}.pixels"
    # The whole split is reserved, so that a full disk is noticed now.
    _reserve(path, size * manifest.splits[shard.split])
    with path.open("r+b") as file:
        file.seek(size * shard.start)
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


def _find_splits(dataset: Dataset | TfdsDataset) -> dict[str, int]:
    """The lengths of the splits that have labels; a line is logged for any other.

    Raises `UserError` if there is none.
    """
    from vit_jax.data.ops.decode import ImageError
    from vit_jax.data.sources.base import NoLabelError

    found, error = {}, None
    for split, length in dataset.lengths.items():
        try:
            if length:
                source = dataset.open(split, key="split")
                with contextlib.suppress(ImageError):
                    source[0]  # A source may learn labels only from the records.
            found[split] = length
        except NoLabelError as e:
            error = e
            log(f"not packed: {e}")
    if error and not any(found.values()):
        raise error
    return found


def _check_same(manifest: Manifest, folder: Path) -> None:
    """Raises `UserError` if the folder holds another pack."""
    from vit_jax.data.sources.packed import Manifest, read_manifest

    there = read_manifest(folder, key=f"DST={str(folder)!r}")
    for field in dataclasses.fields(Manifest):
        old, new = getattr(there, field.name), getattr(manifest, field.name)
        if old != new:
            raise UserError(
                f"DST={str(folder)!r} holds another pack, of {field.name}={str(old)[:80]!r} where "
                f"this one has {str(new)[:80]!r}: choose another folder, or delete it"
            )


def main(argv: Sequence[str]) -> None:
    """Packs the dataset, and logs what was written."""
    args = _parse(argv)
    set_up(quiet=False)
    for name in ("short_side", "quality", "raw", "shard_size", "num_threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: expected at least 1")
    if args.quality > 100:
        raise UserError(f"--quality={args.quality}: expected 1 to 100")
    with importing():
        from vit_jax.data.loader import count_threads
        from vit_jax.data.sources import find_dataset
        from vit_jax.data.sources.base import Dataset
        from vit_jax.data.sources.packed import MANIFEST, Manifest, check_manifest
    trust_parts(find_parts(args.SRC))
    dataset = find_dataset(args.SRC, data_dir=args.data_dir)
    info = dataset.info
    if info.unlabelled is not None:
        maps = "depth images" if info.pixel_depth else "masks"
        raise UserError(
            f"SRC={args.SRC!r} has {maps}, which a pack does not hold: train on it as it is, or "
            "list its images with other labels in a manifest"
        )
    manifest = Manifest(
        source=args.SRC,
        splits=_find_splits(dataset),
        num_classes=info.num_classes,
        multi_label=info.multi_label,
        class_names=info.class_names,
        short_side=None if args.raw else args.short_side,
        quality=None if args.raw else args.quality,
        raw=args.raw,
        shard_size=args.shard_size,
        cut=isinstance(dataset, Dataset) and dataset.cut,
        captions=info.captions,
    )
    try:
        check_manifest(manifest)
    except ValueError as e:
        raise UserError(f"what would be packed could not be read: {e}") from None
    folder = args.DST.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            _check_same(manifest, folder)
        else:
            text = json.dumps(dataclasses.asdict(manifest), indent=2)
            write_atomically(folder / MANIFEST, f"{text}\n", sync=True)
        with open(folder / MANIFEST, "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"DST={str(folder)!r}: another process is packing there") from None
            corrupt = pack(
                manifest,
                folder,
                open_split=lambda split: dataset.open(split, key="split"),
                num_threads=count_threads(args.num_threads),
            )
    # ArrayRecordWriter raises RuntimeError if the disk is full.
    except (OSError, RuntimeError) as e:
        raise UserError(f"DST={str(folder)!r} can't be written: {e}") from None
    _report(manifest, folder, corrupt)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m vit_jax.data.pack", description=__doc__)
    add = parser.add_argument
    add(
        "SRC",
        help="Pack this dataset, given as data.name in a config, such as folder:/data/birds.",
    )
    add("DST", type=Path, help="Write to this folder.")
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
    return parser.parse_args(argv)


def _report(manifest: Manifest, folder: Path, corrupt: int) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir())
    total = sum(manifest.splits.values())
    log(f"packed {total:,} images, {describe_size(size)}, in {folder}")
    for split, length in manifest.splits.items():
        log(f"  {split:<15} {length:>12,} examples")
    if corrupt:
        log(f"  {corrupt:,} of them can't be read: their places are empty")
    log(f"  read it with    --config.data.name={manifest.kind}:{folder}")


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; the same command resumes with what is missing")
