# SPDX-License-Identifier: Apache-2.0
"""Datasets in Parquet files, in the layout of the Hugging Face Hub."""

import functools
import os
import re
from collections.abc import Sequence

from vit_jax.data.sources.base import Dataset
from vit_jax.data.sources.columns import split_columns
from vit_jax.data.sources.guess import suggest_name
from vit_jax.data.sources.layout import find_split, map_splits
from vit_jax.data.sources.ranges import find_files, is_remote
from vit_jax.data.sources.tables import (
    COLUMNS,
    ParquetTable,
    Table,
    make_dataset,
    open_bucket,
    open_table,
)
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import find_paths


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
    path, renamed = split_columns(text, COLUMNS)
    where = path if is_remote(path) else os.path.expanduser(path)
    pattern = os.path.join(where, "**", "*.parquet") if os.path.isdir(where) else where

    def open_tables() -> Sequence[Table]:
        try:
            remote = is_remote(path)
            paths = find_files(pattern, ending=".parquet") if remote else find_paths(pattern)
        except UserError as e:
            raise UserError(f"{key}: {e}") from None
        if not paths:
            hint = suggest_name(path, besides="parquet")
            raise UserError(f"{key}: there are no files {pattern}{hint}")
        return (
            open_bucket(paths) if is_remote(path) else [open_table(p, ParquetTable) for p in paths]
        )

    return make_dataset(
        name,
        open_tables,
        renamed=renamed,
        find_splits=lambda tables: [_split_of(table.path) for table in tables],
        map_splits=functools.partial(map_splits, key=key),
    )


def _split_of(path: str) -> str | None:
    word = re.split(r"[-_.]", os.path.basename(path))[0]
    words = (word, os.path.basename(os.path.dirname(path)))
    return next((word for word in words if find_split(word)), None)
