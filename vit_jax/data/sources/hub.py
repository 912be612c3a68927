# SPDX-License-Identifier: Apache-2.0
"""Datasets of the Hugging Face hub, and folders that its library `datasets` writes."""

import dataclasses
import functools
import glob
import importlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.data.sources.base import Dataset, make_splits
from vit_jax.data.sources.columns import split_columns
from vit_jax.data.sources.files import (
    METADATA_COLUMNS,
    ListedImage,
    folder_dataset,
    is_metadata,
    listed_dataset,
)
from vit_jax.data.sources.guess import suggest_name
from vit_jax.data.sources.hub_layout import (
    CARD,
    Layout,
    find_layout,
    kind_of,
    name_splits,
)
from vit_jax.data.sources.label_maps import CLASSES
from vit_jax.data.sources.layout import drop_unassigned, find_split, list_few
from vit_jax.data.sources.tables import (
    COLUMNS,
    ArrowTable,
    Feature,
    make_dataset,
    open_table,
    parse_features,
)
from vit_jax.data.sources.tar import COLUMNS as TAR_COLUMNS
from vit_jax.data.sources.tar import read_shards, split_of
from vit_jax.data.sources.tfds import NotPreparedError, may_prepare
from vit_jax.utils.bounds import is_inside, read_json, read_text
from vit_jax.utils.errors import UserError, first_line

_REPOSITORY = re.compile(r"((?:[\w.-]+/)?[\w.-]+?)(?:@([\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What `#` in a name may say, besides the columns.
_OPTIONS = (*COLUMNS, "labels", "subset")
# Files with the names of classes, beside tables or tar files.
_NAMES = (CLASSES, "classnames.txt")
# Descriptions that `save_to_disk` writes.
_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
_MAX_FILES = 10**7

logger = logging.getLogger(__name__)


@functools.cache
def hub_dataset(text: str) -> Dataset:
    """A dataset of a repository `OWNER/NAME@REVISION` of the Hugging Face hub, or of a folder.

    A repository is downloaded into the cache of the hub. A path, which starts with `/`, `.` or `~`,
    is that of a folder of the same layout, or of one that `save_to_disk` wrote. The layout is that
    of the library `datasets`: see `find_layout`. Files are Parquet or Arrow, images as in
    `folder_dataset`, or tar files as in `tar_dataset`. After the name, `#subset=NAME` chooses one
    of several subsets, and `#image=img,label=fine_label` gives names of columns. Without these, the
    image and the label are the columns of the features `Image` and `ClassLabel`.

    Raises:
      UserError: there is no such repository, revision, folder or subset, it can't be reached and is
        not in the cache, or it can't be read.
    """
    name = f"hf:{text}"
    key = f"data.name={name!r}"
    place, options = split_columns(text, _OPTIONS)
    subset = options.pop("subset", None)
    repository = None if _is_local(place) else _find_repository(place, key=key)
    if repository is None:
        root = os.path.abspath(os.path.expanduser(place))
        if not os.path.isdir(root):
            hint = suggest_name(place, besides="hf")
            raise UserError(f"{key}: there is no folder {root}{hint}")
        if any(os.path.isfile(os.path.join(root, file)) for file in (_DICT, _STATE)):
            if subset is not None:
                raise UserError(f"{key}: a folder of save_to_disk has no subsets")
            return _read_saved(root, options, name=name)
        paths = _list_below(root, key=key)
    else:
        root, paths = repository.root, repository.paths

    def fetch(wanted: Sequence[str]) -> None:
        if repository is not None:
            repository.fetch(wanted, name=name)

    try:
        card = read_text(os.path.join(root, CARD)) if CARD in paths else ""
    except (OSError, ValueError) as e:
        raise UserError(f"{key}: {CARD} can't be read: {first_line(e)}") from None
    layout = find_layout(paths, card, subset=subset, key=key)
    if layout.kind == "tables":
        return _read_tables(root, paths, layout, options, fetch, name=name)
    return _read_others(root, paths, layout, options, fetch, name=name)


def pin_name(name: str) -> str:
    """The name of a dataset with the commit that its revision is now, if it is one of the hub.

    Raises:
      UserError: as `hub_dataset`, where the hub is asked.
    """
    kind, _, text = name.partition(":")
    place, _ = split_columns(text, _OPTIONS)
    if kind != "hf" or not text or _is_local(place):
        return name
    repository = _find_repository(place, key=f"data.name={name!r}")
    return f"hf:{repository.name}@{repository.commit}{text[len(place) :]}"


def unpin_name(name: str) -> str:
    """The name of a dataset without the commit of `pin_name`, if it has one."""
    kind, _, text = name.partition(":")
    place, _ = split_columns(text, _OPTIONS)
    repository, at, revision = place.partition("@")
    pinned = kind == "hf" and at and not _is_local(place) and _COMMIT.fullmatch(revision)
    return f"hf:{repository}{text[len(place) :]}" if pinned else name


def _is_local(place: str) -> bool:
    return place.startswith(("/", ".", "~")) and not place.startswith("//")


# Repositories


@dataclasses.dataclass(frozen=True)
class _Repository:
    """A repository at one commit.

    Attributes:
      name: OWNER/NAME.
      commit: in hexadecimal digits.
      root: the folder of the cache that its files are in.
      sizes: the bytes of all files by their path, whether they are in the cache or not.
    """

    name: str
    commit: str
    root: str
    sizes: Mapping[str, int]

    @property
    def paths(self) -> list[str]:
        """All files."""
        return list(self.sizes)

    def fetch(self, wanted: Sequence[str], *, name: str) -> None:
        """Downloads the files that are not in the cache; raises `UserError` if that fails."""
        hub, key = _import_hub(name), f"data.name={name!r}"
        missing = [p for p in wanted if not os.path.isfile(os.path.join(self.root, p))]
        if not missing:
            return
        if not may_prepare():
            raise _not_prepared(key)
        size = sum(self.sizes[path] for path in missing) / 1e9
        logger.info(
            "%s: downloads %s files, %.2f GB, to %s", name, f"{len(missing):,}", size, self.root
        )
        try:
            hub.snapshot_download(
                self.name,
                repo_type="dataset",
                revision=self.commit,
                allow_patterns=_make_patterns(wanted, self.paths),
            )
        except Exception as e:  # Of many types, also of the libraries that it uses.
            held = f"{len(missing):,} of {len(wanted):,} files are not in the cache"
            raise _explain(e, self.name, self.commit, held, key=key) from e
        for path in missing:
            if not os.path.isfile(os.path.join(self.root, path)):
                raise UserError(f"{key}: {path} was not downloaded: expected it in {self.root}")


@functools.cache
def _find_repository(place: str, *, key: str) -> _Repository:
    """Asks the hub, or its cache, for a repository and its files; downloads the card."""
    found = _REPOSITORY.fullmatch(place)
    if found is None:
        url = f"hf:{place}" if place.startswith("//") else place
        raise UserError(
            f"{key}: expected hf:OWNER/NAME, with @REVISION or #subset=NAME after it, or the path "
            f"of a folder, such as hf:./birds{suggest_name(url, besides='hf')}"
        )
    hub, (repository, revision) = _import_hub(key), found.groups()
    try:
        here = {"repo_type": "dataset", "local_files_only": not may_prepare()}
        resolved = hub.HfApi().resolve_revision(repository, revision=revision, **here)

        class Silent(hub.utils.tqdm):
            """The progress of two small files."""

            def __init__(self, *args: Any, **options: Any):
                super().__init__(*args, **{**options, "disable": True})

        # This also stores the list of all files. The second is in every repository, and without
        # any that matches there would be a warning.
        root = hub.snapshot_download(
            repository,
            revision=resolved,
            allow_patterns=[CARD, ".gitattributes"],
            tqdm_class=Silent,
            **here,
        )
        try:
            tree = hub.get_cached_repo_tree(repository, repo_type="dataset", revision=resolved)
            sizes = {file.path: file.size for file in tree}
        except hub.errors.CachedRepoTreeNotFoundError:  # Another program filled the cache.
            sizes = {p: os.path.getsize(os.path.join(root, p)) for p in _list_below(root, key=key)}
        return _Repository(repository, resolved.resolved, root, sizes)
    except Exception as e:  # Of many types, as above.
        if not may_prepare():
            raise _not_prepared(key) from e
        at = f" of {revision}" if revision else ""
        raise _explain(
            e, repository, revision, f"there is no copy{at} in the cache", key=key
        ) from e


def _not_prepared(key: str) -> NotPreparedError:
    return NotPreparedError(
        f"{key} is not in the cache yet: `python -m vit_jax.data.prepare` or a run downloads it"
    )


def _import_hub(name: str) -> Any:
    try:
        hub = importlib.import_module("huggingface_hub")
        importlib.import_module("huggingface_hub.errors")
        return hub
    except ImportError:
        raise UserError(
            f"{name} needs huggingface_hub: pip install 'vit_jax[hub,parquet]'; or give the folder "
            "of a download, as hf:./birds"
        ) from None


def _explain(
    error: Exception, repository: str, revision: str | None, held: str, *, key: str
) -> UserError:
    """What to do about an error of the library `huggingface_hub`; `held` is what the cache has."""
    if isinstance(error, UserError):
        return error
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 20:
        chain.append(cause)
    types = {kind.__name__ for one in chain for kind in type(one).__mro__}
    statuses = {getattr(getattr(one, "response", None), "status_code", None) for one in chain}
    constants = importlib.import_module("huggingface_hub.constants")
    url = f"{constants.ENDPOINT}/datasets/{repository}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if "GatedRepoError" in types or 403 in statuses:
        reason = f"its owner limits who may read it: ask for access at {url}, and {log_in}"
    elif "RevisionNotFoundError" in types:
        gone = revision or "main"
        reason = f"{url} has no revision {gone}: expected a branch, a tag or a commit of it"
    elif "RepositoryNotFoundError" in types or 401 in statuses:
        there = os.path.isdir(repository)
        hint = f"; a folder is written as hf:./{repository}" if there else ""
        reason = f"there is no dataset {url}, or it is private: {log_in} if it is{hint}"
    elif "HFValidationError" in types:
        reason = f"{first_line(error)}: expected hf:OWNER/NAME"
    elif types & {"OfflineModeIsEnabled", "TransportError", "LocalEntryNotFoundError"} or any(
        status and status >= 500 for status in statuses
    ):
        offline = "OfflineModeIsEnabled" in types
        why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} can't be reached"
        reason = (
            f"{why}, and {held} {constants.HF_HUB_CACHE}: expected a network, or a download by "
            "`python -m vit_jax.data.prepare` before"
        )
    else:
        reason = f"it can't be downloaded: {first_line(error)}"
    return UserError(f"{key}: {reason}")


def _make_patterns(wanted: Iterable[str], paths: Iterable[str]) -> list[str] | None:
    """A few patterns that match the paths that are wanted and no others; None for all paths."""
    wanted = set(wanted)
    others = set(paths) - wanted
    if not others:
        return None
    folder = os.path.commonpath([os.path.dirname(path) for path in wanted])
    if folder and not any(path.startswith(f"{folder}/") for path in others):
        return [f"{glob.escape(folder)}/*"]
    # Each digit stands for any, since a dataset may have thousands of numbered files.
    numbered = {re.sub("[0-9]", "0", path): path for path in wanted}
    if numbered.keys().isdisjoint(re.sub("[0-9]", "0", path) for path in others):
        return [re.sub("[0-9]", "[0-9]", glob.escape(path)) for path in numbered.values()]
    return [glob.escape(path) for path in sorted(wanted)]


def _list_below(root: str, *, key: str) -> list[str]:
    """The paths of all files below a folder, without those in hidden folders."""
    paths = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(folder, root)
        prefix = "" if inside == "." else f"{inside}/"
        paths += [f"{prefix}{name}" for name in files]
        if len(paths) > _MAX_FILES or prefix.count("/") > 64:
            raise UserError(f"{key}: too many files or folders in {root}")
    return paths


# Layouts


def _read_tables(
    root: str,
    paths: Sequence[str],
    layout: Layout,
    renamed: Mapping[str, str],
    fetch: Callable[[Sequence[str]], None],
    *,
    name: str,
) -> Dataset:
    """The dataset of Parquet and Arrow files."""
    files = list(zip(layout.files, layout.splits, strict=True))
    if any(layout.splits) and (others := [path for path, split in files if split is None]):
        logger.info("%s: left out files of no split: %s", name, list_few(others))
        files = [(path, split) for path, split in files if split is not None]
    folder = os.path.dirname(files[0][0])
    beside = os.path.join(folder, CLASSES)
    fetch([path for path, _ in files] + [path for path in paths if path == beside])
    dataset = make_dataset(
        name,
        lambda: [open_table(os.path.join(root, path)) for path, _ in files],
        renamed=renamed,
        find_splits=lambda tables: [split for _, split in files],
        map_splits=name_splits,
        features=layout.features,
    )
    meant = name_splits(layout.lengths)
    for split, expected in layout.lengths.items():
        length = dataset.lengths.get(meant[split], expected)
        if length != expected:
            logger.warning(
                "%s: %s has %s examples, and %s says that it has %s",
                name,
                meant[split],
                f"{length:,}",
                CARD,
                f"{expected:,}",
            )
    return dataset


def _read_others(
    root: str,
    paths: Sequence[str],
    layout: Layout,
    renamed: Mapping[str, str],
    fetch: Callable[[Sequence[str]], None],
    *,
    name: str,
) -> Dataset:
    """The dataset of images in folders, or of tar files, by the sources for these."""
    kind, columns = ("tar", TAR_COLUMNS) if layout.kind == "tar" else ("folder", METADATA_COLUMNS)
    if unknown := [column for column in renamed if column not in columns]:
        raise UserError(
            f"data.name={name!r}: {unknown[0]}={renamed[unknown[0]]} can't be given for "
            f"{layout.kind}{' files' * (kind == 'tar')}: expected {', '.join(columns)}"
        )
    if layout.kind == "tar":
        return _read_shards(root, paths, layout, renamed, fetch, name=name)
    if layout.patterns is not None:
        return _read_listed(root, paths, layout, layout.patterns, renamed, fetch, name=name)
    base = _find_base(layout.files, layout.folder)
    inside = [path for path in paths if path.startswith(f"{base}/" if base else "")]
    texts = (".csv", ".jsonl", ".txt")
    fetch([p for p in inside if kind_of(p) == "images" or p.lower().endswith(texts)])
    columns = ",".join(f"{column}={given}" for column, given in renamed.items())
    text = f"{os.path.join(root, base).rstrip('/')}{'#' * bool(columns)}{columns}"
    try:
        dataset = dataclasses.replace(folder_dataset(text), name=name)
    except UserError as e:
        raise UserError(str(e).replace(repr(f"folder:{text}"), repr(name))) from e
    return _use_splits(dataset, root, base, layout, name=name)


def _read_shards(
    root: str,
    paths: Sequence[str],
    layout: Layout,
    renamed: Mapping[str, str],
    fetch: Callable[[Sequence[str]], None],
    *,
    name: str,
) -> Dataset:
    """The dataset of the tar files of a layout."""
    folders = {os.path.dirname(path) for path in layout.files}
    folders |= {os.path.dirname(folder) for folder in folders}
    beside = {os.path.join(folder, file) for folder in folders for file in _NAMES}
    fetch(layout.files + [path for path in paths if path in beside])
    splits = None
    if layout.patterns is not None or not any(map(split_of, layout.files)):
        meant = name_splits(split for split in layout.splits if split is not None)
        splits = [None if split is None else meant[split] for split in layout.splits]
    files = [os.path.join(root, path) for path in layout.files]
    return read_shards(files, renamed, name=name, splits=splits)


def _read_listed(
    root: str,
    paths: Sequence[str],
    layout: Layout,
    patterns: Sequence[str],
    renamed: Mapping[str, str],
    fetch: Callable[[Sequence[str]], None],
    *,
    name: str,
) -> Dataset:
    """The dataset of the images that a card lists."""
    meant = name_splits(map(str, layout.splits))
    listed = [
        ListedImage(path, meant[str(split)], pattern)
        for path, split, pattern in zip(layout.files, layout.splits, patterns, strict=True)
    ]
    stems = {os.path.splitext(path)[0] for path in layout.files}
    above = {os.path.dirname(path) for path in layout.files}
    for folder in list(above):
        while folder:
            above.add(folder := os.path.dirname(folder))
    texts = [p for p in paths if p.endswith(".txt") and os.path.splitext(p)[0] in stems]
    tables = [p for p in paths if is_metadata(p) and os.path.dirname(p) in above]
    fetch([*layout.files, *texts, *tables])
    images = [path for path in paths if kind_of(path) == "images"]
    return listed_dataset(
        root, listed, renamed, images=images, texts=texts, metadata=tables, name=name
    )


def _use_splits(dataset: Dataset, root: str, base: str, layout: Layout, *, name: str) -> Dataset:
    """The dataset of images with the splits of a layout, where `folder_dataset` found none."""
    if not dataset.cut or not all(layout.splits):
        return dataset
    of_files = dict(zip(layout.files, layout.splits, strict=True))
    meant = name_splits(str(split) for split in layout.splits)
    paths = [
        os.path.relpath(dataset.records.describe(row), root) for row in range(len(dataset.labels))
    ]
    names = [meant[str(of_files[path])] if path in of_files else "" for path in paths]
    folders = {path.removeprefix(base).strip("/").partition("/")[0] for path in paths}
    if len(set(meant.values())) > 1 and folders == set(dataset.info.class_names or ()):
        raise UserError(
            f"data.name={name!r}: the paths of images name the splits {', '.join(meant)}, and the "
            f"folders {list_few(sorted(folders))} are not called so: expected folders of splits "
            "with folders of classes in them"
        )
    splits = drop_unassigned(make_splits(dataset.labels, names), name=name)
    logger.info(
        "%s: the paths of its files name their splits, so they are not cut: %s",
        name,
        ", ".join(f"{split} {len(rows):,}" for split, rows in splits.items()),
    )
    return dataclasses.replace(dataset, splits=splits, cut=False)


def _find_base(paths: Sequence[str], folder: str) -> str:
    """The folder that holds all files, or the folders of splits or classes with these.

    It is `folder` or below.
    """
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    parts = os.path.relpath(common, folder or ".").split("/") if common != folder else []
    split = next((place for place, part in enumerate(parts) if find_split(part)), len(parts))
    base = os.path.normpath(os.path.join(folder, *parts[:split]))
    return "" if base == "." else base


# Folders of `save_to_disk`


def _read_saved(root: str, renamed: Mapping[str, str], *, name: str) -> Dataset:
    """The dataset of a folder that `Dataset.save_to_disk` or that of `DatasetDict` wrote."""
    key = f"data.name={name!r}"
    folders: dict[str, str] = {}
    if os.path.isfile(os.path.join(root, _DICT)):
        listed = _read_description(root, _DICT, key=key).get("splits")
        if not isinstance(listed, list) or not all(
            isinstance(split, str) and is_inside(split) for split in listed
        ):
            raise UserError(f"{key}: {_DICT}: expected a list of splits")
        folders = {split: os.path.join(root, split) for split in listed}
    files: list[tuple[str, str]] = []
    features: dict[str, Feature] = {}
    for split, folder in (folders or {"": root}).items():
        state = _read_description(folder, _STATE, key=key)
        given = state.get("_data_files")
        listed = given if isinstance(given, list) else [None]
        names = [f.get("filename") if isinstance(f, dict) else None for f in listed]
        if not all(isinstance(file, str) and is_inside(file) for file in names):
            raise UserError(f"{key}: {os.path.join(folder, _STATE)} lists no files")
        if any(state.get(k) for k in ("_indices_data_files", "_indices_files")):
            raise UserError(
                f"{key}: {folder} was saved with indices: expected it without, as after "
                "flatten_indices()"
            )
        if not split:
            saved = str(state.get("_split"))
            split = saved if state.get("_split") and re.fullmatch(r"[\w-]+", saved) else "train"
        if os.path.isfile(os.path.join(folder, _INFO)):
            info = _read_description(folder, _INFO, key=key)
            features = features or parse_features(info.get("features"))
        files += [(os.path.join(folder, str(file)), split) for file in names]
    return make_dataset(
        name,
        lambda: [open_table(path, ArrowTable) for path, _ in files],
        renamed=renamed,
        find_splits=lambda tables: [split for _, split in files],
        map_splits=name_splits,
        features=features,
    )


def _read_description(folder: str, file: str, *, key: str) -> dict[str, Any]:
    path = Path(folder, file)
    try:
        content = read_json(path)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or first_line(e)
        raise UserError(f"{key}: {path} can't be read: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{key}: {path}: expected an object")
    return content
