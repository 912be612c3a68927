# SPDX-License-Identifier: Apache-2.0
"""Suggests the name of a dataset for a path that was given in its place, by what is there."""

import os
import re

from vit_jax.data.sources.packed import MANIFEST
from vit_jax.utils.buckets import SCHEMES

_TABLES = (".csv", ".tsv", ".jsonl")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
# Files of a folder of `save_to_disk` of the library `datasets`.
_SAVED = {"dataset_dict.json", "state.json"}
# Datasets of the Hugging Face hub as its page, or its libraries, name them.
_HUB = re.compile(r"(?:https?://huggingface\.co/|hf://)datasets/([\w.-]+(?:/[\w.-]+)?)")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LISTED = 1000  # entries of a folder that are looked at


def is_path(name: str) -> bool:
    """Whether the name of a dataset can only be meant as a path or a URL."""
    starts = ("/", "~", ".", "file:", "gs://", "s3://", "hf://", "http://", "https://")
    return name.startswith(starts) or name.lower().endswith((*_TABLES, ".parquet", *_ARCHIVES))


def find_foreign_scheme(path: str) -> str:
    """Returns the scheme of a URL that is not read, such as `http://`; empty for other paths."""
    found = _SCHEME.match(path)
    return found[0] if found and found[0] not in SCHEMES else ""


def suggest_name(path: str, *, besides: str | None = None) -> str:
    """Returns a hint to append to an error, such as ``"; did you mean 'folder:/data/birds'?"``.

    Args:
      path: that was given.
      besides: the kind that was tried; it is not suggested. None if there was none.

    Returns:
      The hint; empty if nothing better is known.
    """
    path = path.removeprefix("file://").removeprefix("file:")
    where, ending = os.path.expanduser(path), os.path.splitext(path)[1].lower()
    if found := _HUB.match(path):
        return f"; did you mean 'hf:{found[1]}'?"
    if scheme := find_foreign_scheme(path):
        return (
            f"; {scheme} is not read: download the files, and give their path here, or "
            "gs://BUCKET/PATH or s3://BUCKET/PATH"
        )
    if ending == ".tar" or ("{" in path and ".tar" in path):
        return "" if besides == "tar" else f"; did you mean 'tar:{path}'?"
    if ending in _ARCHIVES:
        return "; an archive is not read as it is: unpack it, and give folder:FOLDER"
    if ending in _TABLES:
        kind = "manifest"
    elif ending == ".parquet":
        kind = "parquet"
    elif "://" in path:
        return (
            "; expected packed:URL, tar:URL, parquet:URL, or images listed in a table: "
            "manifest:TABLE.csv"
        )
    elif os.path.isdir(where):
        kind = _look_into(where)
    elif os.path.exists(where):
        return "; it is a file: expected folder:FOLDER, with a folder for each class"
    else:
        missing = "; there is no such file or folder; a folder of images is written as"
        return "" if besides else f"{missing} 'folder:{path}'"
    if kind == "hf" and not path.startswith(("/", ".", "~")):
        path = f"./{path}"  # Without it, it is the name of a repository.
    return "" if kind == besides else f"; did you mean '{kind}:{path}'?"


def _look_into(folder: str) -> str:
    """The kind of source that a folder is."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_LISTED), strict=False)]
    except OSError:
        return "folder"
    if MANIFEST in names:
        return "raw" if any(name.endswith(".pixels") for name in names) else "packed"
    if _SAVED & set(names):
        return "hf"
    if any(name.endswith(".parquet") for name in names):
        return "parquet"
    if any(name.endswith(".tar") for name in names):
        return "tar"
    texts = {os.path.splitext(name)[0] for name in names if name.lower().endswith(".txt")}
    images = (os.path.splitext(name)[0] for name in names if name.lower().endswith(_IMAGES))
    return "folder" if texts.isdisjoint(images) else "pairs"
