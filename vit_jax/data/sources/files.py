# SPDX-License-Identifier: Apache-2.0
"""Datasets of image files: one folder per class, or a table of paths and labels."""

import concurrent.futures
import csv
import dataclasses
import functools
import io
import itertools
import json
import logging
import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from vit_jax.data.ops.decode import ImageError
from vit_jax.data.sources.base import (
    MAX_CLASSES,
    NO_LABEL,
    Dataset,
    DatasetInfo,
    Records,
    check_class_names,
    make_splits,
    order_splits,
)
from vit_jax.data.sources.columns import split_columns
from vit_jax.data.sources.compact import Codes, Ragged, TextLists, Texts
from vit_jax.data.sources.guess import suggest_name
from vit_jax.data.sources.label_maps import add_label_maps, check_scale
from vit_jax.data.sources.layout import (
    Top,
    check_classes,
    describe_depth,
    drop_unassigned,
    drop_unsorted,
    find_split,
    find_splits,
    is_left_out,
    list_few,
    log_cut,
    map_splits,
    suggests_split,
)
from vit_jax.data.sources.ranges import BucketRanges, is_remote
from vit_jax.utils.bounds import MAX_IMAGE, MAX_TABLE, open_regular
from vit_jax.utils.buckets import SCHEMES, split_url
from vit_jax.utils.class_names import normalize_name
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.suggestions import suggest

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_COLUMNS = ("image", "label", "labels", "split", "caption", "captions", "mask", "depth")
# What columns with other names may hold, as a dataset's name says.
_RENAMED = ("image", "label", "labels", "split", "caption", "mask", "depth")
# What columns of metadata files with other names may hold.
METADATA_COLUMNS = ("label", "labels", "split", "caption")
# Endings of tables, with what separates their columns; None for an object a line.
_TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": None}
_METADATA = ("metadata.csv", "metadata.jsonl")
_CAPTION = re.compile(r"captions?(_?[0-9]+)?")
_TEXT, _MAX_TEXT = ".txt", 2**20  # the ending and the most bytes of a file of captions
_ANY_SHAPE = (None, None, 3)
# How tables mark a row without a label.
_NO_LABELS = (None, "", -1, "-1")

# Threads that list folders, which mostly wait for the file system.
_LISTERS = 16
# Rows of a table that are read at a time.
_CHUNK = 2**16
# Images that are read to find out whether any can be.
_TRIED = 8

logger = logging.getLogger(__name__)


def _read_file(path: str, *, max_bytes: int = MAX_IMAGE) -> bytes:
    # This is `open(path, "rb").read()` with a third of its system calls.
    file = open_regular(path, max_bytes=max_bytes)
    try:
        size = os.fstat(file).st_size
        content = os.read(file, size)
        # One call may return only a part of a long file, or of a file on a network.
        while len(content) < size and (more := os.read(file, size - len(content))):
            content += more
        return content
    finally:
        os.close(file)


class Files(Records):
    """Image files by path or URL."""

    def __init__(self, root: str, paths: Sequence[str]):
        self._root, self._paths = root, paths
        if isinstance(paths, Texts) and not paths.may_have("://"):
            paths = ()
        self._any_url = "://" in root or any("://" in path for path in paths)
        self._remote = BucketRanges(_Described(self))

    def check_access(self, key: str) -> None:
        """Reads one image, as a wrong folder or missing credentials affect all records.

        Raises `UserError` if it can't be read, or if a path is a URL that is not read from.
        """
        rows: dict[bool, list[int]] = {False: [], True: []}
        for row in range(len(self._paths) if self._any_url else min(_TRIED, len(self._paths))):
            path, where = self.describe(row), f"{key}: row {row + 1}: image "
            check_store(path, where=where)
            if is_remote(path):
                try:
                    split_url(path)
                except UserError as e:
                    raise UserError(f"{where}{e}") from None
            rows["://" in path].append(row)
            if len(rows["://" in path]) > _TRIED:
                rows["://" in path].pop()
        for tried in filter(None, rows.values()):
            error = None
            for row in tried:
                try:
                    self.read(row, patient=False)
                    break
                except ImageError as e:
                    error = e
            else:
                raise UserError(
                    f"{key}: none of its first images can be read, such as "
                    f"{self.describe(tried[-1])}: {error}; expected paths from the manifest's "
                    "folder, or URLs that this machine has the credentials for"
                )

    def read(self, row: int, *, patient: bool = True) -> bytes:
        try:
            path = self.describe(row)
            if not is_remote(path):
                return _read_file(path)
            return self._remote.read(row, 0, None, patient=patient)
        except OSError as e:
            raise ImageError(f"it can't be read: {describe_error(e)}") from e

    @property
    def reads_ahead(self) -> bool:
        return self._any_url

    def ahead(self, rows: Sequence[int], *, captions: bool) -> None:
        for row in rows:
            if is_remote(self.describe(row)):
                self._remote.ahead(row, 0, None)

    def describe(self, row: int) -> str:
        path = self._paths[row]
        return path if "://" in path else os.path.join(self._root, path)


class _Described(Sequence[str]):
    """The path or URL of each row."""

    def __init__(self, files: Files):
        self._files = files

    def __len__(self) -> int:
        return len(self._files._paths)

    def __getitem__(self, row: Any) -> Any:
        return self._files.describe(row)


# Folders


@functools.cache
def folder_dataset(text: str) -> Dataset:
    """A dataset of `PATH/{train,test,validation}/CLASS/...` or `PATH/CLASS/...`.

    Labels number the sorted class names of all splits. Without folders for splits, `make_splits`
    cuts `train`, `validation` and `test` from each class with a fixed seed. If there are files
    `metadata.csv` or `metadata.jsonl`, labels and captions are theirs, see `_read_metadata`; after
    the path, `#label=species,caption=title` gives other names of their columns.

    Raises:
      UserError: the folder can't be read, or has no images in class folders, or a metadata file is
        not valid.
    """
    name = f"folder:{text}"
    key = f"data.name={name!r}"
    path, renamed = split_columns(text, METADATA_COLUMNS)
    started = time.monotonic()
    if "://" in path:
        raise UserError(
            f"{key}: expected a local folder; mount the bucket, or list its images in a manifest"
        )
    root = os.path.abspath(os.path.expanduser(path))
    tree = _read_tree(root, name=name)
    if renamed and not tree.metadata:
        raise UserError(
            f"{key} names columns, and there is no file {' or '.join(_METADATA)} in {root}: "
            f"expected one, or folder:{path}"
        )
    named, unread = _read_metadata(root, tree, renamed, name=name)
    if named:
        return _metadata_dataset(name, root, tree, named)
    tops, loose = tree.tops, tree.first.images
    split_of = find_splits(tops, key=key)
    rows = _list_rows(tops, split_of, loose, name=name)
    captions = TextFiles(root, [tree.texts.get(_stem(path)) for path, *_ in rows])
    tree.log_ignored(name, texts=len(captions))
    if unread and len({class_name for _, class_name, _ in rows}) < 2:
        raise UserError(f"{key}: {unread}: expected file_name, the paths of images from its folder")
    if unread:
        logger.info("%s: %s and no file_name, so it is not read", name, unread)
    if not rows:
        kinds = describe_ignored(tree.ignored + tree.first.ignored)
        loose = loose + [path for top in tops.values() for path in top.images]
        pairs = any(_stem(path) in tree.texts for path in loose)
        raise UserError(
            f"{key} holds {f'{len(loose):,} images, none' if loose else 'no images'} in folders of "
            f"classes: expected CLASS/IMAGE or train/CLASS/IMAGE in {root}, as "
            f"{', '.join(ENDINGS)}, or {' or '.join(_METADATA)} beside images"
            f"{f'; left out: {kinds}' if kinds else ''}"
            + (f"; did you mean 'pairs:{path}'?" if pairs else suggest_name(path, besides="folder"))
        )
    if len(captions):
        logger.info(
            "%s: %s of %s images have a text beside them, as their captions; pairs:%s reads them "
            "without classes",
            name,
            f"{len(captions):,}",
            f"{len(rows):,}",
            path,
        )
    class_names = check_class_names(sorted({c for _, c, _ in rows}), name=name)
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    if (seconds := time.monotonic() - started) > 2:
        logger.info("%s: listed %s images in %.1f s", name, f"{len(rows):,}", seconds)
    labels = np.array([label_of[c] for _, c, _ in rows], np.int32)
    info = DatasetInfo(len(class_names), _ANY_SHAPE, class_names, captions=len(captions) > 0)
    splits = make_splits(labels, [split for *_, split in rows] if split_of else None)
    paths = [path for path, *_ in rows]
    hint = ""
    if len(class_names) == 1:
        first = [path for path, _, split in rows if split == rows[0][2]]
        hint = describe_depth(first, root=root, key=key)
    check_classes(name, info, labels, splits, hint=hint)
    cut, records = not split_of, Files(root, paths)
    dataset = Dataset(name, info, records, labels, splits, cut=cut, captions=captions)
    log_cut(dataset)
    return dataset


@dataclasses.dataclass(frozen=True)
class ListedImage:
    """An image that a list names, such as the card of a repository.

    Attributes:
      path: from the folder of the dataset.
      split: of the image.
      pattern: of the list, which the path matches.
    """

    path: str
    split: str
    pattern: str

    @property
    def pattern_folder(self) -> str:
        """The folders of the pattern before any with `*`, `?` or `[`; may be empty."""
        start = _fixed_start(self.pattern)
        if start in (self.pattern, self.path):
            return os.path.dirname(self.path) if start == self.path else start
        return os.path.dirname(start)

    @property
    def class_folder(self) -> str:
        """The folder in that of the pattern, or else the folder of the image; empty without one."""
        folder = self.pattern_folder
        below = self.path.removeprefix(f"{folder}/") if folder else ""
        if "/" in below:
            return os.path.join(folder, below.partition("/")[0])
        return os.path.dirname(self.path)


@functools.lru_cache
def _fixed_start(pattern: str) -> str:
    return re.split(r"[*?\[]", pattern)[0]


def listed_dataset(
    root: str,
    listed: Sequence[ListedImage],
    renamed: Mapping[str, str],
    *,
    images: Sequence[str],
    texts: Sequence[str],
    metadata: Sequence[str],
    name: str,
) -> Dataset:
    """A dataset of the images of a list, which gives the split of each of them.

    The class of an image is the name of the folder in that of its pattern, as `folder_dataset` of
    this folder has it; where images are directly in the folder of the pattern, it is this folder.
    Metadata files count as in `folder_dataset`.

    Args:
      root: the folder of the dataset.
      listed: the images.
      renamed: names of columns of the metadata files, by what they hold.
      images: paths of all images in the folder, which metadata files may name.
      texts: paths of captions beside the images that are listed.
      metadata: paths of metadata files, in the folders of the images that are listed or above.
      name: of the dataset.

    Raises:
      UserError: a metadata file is not valid or names none of the images; or, without such a file,
        the folders of the images are not those of classes.
    """
    key = f"data.name={name!r}"
    texts_by_stem = {_stem(path): path for path in texts}
    tree = _Tree(_Listing(images=list(images)), {}, Counter(), [], texts_by_stem, sorted(metadata))
    if renamed and not metadata:
        raise UserError(
            f"{key} names columns, and there is no file {' or '.join(_METADATA)}: expected one, or "
            "no names of columns"
        )
    named, unread = _read_metadata(root, tree, renamed, name=name)
    if not named:
        listed = _drop_loose(listed, name=name)
    fault = _check_listed(listed)
    if named:
        tree = dataclasses.replace(tree, first=_Listing(images=[image.path for image in listed]))
        by_path = {image.path: image for image in listed}
        rows = {path: row for path, row in named.items() if path in by_path}
        if not rows:
            raise UserError(
                f"{key}: {', '.join(tree.metadata[:3])}: no row names an image of its list"
            )
        chosen = [by_path[path] for path in rows]
        return _metadata_dataset(name, root, tree, rows, listed=chosen, fault=fault)
    if unread:
        logger.info("%s: %s and no file_name, so it is not read", name, unread)
    if fault:
        raise UserError(
            f"{key}: the classes of its images are not known: {fault}; expected patterns such as "
            "train/**, of folders of splits with folders of classes in them, or "
            f"{' or '.join(_METADATA)} beside images"
        )
    order = sorted(listed, key=lambda i: (unicodedata.normalize("NFC", i.path), i.path))
    paths = [image.path for image in order]
    values = [normalize_name(os.path.basename(image.class_folder)) for image in order]
    class_names = check_class_names(sorted(set(values)), name=name)
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    labels = np.array([label_of[value] for value in values], np.int32)
    captions = TextFiles(root, [texts_by_stem.get(_stem(path)) for path in paths])
    info = DatasetInfo(len(class_names), _ANY_SHAPE, class_names, captions=len(captions) > 0)
    splits = make_splits(labels, [image.split for image in order])
    check_classes(name, info, labels, splits)
    return Dataset(name, info, Files(root, paths), labels, splits, captions=captions)


def _drop_loose(listed: Sequence[ListedImage], *, name: str) -> list[ListedImage]:
    """The images without those that are in no folder of a class, as those of others are.

    These are beside such folders, or in a folder of a split, as in `test/0.jpg`; they are logged.
    """
    loose = {image for image in listed if os.path.dirname(image.path) == image.pattern_folder}
    deep = {image.pattern for image in listed if image not in loose}
    left = {
        image
        for image in loose
        if image.pattern in deep
        or (deep and find_split(os.path.basename(os.path.dirname(image.path))))
    }
    if left:
        logger.info(
            "%s: left out %s images that are not in a class folder: %s",
            name,
            f"{len(left):,}",
            list_few(sorted(image.path for image in left)),
        )
    return [image for image in listed if image not in left]


def _check_listed(listed: Sequence[ListedImage]) -> str:
    """Returns why the folders of images are not those of classes; empty if they are."""
    first: dict[str, str] = {}  # folder of each pattern
    classes: dict[str, set[str]] = {}  # by the split
    for image in listed:
        folder = image.class_folder
        if not folder:
            return f"{image.path} is in no folder"
        if os.path.dirname(first.setdefault(image.pattern, folder)) != os.path.dirname(folder):
            return f"{image.pattern} has the folders {first[image.pattern]} and {folder}"
        classes.setdefault(image.split, set()).add(os.path.basename(folder))
    holders = {os.path.dirname(folder) for folder in first.values()}
    for folder in first.values():
        for above in holders - {os.path.dirname(folder)}:
            if folder.startswith(f"{above}/" if above else ""):
                other = next(f for f in first.values() if os.path.dirname(f) == above)
                return f"the folders {other} and {folder} are not of one depth"
    for split, names in classes.items():
        likely = sorted(filter(suggests_split, names))
        if len(likely) > 1 or len(likely) == len(names):
            return f"the folders {list_few(likely)} of {split} are called as splits are"
    found = sorted(set().union(*classes.values()))
    if len(found) == len(classes) > 1 and all(len(names) == 1 for names in classes.values()):
        return f"the folders {list_few(found)} are those of the splits {', '.join(classes)}"
    return ""


def is_metadata(path: str) -> bool:
    """Whether a file is one of metadata beside images, by its name."""
    return os.path.basename(path) in _METADATA


@functools.cache
def pairs_dataset(path: str) -> Dataset:
    """A dataset of images with texts beside them, `x.jpg` and `x.txt`, at any depth.

    Each line of a text is a caption. There are no labels. Splits are the folders in PATH that are
    named for them; without any, `make_splits` cuts the images. Images without a text are left out.

    Raises:
      UserError: the folder can't be read, has no pairs, or has images beside folders of splits.
    """
    name = f"pairs:{path}"
    key = f"data.name={name!r}"
    if "://" in path:
        raise UserError(
            f"{key}: expected a local folder; mount the bucket, or list its images in a manifest"
        )
    root = os.path.abspath(os.path.expanduser(path))
    tree = _read_tree(root, name=name)
    images = {top: [*t.images, *itertools.chain(*t.below.values())] for top, t in tree.tops.items()}
    images = {"": tree.first.images} | images
    used = [top for top, paths in images.items() if paths]
    split_of = {top: split for top in used if (split := find_split(top))}
    if split_of and len(split_of) < len(used):
        other = next(top or "images" for top in used if top not in split_of)
        raise UserError(
            f"{key} holds {next(iter(split_of))} and {other}: expected folders of splits alone "
            "(train, test, validation), or none of them"
        )
    if split_of:
        map_splits(split_of, key=key)
    rows = [(path, split_of.get(top, "")) for top in used for path in images[top]]
    rows.sort(key=lambda row: (unicodedata.normalize("NFC", row[0]), row))
    pairs = [row for row in rows if _stem(row[0]) in tree.texts]
    tree.log_ignored(name, texts=len(pairs))
    if not pairs:
        raise UserError(
            f"{key} has {len(rows):,} images, and none has its text beside it: expected x.jpg and "
            f"x.txt in {root}{suggest_name(path, besides='pairs')}"
        )
    if alone := [path for path, _ in rows if _stem(path) not in tree.texts]:
        logger.info(
            "%s: left out %s images without a text: %s", name, f"{len(alone):,}", list_few(alone)
        )
    paths = [path for path, _ in pairs]
    labels = np.zeros(len(pairs), np.int32)
    splits = make_splits(labels, [split for _, split in pairs] if split_of else None)
    dataset = Dataset(
        name,
        DatasetInfo(0, _ANY_SHAPE, captions=True),
        Files(root, paths),
        labels,
        splits,
        cut=not split_of,
        captions=TextFiles(root, [tree.texts[_stem(path)] for path in paths]),
    )
    log_cut(dataset)
    return dataset


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


class TextFiles:
    """The lines of a text file for each row; None for a row without one.

    Its length is the number of rows that have one.
    """

    def __init__(self, root: str, paths: Sequence[str | None]):
        self._root, self._paths = root, paths

    def __len__(self) -> int:
        return sum(path is not None for path in self._paths)

    def __getitem__(self, row: int) -> list[str]:
        path = self._paths[row]
        if path is None:
            return []
        try:
            content = _read_file(os.path.join(self._root, path), max_bytes=_MAX_TEXT)
            return content.decode("utf-8-sig").splitlines()
        except (OSError, ValueError) as e:
            raise ImageError(f"its text can't be read: {describe_error(e)}") from e


@dataclasses.dataclass
class _Listing:
    """The content of a folder.

    Attributes:
      images: paths of images, relative to the folder of the dataset.
      texts: paths of text files, relative like `images`.
      metadata: paths of metadata files, relative like `images`.
      folders: paths of its subfolders.
      left_out: paths of subfolders that hold nothing to be read, relative like `images`.
      ignored: numbers of other files by kind.
    """

    images: list[str] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)
    metadata: list[str] = dataclasses.field(default_factory=list)
    folders: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    ignored: Counter[str] = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass(frozen=True)
class _Tree:
    """The folder of a dataset, and what is below each folder in it.

    Attributes:
      first: what is directly in it.
      tops: the folders in it by name.
      ignored: numbers of files in these that are no images, by kind.
      left_out: paths of all folders that hold nothing to be read.
      texts: paths of all text files by their path without the ending.
      metadata: paths of all metadata files, sorted.
    """

    first: _Listing
    tops: dict[str, Top]
    ignored: Counter[str]
    left_out: list[str]
    texts: dict[str, str]
    metadata: list[str]

    @property
    def images(self) -> list[str]:
        """Paths of all images."""
        below = (paths for top in self.tops.values() for paths in (top.images, *top.below.values()))
        return [*self.first.images, *itertools.chain(*below)]

    def log_ignored(self, name: str, *, texts: int) -> None:
        """Logs what is not read of the dataset `name`, which has captions in `texts` files."""
        # Metadata files are read, or have a line of their own.
        tables = Counter(os.path.splitext(path)[1] for path in self.metadata if "/" in path)
        ignored = self.ignored - Counter({_TEXT: texts}) - tables
        if kinds := describe_ignored(ignored):
            logger.info("%s: ignored files that are no images of a known format: %s", name, kinds)
        if self.left_out:
            logger.info("%s: left out the folders %s", name, list_few(sorted(self.left_out)))


def _read_tree(root: str, *, name: str) -> _Tree:
    """Lists the folder of a dataset; raises `UserError`, with its name, if it can't be read."""
    try:
        return _list_tree(root)
    except OSError as e:
        kind, _, path = name.partition(":")
        raise UserError(
            f"data.name={name!r} can't be read: {e.strerror}: {e.filename}"
            f"{suggest_name(path, besides=kind)}"
        ) from None


def _list_tree(root: str) -> _Tree:
    first = _list_folder(root, root)
    with concurrent.futures.ThreadPoolExecutor(_LISTERS) as pool:
        listed = list(pool.map(lambda folder: _list_folder(root, folder), first.folders))
        inner = [folder for top in listed for folder in top.folders]
        below = dict(zip(inner, pool.map(lambda f: _list_below(root, f), inner), strict=True))
    tops = {}
    for folder, top in zip(first.folders, listed, strict=True):
        images = {os.path.basename(f): below[f].images for f in top.folders}
        tops[os.path.basename(folder)] = Top(top.images, images)
    everything = [*listed, *below.values()]
    left_out = [path for one in [first, *everything] for path in one.left_out]
    ignored = sum((one.ignored for one in everything), Counter())
    texts = {_stem(path): path for one in [first, *everything] for path in one.texts}
    metadata = sorted(path for one in [first, *everything] for path in one.metadata)
    return _Tree(first, tops, ignored, left_out, texts, metadata)


def _list_rows(
    tops: Mapping[str, Top], split_of: Mapping[str, str], loose: list[str], *, name: str
) -> list[tuple[str, str, str]]:
    """The path, class name and split ("" if there are none) of each image, sorted by path.

    Images that are not in a class folder are left out, `loose` ones among them, and so are
    folders without images; both are logged.
    """
    found: dict[tuple[str, str], list[str]] = {}  # by split and folder
    for top_name, top in tops.items():
        if top_name in split_of:
            loose = loose + top.images
            found |= {(top_name, folder): paths for folder, paths in top.below.items()}
        elif not split_of:
            found["", top_name] = [*top.images, *itertools.chain(*top.below.values())]
    found = drop_unsorted(found, split_of, name=name)
    if loose:
        few = list_few(sorted(loose))
        logger.info(
            "%s: left out %s images that are not in a class folder: %s",
            name,
            f"{len(loose):,}",
            few,
        )
    if empty := [os.path.join(*key) for key, paths in found.items() if not paths]:
        logger.info("%s: left out the folders %s, which have no images", name, list_few(empty))
    rows = (
        (path, normalize_name(folder), split_of.get(top_name, ""))
        for (top_name, folder), paths in found.items()
        for path in paths
    )
    # A copy on a system that decomposes accents has the same order.
    return sorted(rows, key=lambda row: (unicodedata.normalize("NFC", row[0]), row))


def list_images(
    root: str, folder: str, *, endings: Sequence[str] = ENDINGS
) -> tuple[list[str], Counter[str]]:
    """Paths of all images below a folder, relative to the root, and other files counted by kind.

    Images are the files with one of the endings.
    """
    found = _list_below(root, folder, endings)
    names = (os.path.basename(path) for path in found.left_out)
    found.ignored.update(f"folder {name}" for name in names if not name.startswith("."))
    return found.images, found.ignored


def _list_below(root: str, folder: str, endings: Sequence[str] = ENDINGS) -> _Listing:
    found, todo = _Listing(), [folder]
    while todo:
        one = _list_folder(root, todo.pop(), endings)
        found.images += one.images
        found.texts += one.texts
        found.metadata += one.metadata
        found.left_out += one.left_out
        found.ignored += one.ignored
        todo += one.folders
    return found


def _list_folder(root: str, folder: str, endings: Sequence[str] = ENDINGS) -> _Listing:
    found = _Listing()
    prefix = os.path.relpath(folder, root)
    prefix = "" if prefix == "." else f"{prefix}/"
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = entry.name
            ending = os.path.splitext(name)[1].lower()
            if _is_folder(entry):
                if is_left_out(name):
                    found.left_out.append(f"{prefix}{name}")
                    found.ignored["hidden"] += name.startswith(".")
                elif not (entry.is_symlink() and _leads_back(entry.path)):
                    found.folders.append(entry.path)
            elif name.startswith("."):
                found.ignored["hidden"] += 1
            elif ending in endings and _is_file(entry):
                found.images.append(f"{prefix}{name}")
            else:
                found.ignored[ending or "without an ending"] += 1
                if ending == _TEXT and _is_file(entry):
                    found.texts.append(f"{prefix}{name}")
                if name in _METADATA and _is_file(entry):
                    found.metadata.append(f"{prefix}{name}")
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # Links that lead to each other lead nowhere.
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def describe_ignored(ignored: Counter[str]) -> str:
    """Numbers of files that were left out by kind, such as "12 .heic, 1 hidden"."""
    return ", ".join(f"{n:,} {kind}" for kind, n in ignored.most_common(5))


def _leads_back(link: str) -> bool:
    folder = os.path.realpath(os.path.dirname(link))
    return os.path.commonpath([folder, os.path.realpath(link)]) == os.path.realpath(link)


# Metadata files


@dataclasses.dataclass(frozen=True)
class _MetadataRow:
    """A row of a metadata file.

    Attributes:
      values: label, labels and split, where the file has these columns.
      captions: of the image; None if the file has no column of them.
      place: the file and the row, for errors.
    """

    values: Mapping[str, Any]
    captions: Sequence[str] | None
    place: str


def _read_metadata(
    root: str, tree: _Tree, renamed: Mapping[str, str], *, name: str
) -> tuple[dict[str, _MetadataRow], str]:
    """Reads the files `metadata.csv` and `metadata.jsonl` in the folder of a dataset.

    This is the layout of `imagefolder` in Hugging Face's `datasets`: a column `file_name` has the
    paths of images from the folder of the file. The other columns are those of a manifest, or
    `text` for captions. Any others are logged.

    Args:
      root: path of the folder.
      tree: what is in it.
      renamed: names of columns in the files, by what they hold.
      name: of the dataset.

    Returns:
      The rows by the path of their image, in the order of the files; and, where no file has a
      column `file_name`, which columns the first one has.

    Raises:
      UserError: a file can't be read, or a row is not valid, or names an image that is not there
        or that another row names.
    """
    key = f"data.name={name!r}"
    folders = Counter(map(os.path.dirname, tree.metadata))
    for folder, count in folders.items():
        if count > 1:
            raise UserError(
                f"{key}: {os.path.join(root, folder)} holds both {' and '.join(_METADATA)}: "
                "expected one of them"
            )
    images = tree.images if tree.metadata else []
    # Copies between systems may change the Unicode form of a path.
    image_of = {unicodedata.normalize("NFC", path): path for path in images}
    image_of |= {path: path for path in images}
    found: dict[str, _MetadataRow] = {}
    unread = []
    for file in tree.metadata:
        where = f"{key}: {file}"
        rows = _read_rows(os.path.join(root, file), names=_invert(renamed), key=where)
        if not rows:
            raise UserError(f"{where} lists no images")
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise UserError(
                    f"{where}: row {number} is {str(row)[:80]}: expected an object a line"
                )
        columns = list(dict.fromkeys(c for row in rows for c in row if c))
        if "file_name" not in columns:
            unread.append(f"{file} has the columns {', '.join(columns)}"[:200])
            continue
        rows = _select_columns(rows, columns, name=name, file=file)
        kept = list(dict.fromkeys(c for row in rows for c in row if c))
        _check_values(rows, kept, where)
        of_texts = [c for c in kept if _CAPTION.fullmatch(c)]
        if "caption" in renamed:
            of_texts = [c for c in _invert(renamed).values() if _CAPTION.fullmatch(c)]
        captions = read_captions(rows, of_texts, key=where)
        missing = []
        for number, row in enumerate(rows, 1):
            given = _check_path(row["file_name"], "file_name", number, where).replace("\\", "/")
            path = os.path.normpath(os.path.join(os.path.dirname(file), given))
            image = image_of.get(path) or image_of.get(unicodedata.normalize("NFC", path))
            if image is None:
                missing.append((number, given, path))
                continue
            if image in found:
                raise UserError(
                    f"{where}: row {number} names {image}, and so does {found[image].place}: "
                    "expected one row for each image"
                )
            values = {c: value for c, value in row.items() if c not in ("file_name", *of_texts)}
            texts = None if captions is None else captions[number - 1]
            found[image] = _MetadataRow(values, texts, f"{file}: row {number}")
        if missing:
            number, given, path = missing[0]
            raise UserError(
                f"{where}: row {number}: file_name {given[:200]!r}: "
                f"{_explain_missing(given, path, root=root, images=images)}"
                + (f"; {len(missing):,} of {len(rows):,} rows are so" if len(missing) > 1 else "")
            )
    if unread and found:
        raise UserError(f"{key}: {unread[0]}: expected file_name, as the other metadata files have")
    return found, next(iter(unread), "")


def _select_columns(
    rows: Sequence[Mapping[Any, Any]], columns: Sequence[str], *, name: str, file: str
) -> list[dict[Any, Any]]:
    """The rows with the columns that are read alone; `text` becomes `caption` without any."""
    kept = {c: c for c in columns if c in ("file_name", "label", "labels", "split")}
    of_texts = {c: c for c in columns if _CAPTION.fullmatch(c)}
    if not of_texts and "text" in columns:
        of_texts = {"text": "caption"}
    kept |= of_texts
    if others := [column for column in columns if column not in kept]:
        logger.info("%s: %s: columns that are not read: %s", name, file, list_few(others))
    selected = []
    for row in rows:
        one: dict[Any, Any] = {kept[c]: value for c, value in row.items() if c in kept}
        if None in row:
            one[None] = row[None]  # Surplus values, which are refused later.
        if file.endswith(".jsonl"):  # null is no label.
            one |= {c: "" for c in ("label", "labels", "split") if one.get(c, "") is None}
        selected.append(one)
    return selected


def _explain_missing(given: str, path: str, *, root: str, images: Sequence[str]) -> str:
    """Returns why `given` in a metadata file, `path` from the root, is no image."""
    if "://" in given or os.path.isabs(given):
        return "expected a path from the folder of the file; a manifest may have any path or URL"
    if path.startswith("../"):
        return f"it is outside of {root}; a manifest may have any path"
    if os.path.exists(os.path.join(root, path)):
        return f"it is no image that is read: expected a file that ends in {', '.join(ENDINGS)}"
    wanted = _stem(os.path.basename(path)).lower()
    near = [image for image in images if _stem(os.path.basename(image)).lower() == wanted]
    near.sort(key=lambda image: len(os.path.commonpath([image, path])))
    hint = "".join(f"; there is {image}" for image in near[-1:])
    return f"there is no file {os.path.join(root, path)}{hint}"


def _metadata_dataset(
    name: str,
    root: str,
    tree: _Tree,
    named: Mapping[str, _MetadataRow],
    *,
    listed: Sequence[ListedImage] | None = None,
    fault: str = "",
) -> Dataset:
    """The dataset of the images that metadata files name.

    Labels are those of the files; without any, they are the names of folders as in other datasets,
    if each image is in a folder and there are two classes or more. Splits are the folders that are
    named for them, or else the column `split`; or those of `listed`, which has an entry for each
    image, and whose folders are no classes if there is a `fault`.
    """
    key = f"data.name={name!r}"
    paths, rows = list(named), list(named.values())
    if left := sorted(set(tree.images).difference(named)):
        logger.info(
            "%s: left out %s images that are in no row of the metadata: %s",
            name,
            f"{len(left):,}",
            list_few(left),
        )
    splits: list[str] | None
    if listed is None:
        folders = _find_folders(paths)
        splits = _find_metadata_splits(folders, rows, name=name)
        below = [parts[1] if find_split(parts[0]) else parts[0] for parts in folders]
    else:
        splits = [image.split for image in listed]
        if any("split" in row.values for row in rows):
            logger.info("%s: the column split is not read, as the splits are given", name)
        below = ["" if fault else os.path.basename(image.class_folder) for image in listed]
    captions: Sequence[Sequence[str]] | TextFiles | None = None
    if any(row.captions is not None for row in rows):
        captions = [row.captions or [] for row in rows]
    else:
        texts = TextFiles(root, [tree.texts.get(_stem(path)) for path in paths])
        captions = texts if len(texts) else None
    tree.log_ignored(name, texts=len(captions) if isinstance(captions, TextFiles) else 0)
    kinds = {kind for row in rows for kind in ("label", "labels") if kind in row.values}
    if len(kinds) > 1:
        raise UserError(f"{key}: the metadata has columns label and labels: expected one of them")
    several = kinds == {"labels"}
    values: list[Any] = []
    class_names = None
    if kinds:
        values = [row.values.get("labels" if several else "label", "") for row in rows]
        if several:
            values = [_several(v, row, key=key) for row, v in enumerate(values)]
    else:
        if all(below) and len(set(below)) > 1:
            class_names = sorted(set(map(normalize_name, below)))
            values = below
            logger.info(
                "%s: the metadata has no column label, so labels are the names of %s folders: %s",
                name,
                f"{len(class_names):,}",
                list_few(class_names),
            )
    if values:
        info, labels = encode_labels(
            values,
            multi_label=several,
            name=name,
            class_names=class_names,
            describe=lambda row: rows[row].place,
        )
    elif captions is not None:
        info, labels = DatasetInfo(0, _ANY_SHAPE), np.zeros(len(rows), np.int32)
    else:
        raise UserError(
            f"{key}: {', '.join(tree.metadata[:3])}: there is no column label or text, and there "
            "are no folders of classes: expected one of them; other names of columns are given as "
            "in folder:PATH#label=species,caption=title"
        )
    info = dataclasses.replace(info, captions=captions is not None)
    by_split = drop_unassigned(make_splits(labels, splits), name=name)
    check_classes(name, info, labels, by_split)
    records, cut = Files(root, paths), splits is None
    dataset = Dataset(name, info, records, labels, by_split, cut=cut, captions=captions)
    log_cut(dataset)
    return dataset


def _find_folders(paths: Sequence[str]) -> list[tuple[str, str]]:
    """The first two folders of each path, "" if there are less.

    Folders that all paths have in common are left out, as the `data` of `data/train/1.jpg`, but not
    from the first on that is named for a split.
    """
    common = os.path.commonpath([os.path.dirname(path) or "." for path in paths]).split("/")
    start = next((i for i, part in enumerate(common) if find_split(part)), len(common))
    start = 0 if common in ([""], ["."]) else start
    folders = []
    for path in paths:
        first, second, *_ = [*path.split("/")[start:-1], "", ""]
        folders.append((first, second))
    return folders


def _find_metadata_splits(
    folders: Sequence[tuple[str, str]], rows: Sequence[_MetadataRow], *, name: str
) -> list[str] | None:
    """The split of each image by its first two folders or its row; None if there are none."""
    key = f"data.name={name!r}"
    tops: dict[str, Top] = {}
    loose = False
    for first, second in dict.fromkeys(folders):
        if not first:
            loose = True
            continue
        top = tops.setdefault(first, Top([], {}))
        # What counts is whether there are images, not their names.
        if second:
            top.below[second] = [""]
        else:
            top.images.append("")
    has_column = any("split" in row.values for row in rows)
    named = [first for first in tops if find_split(first)]
    others = ["other images"] * loose + [first for first in tops if first not in named]
    if named and others:
        raise UserError(
            f"{key}: the metadata names images in {named[0]} and {others[0]}: expected all of them "
            "in folders of splits (train, test, validation), or none"
        )
    if has_column and not named:
        given = [str(row.values.get("split", "")) for row in rows]
        split_of = map_splits(set(given), key=f"{key}: column split")
        return [split_of[split] for split in given]
    if has_column:
        logger.info("%s: the column split is not read, as the folders are splits", name)
    split_of = find_splits(tops, key=key)
    return [split_of[first] for first, _ in folders] if split_of else None


# Manifests


@functools.cache
def manifest_dataset(text: str) -> Dataset:
    """A dataset of a `.csv`, `.tsv` or `.jsonl` file or gs:// URL with one image per row.

    Columns: `image` (a path relative to the manifest, an absolute path or a URL); `label` (a class
    name or an integer) or `labels` (several: `a|b`, in JSON a list); `caption`, or several such as
    `caption_0` and `caption_1` (a text, in JSON also a list); or `mask`, a path like `image`, with
    `classes.txt` beside the manifest (see `read_values`); or `depth`, with `depth_scale.txt` there
    (see `decode_depth`); optionally `split`. One of labels and
    captions may be missing. After the path, `#image=filepath,caption=title` gives other names of
    them, and `#caption=short+long` several.

    Raises:
      UserError: the file can't be read, or a column or a value is invalid.
    """
    name = f"manifest:{text}"
    key = f"data.name={name!r}"
    path, renamed = split_columns(text, _RENAMED)
    names = _invert(renamed)
    file = path if "://" in path else os.path.abspath(os.path.expanduser(path))
    ending = os.path.splitext(file)[1]
    if ending not in _TABLES:
        raise UserError(
            f"{key}: expected a file that ends in {', '.join(_TABLES)}"
            f"{suggest_name(path, besides='manifest')}"
        )
    check_store(path, where=f"{key}: ")
    order = [c for c in names.values() if _CAPTION.fullmatch(c)] if "caption" in renamed else None
    table = _gather(_iterate_rows(file, names=names, key=key), caption_columns=order, key=key)
    rows, captions = len(table.images), table.captions
    if table.labels is None:
        info, labels = DatasetInfo(0, _ANY_SHAPE), np.zeros(rows, np.int32)
    else:
        info, labels = _encode_codes(table.labels, table.counts, name=name)
    info = dataclasses.replace(info, captions=captions is not None)
    label_maps, folder = None, os.path.dirname(file)
    for kind, paths in table.maps.items():
        if kind == "depth":
            check_scale(paths, folder, key=key)
        files = Files(folder, paths)
        info, label_maps = add_label_maps(info, kind, files.read, folder, key=key)
        files.check_access(key)
    if table.splits is None:
        by_split = make_splits(labels, None)
    else:
        split_of = map_splits(table.splits.values, key=f"{key}: column split")
        splits = sorted(set(split_of.values()))
        number_of = [splits.index(split_of[split]) for split in table.splits.values]
        by_split = order_splits(np.array(number_of, np.int32)[table.splits.codes], splits)
        by_split = drop_unassigned(by_split, name=name)
    records = Files(folder, table.images)
    records.check_access(key)
    check_classes(name, info, labels, by_split)
    cut = table.splits is None
    dataset = Dataset(
        name, info, records, labels, by_split, cut=cut, captions=captions, label_maps=label_maps
    )
    log_cut(dataset)
    return dataset


@dataclasses.dataclass
class _Table:
    """The columns of a manifest.

    Attributes:
      images: the path of each row.
      maps: likewise of each column `mask` or `depth`.
      labels: of all rows, one row after the other; None without the column.
      counts: of the labels of each row, int32, if there may be several.
      splits: the split of each row; None without the column.
      captions: of each row; None without the columns.
    """

    images: Texts
    maps: dict[str, Texts] = dataclasses.field(default_factory=dict)
    labels: Codes | None = None
    counts: np.ndarray | None = None
    splits: Codes | None = None
    captions: TextLists | None = None


def _gather(rows: Iterator[Any], *, caption_columns: Sequence[str] | None, key: str) -> _Table:
    """The columns of rows.

    Args:
      rows: of the file.
      caption_columns: in the order of the captions; None for the order in the file.
      key: for errors.

    Raises:
      UserError: there are no rows, or a column or a value is invalid.
    """
    first, count, counts = list(itertools.islice(rows, _CHUNK)), 0, bytearray()
    own = columns = _check_columns(first, key)
    table = _Table(Texts(), maps={kind: Texts() for kind in ("mask", "depth") if kind in columns})
    table.labels = Codes() if {"label", "labels"}.intersection(columns) else None
    table.splits = Codes() if "split" in columns else None
    for chunk in itertools.chain([first], iter(lambda: list(itertools.islice(rows, _CHUNK)), [])):
        if chunk is not first:
            # Rows of JSON may lack captions.
            named = set().union(*(row for row in chunk if isinstance(row, dict)))
            later = {c for c in named if isinstance(c, str) and _CAPTION.fullmatch(c)}
            columns = own + sorted(later.union(columns[len(own) :]).difference(own))
            _check_values(chunk, columns, key, first=count)
        for kind, paths in {"image": table.images, **table.maps}.items():
            paths.append(
                _check_path(row[kind], kind, number, key)
                for number, row in enumerate(chunk, count + 1)
            )
        if table.splits is not None:
            table.splits.append([str(row["split"]) for row in chunk], range(count, count + _CHUNK))
        of_texts = caption_columns or [c for c in columns if _CAPTION.fullmatch(c)]
        if of_texts:
            if table.captions is None:
                table.captions = TextLists()
                table.captions.append([[]] * count)
            table.captions.append(read_captions(chunk, of_texts, key=key, first=count) or [])
        if table.labels is not None and "label" in columns:
            labels = [row["label"] for row in chunk]
            table.labels.append(labels, range(count, count + len(chunk)))
        elif table.labels is not None:
            several = [_several(row["labels"], count + i, key=key) for i, row in enumerate(chunk)]
            lengths = np.array([len(labels) for labels in several], np.int32)
            of_labels = np.repeat(np.arange(count, count + len(chunk)), lengths).tolist()
            table.labels.append(list(itertools.chain.from_iterable(several)), of_labels)
            counts += lengths.tobytes()
        count += len(chunk)
    if "labels" in columns:
        table.counts = np.frombuffer(counts, np.int32)
    return table


def _encode_codes(
    labels: Codes, counts: np.ndarray | None, *, name: str
) -> tuple[DatasetInfo, np.ndarray | Ragged]:
    """`encode_labels` of the different labels alone; `counts` are of each row, if several."""

    def describe(place: int) -> str:
        return f"row {labels.rows[place] + 1}"

    multi = counts is not None
    values = [[value] for value in labels.values] if multi else labels.values
    info, code_of = encode_labels(values, multi_label=multi, name=name, describe=describe)
    if counts is None:
        return info, code_of[labels.codes]
    return info, Ragged(np.concatenate(code_of)[labels.codes], counts)


def _read_rows(file: str, *, names: Mapping[str, str], key: str) -> list[Any]:
    return list(_iterate_rows(file, names=names, key=key))


def _iterate_rows(file: str, *, names: Mapping[str, str], key: str) -> Iterator[Any]:
    """Yields the rows of a table at a path or URL; raises `UserError` if it can't be read."""
    try:
        if is_remote(file):
            content: BinaryIO = io.BytesIO(BucketRanges([file]).read(0, 0, None, patient=False))
        else:
            content = open(open_regular(file, max_bytes=MAX_TABLE), "rb")  # noqa: SIM115
        with content:
            lines = io.TextIOWrapper(content, "utf-8-sig", newline="")
            delimiter = _TABLES[os.path.splitext(file)[1]]
            if delimiter is None:
                yield from _read_json(lines, names=names)
            else:
                yield from _read_table(lines, delimiter=delimiter, names=names)
    # Damaged files raise errors of several types.
    except Exception as e:
        raise UserError(f"{key} can't be read: {describe_error(e)}") from None


def _invert(renamed: Mapping[str, str]) -> dict[str, str]:
    """The names that this module uses, by those in the file."""
    names = {name: kind for kind, name in renamed.items() if kind != "caption"}
    several = renamed.get("caption", "").split("+")
    if len(several) == 1:
        return names | dict.fromkeys(filter(None, several), "caption")
    return names | {name: f"caption_{i}" for i, name in enumerate(several)}


def _read_json(lines: Iterator[str], *, names: Mapping[str, str]) -> Iterator[Any]:
    seen: set[str] = set()
    for line in filter(str.strip, lines):
        row = json.loads(line)
        if names and isinstance(row, dict):
            renamed = {names.get(key, key): value for key, value in row.items()}
            if len(renamed) < len(row):
                raise ValueError(f"two keys of one name among {', '.join(row)}")
            seen |= row.keys()
            row = renamed
        yield row
    _check_named(names, seen)


def _check_named(names: Mapping[str, str], columns: Collection[str]) -> None:
    for name in names:
        if name not in columns:
            raise ValueError(f"it has the columns {', '.join(sorted(columns))}; expected {name!r}")


def _read_table(
    lines: Iterator[str], *, delimiter: str, names: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    reader = csv.reader(lines, delimiter=delimiter)
    header = next(reader, [])
    _check_named(names, header)
    columns = [names.get(column, column) for column in header]
    if len(set(columns)) < len(columns):  # The last one would count.
        raise ValueError(f"two columns of one name among {', '.join(columns)}")
    if not any(_CAPTION.fullmatch(column) or column == "text" for column in columns):
        yield from _as_dicts(reader, columns)
        return
    # A quotation mark that is not closed would make the lines after it a part of the caption.
    strict = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        yield from _as_dicts(strict, columns)
    except csv.Error as e:
        line = reader.line_num + strict.line_num
        raise ValueError(f"line {line:,}, or quotation marks before it: {e}") from e


def _as_dicts(reader: Iterator[list[str]], columns: Sequence[str]) -> Iterator[dict[Any, Any]]:
    """The rows as `csv.DictReader` yields them: surplus values have the key None."""
    for values in reader:
        if len(values) == len(columns):
            yield dict(zip(columns, values, strict=True))
        elif values:
            row: dict[Any, Any] = dict.fromkeys(columns)
            row |= zip(columns, values, strict=False)
            yield row | ({None: values[len(columns) :]} if len(values) > len(columns) else {})


def _check_columns(rows: Sequence[Any], key: str) -> list[str]:
    if not rows:
        raise UserError(f"{key} lists no images")
    if not isinstance(rows[0], dict):
        raise UserError(f"{key}: {str(rows[0])[:80]!r}: expected an object a line")
    columns = [column for column in rows[0] if column is not None]
    # Rows of JSON may lack captions.
    named = {c for row in rows if isinstance(row, dict) for c in row if isinstance(c, str)}
    columns += sorted(c for c in named if _CAPTION.fullmatch(c) and c not in columns)
    for column in columns:
        if column not in _COLUMNS and not _CAPTION.fullmatch(str(column)):
            raise UserError(
                f"{key}: unknown column {column!r}{suggest(str(column), _COLUMNS)}; other names "
                "are given as in manifest:PATH#image=filepath,caption=title"
            )
    captioned = any(map(_CAPTION.fullmatch, columns))
    labelled = ("label" in columns) + ("labels" in columns)
    given = labelled + ("mask" in columns) + ("depth" in columns)
    if "image" not in columns or given > 1 or not (given or captioned):
        raise UserError(
            f"{key} has the columns {', '.join(columns)}; expected image, and either label or "
            "labels, or mask, or depth, or captions"
        )
    _check_values(rows, columns, key)
    return columns


def _check_path(value: Any, column: str, number: int, key: str) -> str:
    """Returns a path of a row, which is counted from 1; raises `UserError` if it is no text."""
    if not isinstance(value, str | int):  # A file may be called by a number.
        raise UserError(
            f"{key}: row {number}: {column}={str(value)[:80]}: expected a text, the path of a file"
        )
    return str(value)


def _check_values(rows: Sequence[Any], columns: Sequence[str], key: str, first: int = 0) -> None:
    """Raises `UserError` if a row has other columns, or lacks one that is not of captions.

    `first` is the number of the first row, from 0.
    """
    everything = set(columns)
    captioned = any(map(_CAPTION.fullmatch, columns))
    required = {column for column in columns if not _CAPTION.fullmatch(column)}
    for number, row in enumerate(rows, first):
        if isinstance(row, dict) and row.keys() == everything and None not in row.values():
            continue
        given = set(row) if isinstance(row, dict) else set()
        if not required <= given <= set(columns) or None in (row[c] for c in required):
            raise UserError(
                f"{key}: row {number + 1} is {str(row)[:120]}; expected a value for each of "
                f"{', '.join(columns)}"
                f"{'; a caption with a comma is quoted' * (captioned and None in given)}"
            )


def read_captions(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, key: str, first: int = 0
) -> list[list[str]] | None:
    """The captions of each row, in the order of the columns; None without such columns.

    A value is a text, a list of texts, or None. Raises `UserError` for any other. `first` is the
    number of the first row, from 0.
    """
    if not columns:
        return None
    captions = []
    for number, row in enumerate(rows, first):
        found: list[Any] = []
        for column in columns:
            value = row.get(column)
            found += value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(caption, str) for caption in found):
            raise UserError(
                f"{key}: row {number + 1}: {', '.join(columns)}: {str(found)[:80]}: expected a "
                "text or a list of texts"
            )
        captions.append(found)
    return captions


def _several(value: Any, row: int, *, key: str) -> list[Any]:
    if isinstance(value, str):
        return value.split("|") if value.strip() else []
    if not isinstance(value, list):
        raise UserError(f"{key}: row {row + 1}: labels={value!r}: expected a list")
    return value


def encode_labels(
    values: Sequence[Any],
    *,
    multi_label: bool,
    name: str,
    class_names: Sequence[str] | None = None,
    image_shape: tuple[int | None, ...] = _ANY_SHAPE,
    describe: Callable[[int], str] = lambda row: f"row {row + 1}",
) -> tuple[DatasetInfo, Any]:
    """Converts labels from class names or integers to int32.

    Takes a label for each row, or a list of labels if `multi_label`. Without names by label, class
    names are the sorted labels, if these are names. Spaces around a label do not count. A row
    without a label (-1, an empty text or None) gets `NO_LABEL`, and is refused when a split that
    holds it is opened. Returns the facts about the dataset, and int32 `[rows]`, or one array per
    row if `multi_label`. Raises `UserError` if a label is unknown or out of range, where `describe`
    names its row, counted from 0.
    """
    key = f"data.name={name!r}"
    rows = [list(map(_clean, value if multi_label else [value])) for value in values]
    if not multi_label:
        rows = [[] if labels[0] in _NO_LABELS else labels for labels in rows]
    row_of: dict[int | str, int] = {}  # the first row of each label
    for row, labels in enumerate(rows):
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
                raise UserError(
                    f"{key}: {describe(row)}: label {label!r}: expected a class name or an integer"
                )
            row_of.setdefault(label, row)
    if not row_of and not class_names:
        raise UserError(f"{key} has no labels")
    # A text that is the name of a class is that class, even if it is a number.
    named = {_clean(class_name) for class_name in class_names or ()}.intersection(row_of)
    if all(map(_is_integer, row_of)) and not named:
        largest = len(class_names) if class_names else MAX_CLASSES
        for label, row in row_of.items():
            if not 0 <= int(label) < largest:
                raise UserError(
                    f"{key}: {describe(row)}: label {label} is out of range; expected 0 to "
                    f"{largest - 1}"
                )
        code = {label: int(label) for label in row_of}
        num_classes = len(class_names) if class_names else max(code.values()) + 1
        known = None if class_names is None else check_class_names(class_names, name=name)
    else:
        known = check_class_names(class_names or sorted(set(map(str, row_of))), name=name)
        number_of = {_clean(class_name): number for number, class_name in enumerate(known)}
        for label, row in row_of.items():
            if str(label) not in number_of:
                hint = suggest(str(label), known)[:200]
                raise UserError(f"{key}: {describe(row)}: unknown label {label!r}{hint}")
        code = {label: number_of[str(label)] for label in row_of}
        num_classes = len(known)
    info = DatasetInfo(num_classes, image_shape, known, multi_label)
    if multi_label:
        return info, [np.array([code[label] for label in labels], np.int32) for labels in rows]
    return info, np.array([code[row[0]] if row else NO_LABEL for row in rows], np.int32)


def _clean(label: Any) -> Any:
    """A label without spaces around it, in the form of class names."""
    return normalize_name(label).strip() if isinstance(label, str) else label


def _is_integer(label: int | str) -> bool:
    # 007, +7 and --7 are names, and so is what has more digits than any integer.
    return isinstance(label, int) or re.fullmatch("0|-?[1-9][0-9]{0,18}", label) is not None


def check_store(path: str, *, where: str = "") -> None:
    """Raises `UserError`, which starts with `where`, for a URL that images are not read from."""
    if "://" in path and not is_remote(path):
        raise UserError(f"{where}{path!r}: expected a path, or a URL of {' or '.join(SCHEMES)}")
