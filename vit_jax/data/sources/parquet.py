# SPDX-License-Identifier: Apache-2.0
"""Datasets in Parquet files, in the layout of the Hugging Face Hub."""

import collections
import dataclasses
import functools
import logging
import os
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.data.ops.decode import ImageError
from vit_jax.data.sources.base import Dataset, DatasetInfo, Records, make_splits
from vit_jax.data.sources.columns import split_columns
from vit_jax.data.sources.files import encode_labels
from vit_jax.data.sources.guess import suggest_name
from vit_jax.data.sources.label_maps import add_label_maps
from vit_jax.data.sources.layout import (
    check_classes,
    drop_unassigned,
    find_split,
    log_cut,
    map_splits,
)
from vit_jax.utils.bounds import (
    MAX_JSON,
    MAX_WEIGHTS,
    check_growth,
    open_regular,
    parse_json,
)
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import find_paths

logger = logging.getLogger(__name__)

# Bytes of images of the row groups that stay in memory, for all files together.
CACHE_BYTES = 2**30
# A file may have this many rows, and one more for so many bytes: each has an image.
_MIN_ROWS, _ROW_BYTES = 2**16, 16
_BATCH_ROWS = 64

# The columns of a file by what they hold, and how a dataset's name says that they have other names.
_COLUMNS = ("image", "label", "split", "caption", "mask", "depth")
# The columns with captions where no others are named: the first of these that is there.
_CAPTIONS = ("caption", "captions", "text", "texts")


@functools.cache
def parquet_dataset(text: str) -> Dataset:
    """A dataset of the files of a path or pattern, or of all files below a folder.

    Columns: `image` (bytes, or a struct with `bytes`), `label` (integer or class name) and
    `caption` (a text or a list of texts; or `captions`, `text`); or `mask` (like `image`), with
    `classes.txt` beside the files (see `read_values`) and without labels; or `depth`, with
    `depth_scale.txt` there (see `decode_depth`); after the path,
    `#image=img,label=fine_label` gives other names of them, and `#caption=short+long` several.
    Class names are those that the `datasets` library writes into the schema. The split is the
    column `split`, or else the first word of the files' names, as in
    `train-00000-of-00002.parquet`. Labels may be missing, as null, -1 or the whole column, in
    splits that are never opened, and everywhere if there are captions.

    Raises:
      UserError: pyarrow is missing, there are no files, or a column is invalid.
    """
    name = f"parquet:{text}"
    key = f"data.name={name!r}"
    path, renamed = split_columns(text, _COLUMNS)
    names_of = {column: column for column in _COLUMNS} | renamed
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{key} needs pyarrow: pip install 'vit_jax[parquet]'") from None
    where = os.path.expanduser(path)
    pattern = os.path.join(where, "**", "*.parquet") if os.path.isdir(where) else where
    paths = find_paths(pattern)
    if not paths:
        hint = suggest_name(path, besides="parquet")
        raise UserError(f"{key}: there are no files {pattern}{hint}")
    labels, splits, names = [], [], {}
    try:
        files = [_open(file) for file in paths]
        captions = _find_captions(files, paths, key, names_of)
        for file_path, file in zip(paths, files, strict=True):
            schema = file.schema_arrow
            _check_schema(schema, file_path, key, names_of)
            rows = file.metadata.num_rows
            columns = [names_of[c] for c in ("label", "split") if names_of[c] in schema.names]
            table = _read_columns(file, file_path, columns)
            if columns and table.num_rows != rows:
                raise ValueError(f"{file_path} has {table.num_rows} rows; expected {rows}")
            if names_of["label"] in columns:
                names[file_path] = _class_names(schema, names_of["label"])
                labels += table.column(names_of["label"]).to_pylist()
            else:
                labels += [None] * rows
            if names_of["split"] in columns:
                given = table.column(names_of["split"]).to_pylist()
                splits += ["" if split is None else str(split) for split in given]
            else:
                splits += [_split_of(file_path)] * rows
    except (OSError, ValueError, pa.ArrowException) as e:  # Bounds raise the first two.
        raise UserError(f"{key} can't be read: {' '.join(str(e).split())[:200]}") from None
    mapped = [
        kind
        for kind in ("mask", "depth")
        if all(names_of[kind] in file.schema_arrow.names for file in files)
    ]
    if len(given := [*(["label"] if names else []), *mapped]) > 1:
        columns = " and ".join(names_of[kind] for kind in given)
        raise UserError(
            f"{key} has both {columns}: expected labels of images, or masks, or depth: leave a "
            f"column out by giving it another name, as parquet:PATH#{given[-1]}=none"
        )
    if not names and (not (captions or mapped) or names_of["label"] != "label"):
        raise _lack("label", files[0].schema_arrow, paths[0], key, names_of)
    first, class_names = next(iter(names.items()), ("", None))
    for file_path, other in names.items():
        if other != class_names:
            raise UserError(
                f"{key}: {file_path} has other class names than {first}; expected the same in "
                "all files"
            )
    records = RowGroups(paths, files, column=names_of["image"])
    if names:
        info, codes = encode_labels(
            labels,
            multi_label=False,
            name=name,
            class_names=class_names,
            describe=lambda row: f"{records.describe(row)} (row {row + 1})",
        )
    else:
        info, codes = DatasetInfo(0, (None, None, 3)), np.zeros(len(labels), np.int32)
    info = dataclasses.replace(info, captions=bool(captions))
    label_maps = None
    for kind in mapped:
        read = RowGroups(paths, files, column=names_of[kind]).read
        folder = os.path.dirname(paths[0])
        info, label_maps = add_label_maps(info, kind, read, folder, key=key)
    _check_size(files, name)
    if None in splits:
        if set(splits) != {None}:
            raise UserError(
                f"{key}: only some of its files are named for a split; expected all, "
                "as in train-0.parquet, or none"
            )
        by_split, cut = make_splits(codes, None), True
    else:
        # The order of the files is kept, so that evaluation reads each row group once.
        split_of = map_splits(set(splits), key=key)
        array = np.asarray([split_of[split] for split in splits])
        by_split = {s: np.flatnonzero(array == s) for s in sorted(set(split_of.values()))}
        by_split, cut = drop_unassigned(by_split, name=name), False
    check_classes(name, info, codes, by_split)
    texts = TextColumns(paths, files, columns=captions) if captions else None
    dataset = Dataset(
        name, info, records, codes, by_split, cut=cut, captions=texts, label_maps=label_maps
    )
    log_cut(dataset)
    return dataset


def _lack(what: str, schema: Any, path: str, key: str, names_of: dict[str, str]) -> UserError:
    return UserError(
        f"{key}: {path} has the columns {', '.join(schema.names)}; expected {names_of[what]} for "
        f"the {what}: other names are given as in parquet:PATH#image=img,label=fine_label"
    )


def _find_captions(
    files: Sequence[Any], paths: Sequence[str], key: str, names_of: dict[str, str]
) -> list[str]:
    """The columns with captions; none if no names are given and no usual one is there.

    Raises `UserError` if a column that is named is missing or does not hold texts.
    """
    schemas = [file.schema_arrow for file in files]
    if names_of["caption"] == "caption":
        usual = (c for c in _CAPTIONS if all(_holds_texts(schema, c) for schema in schemas))
        return [column for column, _ in zip(usual, range(1), strict=False)]
    columns = names_of["caption"].split("+")
    for schema, path in zip(schemas, paths, strict=True):
        for column in columns:
            if column not in schema.names:
                raise _lack("caption", schema, path, key, names_of | {"caption": column})
            if not _holds_texts(schema, column):
                raise UserError(
                    f"{key}: {path}: column {column} is {schema.field(column).type}; expected a "
                    "text or a list of texts"
                )
    return columns


def _holds_texts(schema: Any, column: str) -> bool:
    import pyarrow as pa

    if schema.names.count(column) != 1:
        return False
    kind = schema.field(column).type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _open(path: str) -> Any:
    """Opens a file; raises OSError, ValueError or ArrowException if it can't be one of images."""
    import pyarrow.parquet as pq

    os.close(open_regular(path, max_bytes=MAX_WEIGHTS))
    limits: dict[str, Any] = {
        "thrift_string_size_limit": MAX_JSON,
        "thrift_container_size_limit": 2**20,
    }
    file = pq.ParquetFile(path, memory_map=True, **limits)
    rows, size = file.metadata.num_rows, os.path.getsize(path)
    # Runs of equal values take no space, but rows with an image each do.
    if rows > _MIN_ROWS + size // _ROW_BYTES:
        raise ValueError(f"{path}: {rows:,} rows in {size:,} bytes: expected an image in each")
    counts = [group.num_rows for group in _groups(file)]
    if sum(counts) != rows or min(counts, default=0) < 0:
        raise ValueError(f"{path}: {rows:,} rows, and {sum(counts):,} in its row groups")
    # Not by columns: pyarrow aborts the process where the description of one is damaged.
    check_growth(size, sum(group.total_byte_size for group in _groups(file)), path)
    return file


def _groups(file: Any) -> list[Any]:
    """The descriptions of the row groups of a file."""
    return [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]


def _read_columns(file: Any, path: str, columns: Sequence[str], **options: Any) -> Any:
    """Reads columns as a table; raises ValueError once they take far more memory than the file.

    They are read in batches, since a value that rows share in the file is copied for each of them.
    """
    import pyarrow as pa

    batches, size, stored = [], 0, os.path.getsize(path)
    for batch in file.iter_batches(columns=list(columns), **options):
        batches.append(batch)
        size += batch.nbytes
        check_growth(stored, size, path)
    return pa.Table.from_batches(batches) if batches else file.read(columns=list(columns))


def _check_schema(schema: Any, path: str, key: str, names_of: dict[str, str]) -> None:
    import pyarrow as pa

    # Files are also named for their split; labels may be missing in some.
    for what in ("image", *(["split"] if names_of["split"] != "split" else [])):
        if names_of[what] not in schema.names:
            raise _lack(what, schema, path, key, names_of)
    for column in (names_of[what] for what in ("image", "label", "split")):
        if schema.names.count(column) > 1:
            raise UserError(f"{key}: {path} has several columns {column}; expected one")
    encoded = (names_of[what] for what in ("image", "mask", "depth"))
    for column in (c for c in encoded if c in schema.names):
        image = schema.field(column).type
        if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
            image = image.field("bytes").type
        if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
            raise UserError(
                f"{key}: {path}: column {column} is {image}; expected bytes, or a struct with bytes"
            )


def _check_size(files: list[Any], name: str) -> None:
    """Logs that shuffled reading will be slow if the row groups exceed the cache."""
    groups = [f.metadata.row_group(g) for f in files for g in range(f.metadata.num_row_groups)]
    size, rows = sum(g.total_byte_size for g in groups), sum(g.num_rows for g in groups)
    if size > CACHE_BYTES:
        logger.info(
            "%s: %.1f GB, of which %.1f stay in memory: in a shuffled order most images cost the "
            "read of a row group, here of %d rows on average; smaller ones read faster",
            name,
            size / 1e9,
            CACHE_BYTES / 1e9,
            rows // len(groups),
        )


def _class_names(schema: Any, column: str) -> list[str] | None:
    """The class names of a column that the `datasets` library wrote into the schema."""
    try:
        features = parse_json(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else None


def _split_of(path: str) -> str | None:
    word = re.split(r"[-_.]", os.path.basename(path))[0]
    words = (word, os.path.basename(os.path.dirname(path)))
    return next((word for word in words if find_split(word)), None)


class RowGroups(Records):
    """Images of Parquet files, whose row groups can only be read as a whole.

    The row groups that were used last stay in memory, so that neighbours cost one read. In a
    shuffled order over more than `cache_bytes`, nearly every record costs the read of a row group.
    """

    def __init__(
        self,
        paths: list[str],
        files: list[Any],
        *,
        column: str = "image",
        cache_bytes: int = CACHE_BYTES,
    ):
        self._paths, self._files, self._column = paths, files, column
        self._cache_bytes = cache_bytes
        groups = [
            (number, group, file.metadata.row_group(group).num_rows)
            for number, file in enumerate(files)
            for group in range(file.metadata.num_row_groups)
        ]
        self._groups = [(number, group) for number, group, _ in groups]
        self._stops = np.cumsum([rows for *_, rows in groups])
        self._first_rows = np.cumsum([0, *(file.metadata.num_rows for file in files)])
        self._locks = [threading.Lock() for _ in files]
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._held = 0

    def read(self, row: int) -> bytes:
        group = int(np.searchsorted(self._stops, row, side="right"))
        images = self._read_group(group)
        image = images[row - int(self._stops[group]) + len(images)].as_py()
        if image is None:
            raise ImageError("it has no bytes")
        return image

    def _read_group(self, group: int) -> Any:
        number, within = self._groups[group]
        # One thread reads a file at a time; others that need the same group then find it cached.
        with self._locks[number]:
            with self._lock:
                if group in self._cache:
                    self._cache.move_to_end(group)
                    return self._cache[group]
            try:
                images = self._read_images(self._files[number], self._paths[number], within)
            # Corrupt pages raise OSError, ArrowInvalid or ArrowNotImplementedError.
            except Exception as e:
                raise ImageError(f"its row group can't be read ({' '.join(str(e).split())})") from e
            with self._lock:
                self._cache[group] = images
                self._held += images.nbytes
                while self._held > self._cache_bytes and len(self._cache) > 1:
                    _, old = self._cache.popitem(last=False)
                    self._held -= old.nbytes
            return images

    def _read_images(self, file: Any, path: str, group: int) -> Any:
        """Reads the images of a row group, as far as they can be those of its bytes."""
        options = {"row_groups": [group], "batch_size": _BATCH_ROWS}
        table = _read_columns(file, path, [self._column], **options)
        images, rows = table.column(0).combine_chunks(), file.metadata.row_group(group).num_rows
        if len(images) != rows:
            raise ValueError(f"{len(images)} rows; expected {rows}")
        return images.field("bytes") if hasattr(images, "field") else images

    def describe(self, row: int) -> str:
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return f"{self._paths[number]}[{row - int(self._first_rows[number])}]"


class TextColumns:
    """Captions of Parquet files, all of which are read when the first one is needed."""

    def __init__(self, paths: list[str], files: list[Any], *, columns: list[str]):
        self._paths, self._files, self._columns = paths, files, columns
        self._lock = threading.Lock()
        self._table: Any = None

    def __getitem__(self, row: int) -> list[str]:
        with self._lock:
            if self._table is None:
                self._table = self._read()
        values = (self._table.column(column)[row].as_py() for column in self._columns)
        found = (value if isinstance(value, list) else [value] for value in values)
        return [text for texts in found for text in texts if text is not None]

    def _read(self) -> Any:
        import pyarrow as pa

        tables, whole = [], None
        for path, file in zip(self._paths, self._files, strict=True):
            try:
                table = _read_columns(file, path, list(dict.fromkeys(self._columns)))
                if table.num_rows != file.metadata.num_rows:
                    raise ValueError(f"{table.num_rows} rows; expected {file.metadata.num_rows}")
                tables.append(table.cast(_plain(table.schema)))
                whole = pa.concat_tables(tables)
            except (OSError, ValueError, pa.ArrowException) as e:
                reason = " ".join(str(e).split())[:200]
                raise UserError(f"the captions in {path} can't be read: {reason}") from None
        return whole


def _plain(schema: Any) -> Any:
    """The schema of texts that all files share: without dictionaries and small offsets."""
    import pyarrow as pa

    def plain(kind: Any) -> Any:
        several = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        return pa.large_list(pa.large_string()) if several else pa.large_string()

    return pa.schema([(field.name, plain(field.type)) for field in schema])
