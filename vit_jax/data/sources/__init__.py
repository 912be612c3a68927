# SPDX-License-Identifier: Apache-2.0
"""Datasets by name, read by position.

`folder:PATH`, `manifest:PATH` and `parquet:PATH` are the user's own, `packed:PATH` and `raw:PATH`
what was packed of another dataset, `blank:CLASSES` is made up; any other name is that of a TFDS
dataset in `array_record` form. `digits` comes with the package.
"""

import contextlib
import functools
import io
import logging
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

import vit_jax.data.datasets  # noqa: F401  (registers the package's own TFDS builders)
from vit_jax.data.sources.base import Dataset, DatasetInfo, Source
from vit_jax.data.sources.blank import blank_dataset
from vit_jax.data.sources.files import folder_dataset, manifest_dataset
from vit_jax.data.sources.packed import packed_dataset, raw_dataset
from vit_jax.data.sources.parquet import parquet_dataset
from vit_jax.utils.errors import UserError, describe_error, suggest

_DEFAULT_DIR = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")

# A dataset up to this size is kept in memory, encoded.
_KEPT_BYTES = 2**24

# What a name starts with, before a colon and a path.
KINDS: dict[str, Callable[[str], Dataset]] = {
    "blank": blank_dataset,
    "folder": folder_dataset,
    "manifest": manifest_dataset,
    "parquet": parquet_dataset,
    "packed": packed_dataset,
    "raw": raw_dataset,
}

logger = logging.getLogger(__name__)


@functools.cache
def _builder(name: str, data_dir: str | None) -> Any:  # types of TFDS are of little help
    base = re.split("[/:]", name)[0]
    known = tfds.list_builders(with_community_datasets=False)
    folder = epath.Path(data_dir or _DEFAULT_DIR).expanduser() / base
    # TFDS looks further afield for a name it does not know, and needs TensorFlow for that.
    if base not in known and not folder.exists():
        raise UserError(f"data.name={name!r} is no TFDS dataset{suggest(base, known)[:200]}")
    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except Exception as e:
        raise UserError(f"data.name={name!r} can't be opened by TFDS: {describe_error(e)}") from e


def _dataset(name: str) -> Dataset | None:
    """The dataset of a name with a path in it; None for a name of TFDS."""
    kind, colon, path = name.partition(":")
    if not colon or kind not in KINDS:
        return None
    if not path:
        raise UserError(f"data.name={name!r}: expected {kind}:PATH")
    return KINDS[kind](path)


def dataset_info(name: str, *, data_dir: str | None) -> DatasetInfo:
    """Classes and image shape. A TFDS dataset need not be prepared for it; others are listed.

    Raises:
      UserError: no such dataset, or one that is not for classification.
    """
    if dataset := _dataset(name):
        return dataset.info
    features = dict(_builder(name, data_dir).info.features or {})
    image, label = features.get("image"), features.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        raise UserError(
            f"data.name={name!r} has the features {sorted(features)}; expected an 'image' and a "
            "class 'label'"
        )
    image_shape: Any = image.shape
    names = tuple(label.names or ())
    # Where it was only told their number, TFDS makes names of the labels.
    known = names if names != tuple(map(str, range(len(names)))) else None
    return DatasetInfo(int(label.num_classes or 0), image_shape, known)


class TfdsSource(Source):
    """Records of one split of a TFDS dataset.

    Args:
      records: of TFDS.
      name: of dataset and split, to name a record.
      keep: whether records stay in memory once they were read. Parsing one takes longer than
        decoding a small image.
    """

    def __init__(self, records: Any, *, name: str, keep: bool):
        self._records, self._name = records, name
        self._kept: dict[int, dict[str, Any]] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        record = self._records[index]
        record = {"image": record["image"], "label": np.int32(record["label"])}
        if self._kept is not None:
            self._kept[index] = record
        return record

    def describe(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def file_name(self, index: int) -> str:
        name = self._records[index].get("file_name", self.describe(index))
        return name.decode() if isinstance(name, bytes) else str(name)


def open_source(name: str, split: str, *, data_dir: str | None, key: str) -> Source:
    """Opens a split, preparing a TFDS dataset first if that was never done.

    Args:
      name: of a TFDS dataset, or one of `KINDS` with a path.
      split: with slices, such as `train[:98%]`.
      data_dir: where TFDS keeps its datasets; None for its default.
      key: where `split` stands in the config, for errors.

    Raises:
      UserError: the dataset can't be prepared or read, or has no such split.
    """
    if dataset := _dataset(name):
        return dataset.open(split, key=key)
    builder = _open_builder(name, data_dir, quiet=True)
    try:
        length = builder.info.splits[split].num_examples
    except (ValueError, KeyError, AssertionError, NotImplementedError) as e:
        raise UserError(
            f"{key}={split!r}: {describe_error(e)}; {name} has {', '.join(builder.info.splits)}"
        ) from None
    if length < 1:
        raise UserError(f"{key}={split!r} of {name} holds no examples")
    decoders = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_data_source(split, decoders=decoders)
    keep = builder.info.dataset_size <= _KEPT_BYTES
    return TfdsSource(records, name=f"{name}:{split}", keep=keep)


def split_lengths(name: str, *, data_dir: str | None) -> dict[str, int]:
    """The number of examples of each split. Prepares a TFDS dataset if that was never done.

    Raises:
      UserError: the dataset can't be prepared or read.
    """
    if dataset := _dataset(name):
        return {split: len(rows) for split, rows in dataset.splits.items()}
    builder = _open_builder(name, data_dir, quiet=False)
    return {split: info.num_examples for split, info in builder.info.splits.items()}


def prepare(name: str, *, data_dir: str | None) -> tuple[str, dict[str, int]]:
    """Prepares a TFDS dataset if that was never done.

    Returns:
      The folder that it is in, and the number of examples of each split.

    Raises:
      UserError: it can't be prepared, or needs no preparation.
    """
    if name.partition(":")[0] in KINDS:
        raise UserError(f"{name!r} is read as it is: only datasets of TFDS have to be prepared")
    lengths = split_lengths(name, data_dir=data_dir)
    return str(_open_builder(name, data_dir, quiet=False).data_dir), lengths


def _open_builder(name: str, data_dir: str | None, *, quiet: bool) -> Any:
    """The builder of a dataset that is prepared, after this if it was not before."""
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        _prepare(builder, quiet=quiet)
    if not builder.info.splits:
        # Prepared by another process since: a builder reads what there is only when it is made.
        _builder.cache_clear()
        builder = _builder(name, data_dir)
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        found = epath.Path(builder.data_dir)
        base = found.parents[len(found.parts) - found.parts.index(builder.name) - 1]
        moved = base.with_name(f"{base.name}_array_record")
        raise UserError(
            f"data.name={name!r} is prepared in {found} as {builder.info.file_format.value}; "
            "expected array_record: where TensorFlow is installed, run tfds convert_format "
            f"--dataset_version_dir={found} --out_file_format=array_record "
            f"--out_dir={moved / found.relative_to(base)}, then set data.data_dir={moved}"
        )
    return builder


def _prepare(builder: Any, *, quiet: bool) -> None:
    where = f"data.name={builder.name!r} is not prepared in {builder.data_dir}"
    _check_hosts(builder, where)
    logger.info("preparing dataset %s in %s", builder.name, builder.data_dir)
    # TFDS reports on downloads; where there are none, its words are noise in a run.
    silent = quiet and not builder.url_infos
    try:
        with _silent() if silent else contextlib.nullcontext():
            builder.download_and_prepare(file_format="array_record")
    except Exception as e:
        # Another process may have finished the same work first.
        if not (isinstance(e, OSError) and os.path.exists(builder.data_dir)):
            if _lacks_tensorflow(e):
                raise UserError(
                    f"{where}, and its builder needs TensorFlow: where that is installed, run tfds "
                    f"build {builder.name} --file_format=array_record, then set data.data_dir to "
                    "where it is"
                ) from e
            raise UserError(
                f"{where}, and preparing it failed ({describe_error(e)}); set data.data_dir to "
                "where it is"
            ) from e


def _lacks_tensorflow(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ImportError) and "tensorflow" in str(error.name or error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_hosts(builder: Any, where: str) -> None:
    """Without a network TFDS would retry for minutes: find out in a moment."""
    if urllib.request.getproxies():
        return
    for host in {urllib.parse.urlsplit(url).hostname for url in builder.url_infos or ()}:
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            raise UserError(
                f"{where}, and {host} can't be reached to download it; set data.data_dir to where "
                "it is"
            ) from None


@contextlib.contextmanager
def _silent():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def placeholder(shape: tuple[int | None, ...], fill: tuple[int, int]) -> bytes:
    """An encoded image of this shape, or of `fill` where a side varies: to try operations on."""
    height, width = (side or other for side, other in zip(shape[:2], fill, strict=True))
    return cv2.imencode(".png", np.zeros((height, width, 3), np.uint8))[1].tobytes()
