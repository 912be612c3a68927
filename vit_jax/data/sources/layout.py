# SPDX-License-Identifier: Apache-2.0
"""Names of splits and of classes: which folders are splits, and what is odd about a dataset."""

import collections
import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vit_jax.data.sources.base import HELD_OUT, NO_LABEL, Dataset, DatasetInfo
from vit_jax.data.sources.compact import Ragged
from vit_jax.utils.class_names import normalize_name
from vit_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

# Names of folders or files, and values of a column, that mean a split, in lower case.
_NAMES_OF_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}
_SPLITS = {name: split for split, names in _NAMES_OF_SPLITS.items() for name in names}
# What can be opened as in `train[:98%]+test`.
_SPLIT = re.compile(r"[\w-]+")
# Parts of longer names that suggest a split, such as `train2017` or `seg_test`.
_WORD = re.compile(
    r"(train(ing)?|test(ing)?|val(id(ation)?)?|eval(uation)?|dev|holdout|fold|split)"
    r"(set|data|images?|imgs?|samples?)?"
)
# Folders that file systems and programs make, in lower case.
_LEFT_OUT = (
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "__macosx",
    "__pycache__",
    "lost+found",
    "system volume information",
)
_LISTED = 5  # names in one line


def find_split(name: str) -> str | None:
    """Returns "train", "validation" or "test" if a name means one of them, in any case."""
    return _SPLITS.get(name.lower())


def map_splits(names: Iterable[str], *, key: str) -> dict[str, str]:
    """Returns the split that each name means; a name that means none of the usual is a split too.

    Spaces around a name do not count; a name without anything else means no split, "".

    Raises `UserError` if names that differ by more than case mean the same split, or if a name
    can't be used to open its split.
    """
    meant = {name: find_split(name.strip()) or name.strip() for name in names}
    splits = set(meant.values()) - {""}
    if not splits:
        raise UserError(
            f"{key}: no row has a split: expected names such as train, or no such column"
        )
    for split in splits:
        several = sorted(
            {name.strip().lower(): name.strip() for name, s in meant.items() if s == split}.values()
        )
        if len(several) > 1:
            raise UserError(_twice(several, split, key=key))
        if not _SPLIT.fullmatch(split) or (split == "all" and len(splits) > 1):
            raise UserError(
                f"{key}: {split[:80]!r} can't be the name of a split: expected letters, digits, "
                "'_' and '-', and not 'all' beside others"
            )
    return meant


def drop_unassigned(splits: Mapping[str, np.ndarray], *, name: str) -> dict[str, np.ndarray]:
    """Returns the rows of each split without those of no split, "", which are logged.

    Args:
      splits: integers `[examples]` by split.
      name: of the dataset, for the log.
    """
    if (rows := splits.get("")) is not None:
        logger.info(
            "%s: left out %s rows that have no split, the first of them row %d",
            name,
            f"{len(rows):,}",
            rows.min() + 1,
        )
    return {split: rows for split, rows in splits.items() if split}


def _twice(names: Sequence[str], split: str, *, key: str) -> str:
    return f"{key}: {' and '.join(names)} both mean the split {split!r}: expected one of them"


def suggests_split(name: str) -> bool:
    """Whether a name has a word of a split in it, such as `train2017` or `seg_test`."""
    return any(_WORD.fullmatch(word) for word in re.split(r"[^a-z]+", name.lower()))


def is_left_out(folder: str) -> bool:
    """Whether a folder of this name holds nothing that a person put there."""
    return folder.startswith(".") or folder.lower() in _LEFT_OUT


def list_few(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


@dataclasses.dataclass(frozen=True)
class Top:
    """A folder in the folder of a dataset: a split or a class.

    Attributes:
      images: paths of the images in it.
      below: paths of the images at any depth in each of its subfolders.
    """

    images: list[str]
    below: dict[str, list[str]]

    @property
    def folders(self) -> set[str]:
        """Its subfolders that have images."""
        return {folder for folder, paths in self.below.items() if paths}


def find_splits(tops: Mapping[str, Top], *, key: str) -> dict[str, str]:
    """Returns the split that each folder of a dataset is; none if the folders are classes.

    A single folder that is called "train" may be a class beside others, if its images are directly
    in it.

    Args:
      tops: the folders by name.
      key: the config key, for errors.

    Raises:
      UserError: some are splits and some are not, two are the same split, names suggest splits that
        are not known, or the splits are further down.
    """
    named = {name: split for name in tops if (split := find_split(name))}
    used = {name: top for name, top in tops.items() if top.images or top.folders}
    others = [name for name in used if name not in named]
    if named and not others and (len(named) > 1 or len(tops) == 1):
        for split in set(named.values()):
            if len(same := [name for name, s in named.items() if s == split]) > 1:
                raise UserError(_twice(same, split, key=key))
        for name, top in used.items():
            if top.folders and all(map(find_split, top.folders)):
                raise UserError(
                    f"{key}: {name} holds {', '.join(sorted(top.folders))}, of the name of a split "
                    "too: expected train/CLASS/IMAGE"
                )
        return named
    if len(named) > 1:
        raise UserError(
            f"{key} holds {', '.join(named)} and {others[0]}: expected folders of splits "
            "(train, test, validation) or of classes, not both"
        )
    likely = [name for name in used if suggests_split(name)]
    if likely and _are_splits(likely, used):
        raise UserError(
            f"{key} holds {list_few(likely)}, which suggests splits: expected train, validation "
            "and test, with a folder for each class in them; or, if it is a class, its images "
            "directly in its folder"
        )
    if len(used) > 1 and all(map(_holds_splits, used.values())):
        raise UserError(
            f"{key} holds {list_few(list(used))}, with folders of splits in them: expected "
            "train/CLASS/IMAGE, where the folders of splits hold those of classes"
        )
    for name in named:
        logger.info("%s: %r is taken as a class, beside %s", key, name, list_few(others))
    return {}


def _holds_splits(top: Top) -> bool:
    splits = [find_split(folder) for folder in top.folders]
    return not top.images and bool(splits) and (all(splits) or len({*splits} - {None}) > 1)


def describe_depth(paths: Sequence[str], *, root: str, key: str) -> str:
    """Returns a hint on where the classes may be, where all images are below one folder.

    Args:
      paths: of all images, or of those of one split, sorted, relative to the root.
      root: path of the dataset.
      key: the config key, for errors.

    Raises:
      UserError: there are folders of splits further down.
    """
    # What the first and the last of sorted texts begin with, all between them begin with too.
    common = os.path.commonpath([os.path.dirname(paths[0]), os.path.dirname(paths[-1])])
    place = f"folder:{os.path.join(root, common)}"
    rest = [path.removeprefix(f"{common}/") for path in paths]
    folders = sorted({path.partition("/")[0] for path in rest if "/" in path})
    if len({find_split(folder) for folder in folders} - {None}) > 1:
        raise UserError(f"{key}: {list_few(folders)} are in {common}: expected {place}")
    if len(folders) < 2 or not all("/" in path for path in rest):
        return ""
    where = f"; its images are in {list_few(folders)}: "
    if find_split(common.partition("/")[0]):
        return f"{where}expected them in the folder of the split"
    return f"{where}are these the classes of {place}?"


def _are_splits(likely: Sequence[str], tops: Mapping[str, Top]) -> bool:
    """Whether folders whose names suggest splits have classes in them, or are all that there is."""
    if len(likely) == len(tops) > 1:
        return True
    for name in likely:
        top = tops[name]
        if top.images:
            continue
        others = (other.folders for n, other in tops.items() if n != name)
        known = find_split(name) is not None and len(top.folders) > 1
        if known or len(tops) == 1 or any(top.folders & folders for folders in others):
            return True
    return False


def drop_unsorted(
    found: Mapping[tuple[str, str], list[str]], split_of: Mapping[str, str], *, name: str
) -> dict[tuple[str, str], list[str]]:
    """Returns the folders without those of splits that are not sorted by class.

    Such a split has all images in one folder, as in `val/images`, which is no class of `train`.

    Args:
      found: paths of images by the folder of the split and that of the class.
      split_of: the split of each of the former.
      name: of the dataset, for the log.
    """
    classes: dict[str, set[str]] = collections.defaultdict(set)
    for (top, folder), paths in found.items():
        if paths:
            classes[split_of.get(top, "")].add(_key(folder))
    trained, kept = classes["train"], {}
    for (top, folder), paths in found.items():
        own = classes[split_of.get(top, "")]
        if paths and len(trained) > 1 and len(own) == 1 and not own & trained:
            logger.info(
                "%s: left out %s with %s images, as no class of train has this name: the split %r "
                "needs a folder for each class, or a manifest",
                name,
                f"{top}/{folder}",
                f"{len(paths):,}",
                split_of[top],
            )
        else:
            kept[top, folder] = paths
    return kept


def log_cut(dataset: Dataset) -> None:
    """Logs how a dataset without splits of its own is cut, and which classes are too small."""
    if not dataset.cut:
        return
    several = dataset.info.multi_label or not dataset.info.num_classes
    held = round(100 * HELD_OUT)
    logger.info(
        "%s: it has no splits of its own, so a fixed seed cuts %s into %d %% train, %d %% "
        "validation and %d %% test, at least one image each: %s",
        dataset.name,
        "the images" if several else "each class",
        100 - 2 * held,
        held,
        held,
        ", ".join(f"{split} {length:,}" for split, length in dataset.lengths.items()),
    )
    if several:
        return
    labels, counts = np.unique(np.asarray(dataset.labels), return_counts=True)
    small = labels[(counts < len(dataset.splits)) & (labels != NO_LABEL)]
    if len(small):
        names = dataset.info.class_names or tuple(map(str, range(dataset.info.num_classes)))
        logger.info(
            "%s: %d of %d classes have fewer than %d images, and so none in validation, nor in "
            "test if there is a single one: %s",
            dataset.name,
            len(small),
            dataset.info.num_classes,
            len(dataset.splits),
            list_few([names[label] for label in small]),
        )


def check_classes(
    name: str,
    info: DatasetInfo,
    labels: np.ndarray | Sequence[np.ndarray],
    splits: Mapping[str, np.ndarray],
    *,
    hint: str = "",
) -> None:
    """Logs what is odd about the classes of a dataset: a single one, or some without training.

    Args:
      name: of the dataset.
      info: its classes.
      labels: int32 `[rows]`, or an array for each row.
      splits: the rows of each split.
      hint: is added to the line on a single class.

    Raises:
      UserError: the name of a class is spelled in another way in each split.
    """
    found = {split: _classes_of(labels, rows) for split, rows in splits.items()}
    names = info.class_names or tuple(map(str, range(info.num_classes)))
    if info.num_classes == 1 and not info.multi_label:
        logger.info(
            "%s: there is a single class, %r, so that every prediction is right%s",
            name,
            names[0],
            hint,
        )
    if "train" in found:
        untrained = [names[label] for label in range(len(names)) if label not in found["train"]]
        if untrained:
            logger.info(
                "%s: %d of %d classes have no images in train, and are never predicted: %s",
                name,
                len(untrained),
                len(names),
                list_few(untrained),
            )
    if info.class_names:
        _check_spelling(name, info.class_names, found)


def _classes_of(labels: np.ndarray | Sequence[np.ndarray], rows: np.ndarray) -> set[int]:
    if isinstance(labels, np.ndarray):
        return set(np.unique(labels[rows]).tolist()) - {NO_LABEL}
    if isinstance(labels, Ragged):
        return set(np.unique(labels.select(rows)[0]).tolist())
    return {int(label) for row in rows for label in labels[row]}


def _key(name: str) -> str:
    """Returns what names that people would take for the same have in common."""
    key = " ".join(re.split(r"[\s_-]+", normalize_name(name))).strip().casefold()
    return key or name


def _check_spelling(name: str, names: Sequence[str], found: Mapping[str, set[int]]) -> None:
    if spaced := [repr(class_name) for class_name in names if class_name != class_name.strip()]:
        logger.info(
            "%s: the names of classes %s have leading or trailing spaces, which are kept",
            name,
            list_few(spaced),
        )
    alike = collections.defaultdict(list)
    for label, class_name in enumerate(names):
        alike[_key(class_name)].append(label)
    for labels in alike.values():
        if len(labels) == 1:
            continue
        several = " and ".join(repr(names[label]) for label in labels)
        together = [len(classes.intersection(labels)) for classes in found.values()]
        if max(together, default=0) < 2 and sum(together) > 1:
            raise UserError(
                f"data.name={name!r}: {several} are in different splits, and differ only in case, "
                "spaces or dashes: expected one name for each class"
            )
        logger.info(
            "%s: the names of classes %s differ only in case, spaces or dashes: they count as %d",
            name,
            several,
            len(labels),
        )
