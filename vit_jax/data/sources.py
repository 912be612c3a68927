# SPDX-License-Identifier: Apache-2.0
"""Datasets by name, read by position.

Any TFDS dataset in `array_record` form is a source; `digits` comes with the package.
"""

import contextlib
import dataclasses
import functools
import io
import logging
import os
import re
import socket
import urllib.parse
import urllib.request
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

import vit_jax.data.datasets  # noqa: F401  (registers the package's own TFDS builders)
from vit_jax.utils.errors import UserError, suggest

_DEFAULT_DIR = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")

# A dataset up to this size is kept in memory, encoded.
_KEPT_BYTES = 2**24

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset before it is read."""

    num_classes: int
    image_shape: tuple[int | None, ...]


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
        raise UserError(f"data.name={name!r} can't be opened by TFDS: {_one_line(e)}") from e


def dataset_info(name: str, *, data_dir: str | None) -> DatasetInfo:
    """Classes and image shape of a TFDS dataset, which need not be prepared for it.

    Raises:
      UserError: no such dataset, or one that is not for classification.
    """
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
    return DatasetInfo(num_classes=int(label.num_classes or 0), image_shape=image_shape)


class Source:
    """Records of one split by position: `{"image": encoded bytes, "label": int}`.

    Args:
      records: of TFDS.
      keep: whether records stay in memory once they were read. Parsing one takes longer than
        decoding a small image.
    """

    def __init__(self, records: Any, *, keep: bool):
        self._records = records
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


def open_source(name: str, split: str, *, data_dir: str | None, key: str) -> Source:
    """Opens a split, preparing the dataset first if that was never done.

    Args:
      name: of a TFDS dataset.
      split: TFDS split with slices, such as `train[:98%]`.
      data_dir: where TFDS keeps its datasets; None for its default.
      key: where `split` stands in the config, for errors.

    Raises:
      UserError: the dataset can't be prepared, or has no such split.
    """
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        _prepare(builder)
    if not builder.info.splits:
        # Prepared by another process since: a builder reads what there is only when it is made.
        _builder.cache_clear()
        builder = _builder(name, data_dir)
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"data.name={name!r} is prepared in {builder.data_dir} as "
            f"{builder.info.file_format.value}; expected array_record: prepare it again with "
            "file_format='array_record'"
        )
    try:
        length = builder.info.splits[split].num_examples
    except (ValueError, KeyError, AssertionError) as e:
        raise UserError(
            f"{key}={split!r}: {_one_line(e)}; {name} has {', '.join(builder.info.splits)}"
        ) from None
    if not length:
        raise UserError(f"{key}={split!r} of {name} holds no examples")
    decoders = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_data_source(split, decoders=decoders)
    return Source(records, keep=builder.info.dataset_size <= _KEPT_BYTES)


def _prepare(builder: Any) -> None:
    where = f"data.name={builder.name!r} is not prepared in {builder.data_dir}"
    _check_hosts(builder, where)
    logger.info("preparing dataset %s in %s", builder.name, builder.data_dir)
    # TFDS reports on downloads; where there are none, its words are noise.
    quiet = contextlib.nullcontext() if builder.url_infos else _silent()
    try:
        with quiet:
            builder.download_and_prepare(file_format="array_record")
    except Exception as e:
        # Another process may have finished the same work first.
        if not (isinstance(e, OSError) and os.path.exists(builder.data_dir)):
            raise UserError(
                f"{where}, and preparing it failed ({_one_line(e)}); set data.data_dir to where it "
                "is"
            ) from e


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


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
