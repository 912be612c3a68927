# SPDX-License-Identifier: Apache-2.0
"""Files of Parquet and Arrow whose columns hold images, and the datasets that they make."""

import abc
import collections
import contextlib
import dataclasses
import io
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.data.ops.decode import ImageError
from vit_jax.data.sources.base import Dataset, DatasetInfo, Records, make_splits
from vit_jax.data.sources.files import encode_labels
from vit_jax.data.sources.label_maps import add_label_maps
from vit_jax.data.sources.layout import (
    check_classes,
    drop_unassigned,
    list_few,
    log_cut,
)
from vit_jax.data.sources.ranges import BucketRanges
from vit_jax.utils.bounds import (
    MAX_JSON,
    MAX_WEIGHTS,
    check_growth,
    open_regular,
    parse_json,
)
from vit_jax.utils.errors import UserError, name_file

logger = logging.getLogger(__name__)

# What columns may hold, each with its usual name.
COLUMNS = ("image", "label", "split", "caption", "mask", "depth")
# Bytes of images of the row groups that stay in memory, for all files together.
CACHE_BYTES = 2**30
# A file may have this many rows, and one more for so many bytes: each has an image.
_MIN_ROWS, _ROW_BYTES = 2**16, 16
_BATCH_ROWS = 64
# The columns with captions where no others are named: the first of these that is there.
_CAPTIONS = ("caption", "captions", "text", "texts")
# The last bytes of a stream of Arrow, which a program that was killed has not written.
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
_ARROW_FILE = b"ARROW1"
# Limits of what describes a Parquet file.
_LIMITS: dict[str, Any] = {
    "thrift_string_size_limit": MAX_JSON,
    "thrift_container_size_limit": 2**20,
}
# Bytes at the end of a Parquet file that are asked for first; they describe most files.
_TAIL = 2**16
_READERS = 16  # threads that open files, which mostly wait for a bucket


class Table(abc.ABC):
    """A file whose rows are in groups that are read as a whole.

    Attributes:
      path: of the file.
      schema: its columns, a `pyarrow.Schema`.
      counts: the number of rows of each group.
      group_bytes: bytes that the groups take in memory, all together; 0 if they are mapped.
      remote: whether it is in a bucket; then groups are read in any number of threads.
    """

    path: str
    schema: Any
    counts: Sequence[int]
    group_bytes: int = 0
    remote = False

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return sum(self.counts)

    @abc.abstractmethod
    def read(self, columns: Sequence[str]) -> Any:
        """Reads columns as a `pyarrow.Table`; raises ValueError, OSError or ArrowException."""

    @abc.abstractmethod
    def read_group(self, group: int, column: str) -> Any:
        """Reads a column of a group as a `pyarrow.Array`; raises any error."""

    def ahead(self, group: int, column: str) -> None:  # noqa: B027
        """Starts to read what `read_group` will be called for once."""

    def ahead_columns(self, columns: Sequence[str]) -> None:  # noqa: B027
        """Starts to read what `read` will be called for once."""


class ParquetTable(Table):
    """A Parquet file.

    Raises OSError, ValueError or ArrowException if it can't be one of images.
    """

    def __init__(self, path: str):
        import pyarrow.parquet as pq

        self.path = path
        os.close(open_regular(path, max_bytes=MAX_WEIGHTS))
        self._stored = os.path.getsize(path)
        self._file = pq.ParquetFile(path, memory_map=True, **_LIMITS)
        self._describe(self._file, self._stored)
        check_growth(self._stored, self.group_bytes, path)

    def _describe(self, file: Any, size: int) -> None:
        """Sets the attributes; `size` is about how many bytes the file has."""
        self.schema, metadata = file.schema_arrow, file.metadata
        rows = metadata.num_rows
        # Runs of equal values take no space, but rows with an image each do.
        if rows > _MIN_ROWS + size // _ROW_BYTES:
            raise ValueError(
                f"{self.path}: {rows:,} rows in {size:,} bytes: expected an image in each"
            )
        # Not by columns: pyarrow aborts the process where the description of one is damaged.
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        self.counts = [group.num_rows for group in groups]
        if sum(self.counts) != rows or min(self.counts, default=0) < 0:
            raise ValueError(
                f"{self.path}: {rows:,} rows, and {sum(self.counts):,} in its row groups"
            )
        self.group_bytes = sum(group.total_byte_size for group in groups)

    def read(self, columns: Sequence[str]) -> Any:
        return self._read(columns, self._file, lambda: self._stored)

    def _read(
        self, columns: Sequence[str], file: Any, stored: Callable[[], int], **options: Any
    ) -> Any:
        """Reads columns; `stored` gives the bytes that they are read from."""
        # In batches, since a value that rows share in the file is copied for each of them.
        import pyarrow as pa

        batches, size = [], 0
        for batch in file.iter_batches(columns=list(columns), **options):
            batches.append(batch)
            size += batch.nbytes
            check_growth(stored(), size, self.path)
        return pa.Table.from_batches(batches) if batches else file.read(list(columns))

    def read_group(self, group: int, column: str) -> Any:
        return self._read_group(group, column, self._file, lambda: self._stored)

    def _read_group(self, group: int, column: str, file: Any, stored: Callable[[], int]) -> Any:
        options = {"row_groups": [group], "batch_size": _BATCH_ROWS}
        table = self._read([self._leaf(column)], file, stored, **options)
        values = table.column(0).combine_chunks()
        if len(values) != self.counts[group]:
            raise ValueError(f"{len(values)} rows; expected {self.counts[group]}")
        return values

    def _leaf(self, column: str) -> str:
        """The part of a column that is read: of an image, not its path."""
        import pyarrow as pa

        return f"{column}.bytes" if pa.types.is_struct(self.schema.field(column).type) else column


class BucketParquetTable(ParquetTable):
    """A Parquet file in a bucket.

    Each part of a column that is in one row group is one request, which can be made before it is
    needed. Raises as `ParquetTable`.
    """

    remote = True

    def __init__(self, ranges: BucketRanges, number: int):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self._ranges, self._number = ranges.paths[number], ranges, number
        tail = ranges.read_tail(number, _TAIL)
        size = int.from_bytes(tail[-8:-4], "little")
        if len(tail) < 12 or tail[-4:] != b"PAR1":
            raise ValueError(f"{self.path}: it does not end as a Parquet file does")
        if size + 8 > len(tail):
            if size > MAX_JSON:
                raise ValueError(f"{self.path}: {size:,} bytes describe its row groups")
            tail = ranges.read_tail(number, size + 8)
        # All but the end is missing; places are from the start of the file.
        end = pq.ParquetFile(pa.BufferReader(b"PAR1" + tail[-size - 8 :]), **_LIMITS)
        self._metadata = end.metadata
        self._describe(end, sum(self._group_sizes()))
        self._places: dict[tuple[int, str], tuple[int, int] | None] = {}

    def _group_sizes(self) -> list[int]:
        groups = range(self._metadata.num_row_groups)
        return [self._metadata.row_group(group).total_byte_size for group in groups]

    def _open(self, file: "_RangeFile") -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = pa.PythonFile(file, mode="r")
        # Else parts that are close together are asked for as one, and not as they were announced.
        return pq.ParquetFile(source, metadata=self._metadata, pre_buffer=False, **_LIMITS)

    def _find(self, group: int, leaf: str) -> tuple[int, int] | None:
        """The place of a column in a row group; None if it can't be read.

        It is what pyarrow asks for first; the description of the column is not safe to look at.
        """
        if (group, leaf) not in self._places:
            asked: list[tuple[int, int]] = []

            def note(start: int, stop: int) -> bytes:
                asked.append((start, stop))
                raise OSError("this is all that is asked for")

            with contextlib.suppress(Exception):
                self._open(_RangeFile(note)).read_row_group(group, columns=[leaf])
            self._places[group, leaf] = asked[0] if asked else None
        return self._places[group, leaf]

    def ahead(self, group: int, column: str) -> None:
        self._announce(group, self._leaf(column))

    def _announce(self, group: int, leaf: str) -> None:
        if place := self._find(group, leaf):
            self._ranges.ahead(self._number, *place)

    def ahead_columns(self, columns: Sequence[str]) -> None:
        for group in range(len(self.counts)):
            for column in columns:
                self._announce(group, column)

    def _counting(self) -> "_RangeFile":
        return _RangeFile(lambda start, stop: self._ranges.read(self._number, start, stop))

    def read(self, columns: Sequence[str]) -> Any:
        file = self._counting()
        return self._read(columns, self._open(file), lambda: file.fetched)

    def read_group(self, group: int, column: str) -> Any:
        file = self._counting()
        return self._read_group(group, column, self._open(file), lambda: file.fetched)


class _RangeFile(io.RawIOBase):
    """A file of unknown size for pyarrow, whose parts are read by a function of their places."""

    def __init__(self, read_range: Callable[[int, int], bytes]):
        self._read_range, self._place = read_range, 0
        self.fetched = 0  # bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: MAX_WEIGHTS}
        self._place = starts[whence] + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1, /) -> bytes:
        content = self._read_range(self._place, self._place + size)
        self._place += len(content)
        self.fetched += len(content)
        return content


class ArrowTable(Table):
    """A file of Arrow, a stream or a file with an index, which is mapped into memory.

    Raises OSError, ValueError or ArrowException if it can't be read to its end.
    """

    def __init__(self, path: str):
        import pyarrow as pa

        self.path = path
        number = open_regular(path, max_bytes=MAX_WEIGHTS)
        with open(number, "rb") as file:
            size = os.fstat(number).st_size
            start = file.read(len(_ARROW_FILE))
            file.seek(max(size - len(_ARROW_END), 0))
            end = file.read()
        source = pa.memory_map(path)
        if start == _ARROW_FILE:
            opened = pa.ipc.open_file(source)
            batches = (opened.get_batch(n) for n in range(opened.num_record_batches))
        elif end != _ARROW_END:
            raise ValueError(f"{path}: it was cut, or the program that wrote it was: it has no end")
        else:
            opened = pa.ipc.open_stream(source)
            batches = iter(opened)
        self.schema = opened.schema
        self._batches, taken = [], 0
        for batch in batches:
            taken += batch.nbytes  # More than the file where it is compressed.
            check_growth(size, taken, path)
            self._batches.append(batch)
        self.counts = [batch.num_rows for batch in self._batches]
        if self.num_rows > _MIN_ROWS + size // _ROW_BYTES:
            raise ValueError(
                f"{path}: {self.num_rows:,} rows in {size:,} bytes: expected an image in each"
            )

    def read(self, columns: Sequence[str]) -> Any:
        import pyarrow as pa

        batches = [batch.select(list(columns)) for batch in self._batches]
        schema = pa.schema([self.schema.field(column) for column in columns])
        table = pa.Table.from_batches(batches, schema)
        # What is mapped was not checked, and a wrong offset ends the process.
        table.validate(full=True)
        return table

    def read_group(self, group: int, column: str) -> Any:
        values = self._batches[group].column(column)
        values.validate(full=True)
        return values


def open_bucket(paths: Sequence[str]) -> list[BucketParquetTable]:
    """Opens Parquet files by their URLs; see `ParquetTable` for errors."""
    ranges = BucketRanges(paths)

    def open_object(number: int) -> BucketParquetTable:
        with name_file(paths[number]):
            return BucketParquetTable(ranges, number)

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(open_object, range(len(paths))))


def open_table(path: str, kind: Callable[[str], Table] | None = None) -> Table:
    """Opens a file as `kind`, or else by its ending, `.parquet` or `.arrow`.

    Raises as the classes; errors name the file.
    """
    kind = kind or (ArrowTable if path.endswith(".arrow") else ParquetTable)
    with name_file(path):
        return kind(path)


# Features of the library `datasets`


@dataclasses.dataclass(frozen=True)
class Feature:
    """What the library `datasets` notes of a column.

    Attributes:
      kind: such as `Image`, `ClassLabel` or `Value`.
      names: of the classes of `ClassLabel`, if they are valid.
    """

    kind: str
    names: list[str] | None = None


def parse_features(features: Any) -> dict[str, Feature]:
    """The features by column, from the JSON value that `datasets` writes; none if it is no such."""
    if not isinstance(features, dict):
        return {}
    found = {}
    for column, given in features.items():
        if isinstance(given, list) and len(given) == 1:  # A list is written so too.
            given = given[0]
        if isinstance(given, dict) and given.get("_type") in ("Sequence", "List", "LargeList"):
            given = given.get("feature")
        if isinstance(given, dict):
            names = given.get("names")
            valid = isinstance(names, list) and all(isinstance(name, str) for name in names)
            # Files of other programs lack the type.
            kind = given.get("_type") or ("ClassLabel" if valid else "")
            found[str(column)] = Feature(str(kind), names if valid else None)
    return found


def _read_features(schema: Any) -> dict[str, Feature]:
    """The features in the schema of a file."""
    try:
        return parse_features(parse_json(schema.metadata[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


# Datasets


def make_dataset(
    name: str,
    open_tables: Callable[[], Sequence[Table]],
    *,
    renamed: Mapping[str, str],
    find_splits: Callable[[Sequence[Table]], Sequence[str | None]],
    map_splits: Callable[[set[str]], Mapping[str, str]],
    features: Mapping[str, Feature] | None = None,
) -> Dataset:
    """The dataset of the rows of files.

    Args:
      name: of the dataset.
      open_tables: opens the files in their order.
      renamed: the names of columns by what they hold, see `COLUMNS`, as the user gives them.
      find_splits: the split that each file is, or None; what is in a column `split` comes first.
      map_splits: what the names of splits that are found mean; "" is no split.
      features: of columns, where the files have none.

    Raises:
      UserError: pyarrow is missing, a file can't be read, or a column is invalid.
    """
    key = f"data.name={name!r}"
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(f"{key} needs pyarrow: pip install 'vit_jax[parquet]'") from None
    labels, splits, names = [], [], {}
    several = False
    try:
        tables = open_tables()
        if not tables:
            raise UserError(f"{key} has no files")
        features_of = [{**(features or {}), **_read_features(table.schema)} for table in tables]
        names_of = _find_columns(tables, features_of, renamed, name=name)
        captions = _find_captions(tables, key, names_of)
        for table in tables:
            wanted = (names_of["label"], names_of["split"])
            table.ahead_columns([column for column in wanted if column in table.schema.names])
        for table, split, known in zip(tables, find_splits(tables), features_of, strict=True):
            schema, rows = table.schema, table.num_rows
            _check_schema(table, key, names_of)
            columns = [names_of[c] for c in ("label", "split") if names_of[c] in schema.names]
            with name_file(table.path):
                content = table.read(columns) if columns else None
            if content is not None and content.num_rows != rows:
                raise ValueError(f"{table.path} has {content.num_rows} rows; expected {rows}")
            if content is not None and names_of["label"] in columns:
                feature = known.get(names_of["label"])
                names[table.path] = feature.names if feature else None
                several |= _is_list(schema.field(names_of["label"]).type)
                labels += content.column(names_of["label"]).to_pylist()
            else:
                labels += [None] * rows
            if content is not None and names_of["split"] in columns:
                given = content.column(names_of["split"]).to_pylist()
                splits += ["" if split is None else str(split) for split in given]
            else:
                splits += [split] * rows
    except (OSError, ValueError, pa.ArrowException) as e:  # Bounds raise the first two.
        reason = " ".join(str(e).split())[:200]
        if isinstance(e, OSError) and e.strerror:
            reason = f"{e.filename}: {e.strerror}" if e.filename else e.strerror
        raise UserError(f"{key} can't be read: {reason}") from None
    mapped = [
        kind
        for kind in ("mask", "depth")
        if all(names_of[kind] in table.schema.names for table in tables)
    ]
    if len(given := [*(["label"] if names else []), *mapped]) > 1:
        raise UserError(
            f"{key} has both {' and '.join(names_of[kind] for kind in given)}: expected labels of "
            "images, or masks, or depth: leave a column out by giving it another name, as "
            f"{name.partition(':')[0]}:PATH#{given[-1]}=none"
        )
    if not names and (not (captions or mapped) or "label" in renamed):
        raise _lack("label", tables[0], key, names_of)
    first, class_names = next(iter(names.items()), ("", None))
    for file_path, other in names.items():
        if other != class_names:
            raise UserError(
                f"{key}: {file_path} has other class names than {first}; expected the same in "
                "all files"
            )
    records = RowGroups(tables, column=names_of["image"])
    if names:
        if several:
            labels = [row if isinstance(row, list) else [] for row in labels]
        info, codes = encode_labels(
            labels,
            multi_label=several,
            name=name,
            class_names=class_names,
            describe=lambda row: f"{records.describe(row)} (row {row + 1})",
        )
    else:
        info, codes = DatasetInfo(0, (None, None, 3)), np.zeros(len(labels), np.int32)
    info = dataclasses.replace(info, captions=bool(captions))
    label_maps, folder = None, os.path.dirname(tables[0].path)
    for kind in mapped:
        read = RowGroups(tables, column=names_of[kind]).read
        info, label_maps = add_label_maps(info, kind, read, folder, key=key)
    _check_size(tables, name)
    if None in splits:
        if set(splits) != {None}:
            raise UserError(
                f"{key}: only some of its files are named for a split; expected all, "
                "as in train-0.parquet, or none"
            )
        by_split, cut = make_splits(codes, None), True
    else:
        # The order of the files is kept, so that evaluation reads each row group once.
        split_of = map_splits({str(split) for split in splits})
        array = np.asarray([split_of[str(split)] for split in splits])
        by_split = {s: np.flatnonzero(array == s) for s in sorted(set(split_of.values()))}
        by_split, cut = drop_unassigned(by_split, name=name), False
    check_classes(name, info, codes, by_split)
    texts = TextColumns(tables, columns=captions) if captions else None
    dataset = Dataset(
        name, info, records, codes, by_split, cut=cut, captions=texts, label_maps=label_maps
    )
    log_cut(dataset)
    return dataset


def _lack(what: str, table: Table, key: str, names_of: Mapping[str, str]) -> UserError:
    form = "hf:NAME" if key.startswith("data.name='hf:") else "parquet:PATH"
    return UserError(
        f"{key}: {table.path} has the columns {', '.join(table.schema.names)}; expected "
        f"{names_of[what]} for the {what}: other names are given as in "
        f"{form}#image=img,label=fine_label"
    )


def _find_columns(
    tables: Sequence[Table],
    features: Sequence[Mapping[str, Feature]],
    renamed: Mapping[str, str],
    *,
    name: str,
) -> dict[str, str]:
    """The names of columns by what they hold: as given, or usual, or else by their features.

    Raises `UserError` if several columns may hold the image or the label.
    """
    names_of = {column: column for column in COLUMNS} | dict(renamed)
    there = {column: None for table in tables for column in table.schema.names}
    for what, kind in (("image", "Image"), ("label", "ClassLabel")):
        found = [c for c in there if any(f.get(c, Feature("")).kind == kind for f in features)]
        others = set(names_of.values()) - {what}
        found = [column for column in found if column not in others]
        if what in renamed or not found:
            continue
        if what in there:
            if others := [column for column in found if column != what]:
                logger.info(
                    "%s: the %s is the column %s; columns that are not read: %s",
                    name,
                    what,
                    what,
                    list_few(others),
                )
        elif len(found) == 1:
            names_of[what] = found[0]
        elif what == "image" or not (
            _usual_captions(tables) or {names_of["mask"], names_of["depth"]}.intersection(there)
        ):
            raise UserError(
                f"data.name={name!r} has several columns that may hold the {what}: "
                f"{list_few(found)}; expected one of them by name, as in "
                f"{name}{',' if renamed else '#'}{what}={found[0]}"
            )
    return names_of


def _usual_captions(tables: Sequence[Table]) -> list[str]:
    usual = (c for c in _CAPTIONS if all(_holds_texts(table.schema, c) for table in tables))
    return [column for column, _ in zip(usual, range(1), strict=False)]


def _find_captions(tables: Sequence[Table], key: str, names_of: Mapping[str, str]) -> list[str]:
    """The columns with captions; none if no names are given and no usual one is there.

    Raises `UserError` if a column that is named is missing or does not hold texts.
    """
    if names_of["caption"] == "caption":
        return _usual_captions(tables)
    columns = names_of["caption"].split("+")
    for table in tables:
        for column in columns:
            if column not in table.schema.names:
                raise _lack("caption", table, key, {"caption": column})
            if not _holds_texts(table.schema, column):
                raise UserError(
                    f"{key}: {table.path}: column {column} is {table.schema.field(column).type}; "
                    "expected a text or a list of texts"
                )
    return columns


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _holds_texts(schema: Any, column: str) -> bool:
    import pyarrow as pa

    if schema.names.count(column) != 1:
        return False
    kind = schema.field(column).type
    if _is_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _check_schema(table: Table, key: str, names_of: Mapping[str, str]) -> None:
    import pyarrow as pa

    schema, path = table.schema, table.path

    # Files are also named for their split; labels may be missing in some.
    for what in ("image", *(["split"] if names_of["split"] != "split" else [])):
        if names_of[what] not in schema.names:
            raise _lack(what, table, key, names_of)
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
    if names_of["label"] in schema.names:
        label = schema.field(names_of["label"]).type
        if pa.types.is_struct(label) or pa.types.is_binary(label) or pa.types.is_map(label):
            raise UserError(
                f"{key}: {path}: column {names_of['label']} is {str(label)[:80]}; expected "
                "integers or names of classes"
            )


def _check_size(tables: Sequence[Table], name: str) -> None:
    """Logs that shuffled reading will be slow if the row groups exceed the cache."""
    size = sum(table.group_bytes for table in tables)
    counts = [count for table in tables if table.group_bytes for count in table.counts]
    if size > CACHE_BYTES:
        logger.info(
            "%s: %.1f GB, of which %.1f stay in memory: in a shuffled order most images cost the "
            "read of a row group, here of %d rows on average; smaller ones read faster",
            name,
            size / 1e9,
            CACHE_BYTES / 1e9,
            sum(counts) // len(counts),
        )


class RowGroups(Records):
    """Images of files whose row groups can only be read as a whole.

    The row groups that were used last stay in memory, so that neighbours cost one read. In a
    shuffled order over more than `cache_bytes`, nearly every record costs the read of a row group.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        *,
        column: str = "image",
        cache_bytes: int = CACHE_BYTES,
    ):
        self._tables, self._column = tables, column
        self._cache_bytes = cache_bytes
        self._groups = [
            (number, group) for number, t in enumerate(tables) for group in range(len(t.counts))
        ]
        self._stops = np.cumsum([count for table in tables for count in table.counts])
        self._first_rows = np.cumsum([0, *(table.num_rows for table in tables)])
        locks = [threading.Lock() for _ in tables]
        self._locks = [
            threading.Lock() if tables[number].remote else locks[number]
            for number, _ in self._groups
        ]
        self._announced: set[int] = set()
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
        # One thread reads a local file at a time, or a group of one in a bucket; others that need
        # the same group then find it cached.
        with self._locks[group]:
            with self._lock:
                if group in self._cache:
                    self._cache.move_to_end(group)
                    return self._cache[group]
            try:
                images = self._tables[number].read_group(within, self._column)
                images = images.field("bytes") if hasattr(images, "field") else images
            # Corrupt pages raise OSError, ArrowInvalid or ArrowNotImplementedError.
            except Exception as e:
                raise ImageError(f"its row group can't be read ({' '.join(str(e).split())})") from e
            with self._lock:
                self._announced.discard(group)
                self._cache[group] = images
                self._held += images.nbytes
                while self._held > self._cache_bytes and len(self._cache) > 1:
                    _, old = self._cache.popitem(last=False)
                    self._held -= old.nbytes
            return images

    @property
    def reads_ahead(self) -> bool:
        return any(table.remote for table in self._tables)

    def ahead(self, rows: Sequence[int], *, captions: bool) -> None:
        groups = np.searchsorted(self._stops, rows, side="right")
        for group in dict.fromkeys(groups.tolist()):
            with self._lock:
                if group in self._cache or group in self._announced:
                    continue
                self._announced.add(group)
            number, within = self._groups[group]
            self._tables[number].ahead(within, self._column)

    def describe(self, row: int) -> str:
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return f"{self._tables[number].path}[{row - int(self._first_rows[number])}]"


class TextColumns:
    """Captions of files, all of which are read when the first one is needed."""

    def __init__(self, tables: Sequence[Table], *, columns: list[str]):
        self._tables, self._columns = tables, columns
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

        parts, whole = [], None
        for table in self._tables:
            table.ahead_columns(list(dict.fromkeys(self._columns)))
        for table in self._tables:
            try:
                texts = table.read(list(dict.fromkeys(self._columns)))
                if texts.num_rows != table.num_rows:
                    raise ValueError(f"{texts.num_rows} rows; expected {table.num_rows}")
                parts.append(texts.cast(_plain(texts.schema)))
                whole = pa.concat_tables(parts)
            except (OSError, ValueError, pa.ArrowException) as e:
                reason = " ".join(str(e).split())[:200]
                raise UserError(f"the captions in {table.path} can't be read: {reason}") from None
        return whole


def _plain(schema: Any) -> Any:
    """The schema of texts that all files share: without dictionaries and small offsets."""
    import pyarrow as pa

    def plain(kind: Any) -> Any:
        several = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        return pa.large_list(pa.large_string()) if several else pa.large_string()

    return pa.schema([(field.name, plain(field.type)) for field in schema])
