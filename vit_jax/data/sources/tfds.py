# SPDX-License-Identifier: Apache-2.0
"""TFDS datasets in `array_record` form, which can be read by position and without TensorFlow."""

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
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

import vit_jax.data.datasets  # noqa: F401  (registers the package's own TFDS builders)
from vit_jax.data.sources.base import DatasetInfo, Source, refuse_label, tidy_captions
from vit_jax.data.sources.guess import suggest_name
from vit_jax.data.sources.tfds_features import (
    PixelLabels,
    describe_pixels,
    find_image,
    find_map,
    find_usual_maps,
    split_name,
)
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.suggestions import suggest

_DEFAULT_DIR = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")

# The encoded records of a dataset up to this size are kept in memory.
_KEPT_BYTES = 2**24

_may_prepare = True
# The name of a dataset of the Hugging Face hub, alone or as other programs write it.
_HUB = re.compile(r"(?:(?:hf|hfds|huggingface|datasets)[:/]+)?([\w.-]+/[\w.-]+)")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TfdsDataset:
    """A TFDS dataset, which is prepared on first use of its records.

    Attributes:
      name: with config and version if need be; `#mask=FEATURE` or the like after it chooses the
        features that are read.
      data_dir: where TFDS keeps its datasets; None for its default.
    """

    name: str
    data_dir: str | None

    @property
    def info(self) -> DatasetInfo:
        """Classes, image shape and captions, for which the dataset need not be prepared.

        Raises `UserError` if there is no such dataset, or if it has neither labels nor captions nor
        label maps.
        """
        return _find_layout(self.name, self.data_dir).info

    @property
    def lengths(self) -> dict[str, int]:
        """The number of examples of each split. Prepares the dataset, with TFDS's own reports.

        Raises `UserError` if the dataset can't be prepared or read.
        """
        name, _ = split_name(self.name)
        splits = _open_builder(name, self.data_dir, quiet=False).info.splits
        return {split: info.num_examples for split, info in splits.items()}

    @property
    def folder(self) -> str:
        """The folder with the prepared dataset. Prepares it, like `lengths`."""
        name, _ = split_name(self.name)
        return str(_open_builder(name, self.data_dir, quiet=False).data_dir)

    def open(self, split: str, *, key: str) -> Source:
        """The examples of a split with slices. Prepares the dataset.

        Raises `UserError` if the dataset can't be prepared or read, or has no such split.
        """
        name, _ = split_name(self.name)
        builder = _open_builder(name, self.data_dir, quiet=True)
        try:
            length = builder.info.splits[split].num_examples
        except (ValueError, KeyError, AssertionError, NotImplementedError) as e:
            raise UserError(
                f"{key}={split!r}: {describe_error(e)}; {self.name} has "
                f"{', '.join(builder.info.splits)}"
            ) from None
        if length < 1:
            raise UserError(f"{key}={split!r} of {self.name} holds no examples")
        layout = _find_layout(self.name, self.data_dir)
        decoders = {
            feature: tfds.decode.SkipDecoding()
            for feature, kind in dict(builder.info.features or {}).items()
            if isinstance(kind, tfds.features.Image)
        }
        records = builder.as_data_source(split, decoders=decoders)
        keep = builder.info.dataset_size <= _KEPT_BYTES
        return TfdsSource(
            records,
            name=f"{self.name}:{split}",
            num_classes=layout.info.num_classes,
            keep=keep,
            captions=layout.captions,
            image=layout.image,
            pixels=layout.pixels,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Layout:
    """What is read of a dataset.

    Attributes:
      info: classes, image shape and captions.
      image: the feature with the image.
      captions: the feature with captions, if there are any.
      pixels: the feature that labels each pixel, if it is read.
    """

    info: DatasetInfo
    image: str
    captions: str | None = None
    pixels: PixelLabels | None = None


# The features that are read are logged once.
@functools.cache
def _find_layout(name: str, data_dir: str | None) -> _Layout:
    base, chosen = split_name(name)
    builder, key = _builder(base, data_dir), f"data.name={name!r}"
    features = dict(builder.info.features or {})
    image = find_image(features, chosen, name=name)
    label, captions = features.get("label"), find_captions(features)
    labelled = isinstance(label, tfds.features.ClassLabel)
    found = None
    if image is not None and (chosen.keys() & {"mask", "depth"} or not (labelled or captions)):
        found = find_map(features, chosen, image=image, name=name)
    if image is None or not (labelled or captions or found):
        raise UserError(
            f"{key} has the features {sorted(features)}; expected an 'image', and a class 'label' "
            f"or texts 'captions', or else masks or depths: other names are given as in "
            f"{base}#image=FEATURE,mask=FEATURE"
        )
    image_shape: Any = features[image].shape
    if found:
        kind, feature = found
        folder = str(epath.Path(builder.data_dir).parent)
        pixels = describe_pixels(kind, feature, features[feature], folder, key=key)
        unread = "; its labels are not read" if labelled else ""
        logger.info("%s: the image is %s, and the %s %s%s", name, image, kind, feature, unread)
        info = DatasetInfo(
            0,
            image_shape,
            captions=captions is not None,
            pixel_classes=pixels.values.names if pixels.values else None,
            pixel_depth=kind == "depth",
        )
        return _Layout(info, image, captions, pixels)
    if image != "image":
        logger.info("%s: the image is %s", name, image)
    for kind, feature in find_usual_maps(features, image=image).items():
        other = ",".join(f"{role}={f}" for role, f in (chosen | {kind: feature}).items())
        logger.info("%s: %s is not read; it is the %s of %s#%s", name, feature, kind, base, other)
    if not labelled:
        return _Layout(DatasetInfo(0, image_shape, captions=True), image, captions)
    assert isinstance(label, tfds.features.ClassLabel)
    names = tuple(label.names or ())
    # If a builder gives their number only, TFDS makes names of the labels.
    known = names if names != tuple(map(str, range(len(names)))) else None
    classes = int(label.num_classes or 0)
    info = DatasetInfo(classes, image_shape, known, captions=captions is not None)
    return _Layout(info, image, captions)


# Features that have the captions of an image, by what TFDS calls them in its datasets.
_CAPTIONS = ("captions", "caption", "texts", "text")


def find_captions(features: Mapping[str, Any]) -> str | None:
    """The name of the feature with captions: a text, several, or several features with a `text`."""
    for name in _CAPTIONS:
        feature = features.get(name)
        inner: Any = getattr(feature, "feature", feature)  # of a sequence
        if isinstance(inner, tfds.features.FeaturesDict):
            inner = dict(inner).get("text")
        scalar = isinstance(inner, tfds.features.Tensor) and inner.shape == ()
        if scalar and getattr(inner, "np_dtype", None) == np.dtype(object):
            return name
    return None


def _as_texts(value: Any) -> list[str]:
    """The texts of a feature that `find_captions` found."""
    value = value["text"] if isinstance(value, Mapping) else value
    texts = [value] if isinstance(value, bytes | str) else list(value)
    return [t.decode("utf-8", "replace") if isinstance(t, bytes) else str(t) for t in texts]


class TfdsSource(Source):
    """Records of one split of a TFDS dataset, read from the data source of TFDS.

    With `keep`, records that were read stay in memory: parsing a record takes longer than decoding
    a small image.
    """

    def __init__(
        self,
        records: Any,
        *,
        name: str,
        num_classes: int,
        keep: bool,
        captions: str | None = None,
        image: str = "image",
        pixels: PixelLabels | None = None,
    ):
        self._records, self._name, self._num_classes = records, name, num_classes
        self._image, self._captions, self._pixels = image, captions, pixels
        self._kept: dict[int, dict[str, Any]] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._read(index)
        if self._pixels is None:
            return record
        # Label maps are kept as they are stored, since they may be much smaller so.
        return record | {"label_map": self._pixels.decode(record["label_map"])}

    def _read(self, index: int) -> dict[str, Any]:
        """A record with its label map as it is stored."""
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        found = self._records[index]
        record = {"image": found[self._image]}
        if self._pixels is not None:
            record["label_map"] = found[self._pixels.feature]
        if self._num_classes:
            label = int(found["label"])
            # Labels are stored with the images, so that each is known when it is read.
            if not 0 <= label < self._num_classes:
                refuse_label(label, self.describe(index), self._num_classes)
            record["label"] = np.int32(label)
        if self._captions:
            record["text"] = tidy_captions(_as_texts(found[self._captions]))
        if self._kept is not None:
            self._kept[index] = record
        return record

    def describe(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def file_name(self, index: int) -> str:
        name = self._records[index].get("file_name", self.describe(index))
        return name.decode() if isinstance(name, bytes) else str(name)


class NotPreparedError(UserError):
    """A dataset is not prepared, and must not be now."""


def may_prepare() -> bool:
    """Whether datasets may be prepared or downloaded now."""
    return _may_prepare


@contextlib.contextmanager
def preparing_nothing() -> Iterator[None]:
    """Lets the use of a dataset that is not prepared raise `NotPreparedError`, in this process."""
    global _may_prepare
    before, _may_prepare = _may_prepare, False
    try:
        yield
    finally:
        _may_prepare = before


def is_builder(value: Any) -> bool:
    """Whether a value is a class of builders, which TFDS then finds by its `name`."""
    return isinstance(value, type) and issubclass(value, tfds.core.DatasetBuilder)


def has_folder(name: str, data_dir: str | None) -> bool:
    """Whether the folder of TFDS's datasets has one for a name, or for its namespace."""
    return (epath.Path(data_dir or _DEFAULT_DIR).expanduser() / _base(name)).exists()


def _base(name: str) -> str:
    return re.split("[/:]", name)[0]


@functools.cache
def _builder(name: str, data_dir: str | None) -> Any:  # TFDS has no useful types.
    base = _base(name)
    known = tfds.list_builders(with_community_datasets=False)
    # For an unknown name, TFDS searches other places, for which it needs TensorFlow.
    if base not in known and not has_folder(name, data_dir):
        hint = suggest_name(name) if os.path.exists(name) else suggest(base, known)[:200]
        hub = _HUB.fullmatch(name)
        if hub and not os.path.exists(name) and "did you mean" not in hint:
            hint = f"; one of the Hugging Face hub is written as 'hf:{hub[1]}'"
        raise UserError(f"data.name={name!r} is no TFDS dataset{hint}")
    try:
        with _asking_no_bucket():
            return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except Exception as e:
        raise UserError(f"data.name={name!r} can't be opened by TFDS: {describe_error(e)}") from e


@contextlib.contextmanager
def _asking_no_bucket() -> Iterator[None]:
    """Keeps a builder of a dataset that is not prepared from looking for its sizes in a bucket.

    TFDS does so in a temporary folder, which it leaves behind even where it has no access.
    """
    info: Any = tfds.core.DatasetInfo
    initialize = info.initialize_from_bucket
    info.initialize_from_bucket = lambda self: None
    try:
        yield
    finally:
        info.initialize_from_bucket = initialize


def _open_builder(name: str, data_dir: str | None, *, quiet: bool) -> Any:
    """The builder of a dataset, which is prepared if it was not before."""
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        _prepare(builder, quiet=quiet)
    if not builder.info.splits:
        # Another process prepared it since this builder was made, which reads splits only then.
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
    if not _may_prepare:
        raise NotPreparedError(where)
    _check_hosts(builder, where)
    logger.info("preparing dataset %s in %s", builder.name, builder.data_dir)
    try:
        with contextlib.ExitStack() as stack:
            # The output of TFDS is useful during downloads, and noise in a run otherwise.
            if quiet and not builder.url_infos:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            builder.download_and_prepare(file_format="array_record")
    except Exception as e:
        # Another process may have finished the same work first.
        if isinstance(e, OSError) and os.path.exists(builder.data_dir):
            return
        reason = f"preparing it failed ({describe_error(e)}); set"
        if _lacks_tensorflow(e):
            reason = (
                "its builder needs TensorFlow: where that is installed, run tfds build "
                f"{builder.name} --file_format=array_record, then set"
            )
        raise UserError(f"{where}, and {reason} data.data_dir to where it is") from e


def _lacks_tensorflow(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ImportError) and "tensorflow" in str(error.name or error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_hosts(builder: Any, where: str) -> None:
    """Fails at once if a host can't be reached, where TFDS would retry for minutes."""
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
