# SPDX-License-Identifier: Apache-2.0
"""Datasets by name, read by position.

`folder:PATH`, `pairs:PATH`, `masks:PATH`, `depth:PATH`, `manifest:PATH`, `parquet:PATH` and
`tar:PATTERN` are of users, `hf:OWNER/NAME` is of the Hugging Face hub, `packed:PATH` and `raw:PATH`
are packed copies of a dataset, `blank:CLASSES`, `digits_masks:SIZE` and `digits_depth:SIZE` are
generated; any other name is that of a TFDS dataset in `array_record` form. `digits` and
`digits_captions` come with the package.
`my_module:attribute` is a dataset from outside of it.
"""

import contextlib
import difflib
import functools
import importlib.util
import sys
from collections.abc import Callable

from vit_jax.data.ops.decode import ImageError
from vit_jax.data.sources.base import Dataset, DatasetInfo, NoLabelError, Source
from vit_jax.data.sources.blank import blank_dataset
from vit_jax.data.sources.files import folder_dataset, manifest_dataset, pairs_dataset
from vit_jax.data.sources.guess import find_foreign_scheme, is_path, suggest_name
from vit_jax.data.sources.hub import hub_dataset
from vit_jax.data.sources.masks import depth_dataset, masks_dataset
from vit_jax.data.sources.packed import packed_dataset, raw_dataset
from vit_jax.data.sources.parquet import parquet_dataset
from vit_jax.data.sources.scenes import depth_scenes_dataset, scenes_dataset
from vit_jax.data.sources.tar import tar_dataset
from vit_jax.data.sources.tfds import TfdsDataset, has_folder, is_builder
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import import_part, is_part

# Prefixes of a name, each with a function from the rest of the name to the dataset.
KINDS: dict[str, Callable[[str], Dataset]] = {
    "blank": blank_dataset,
    "depth": depth_dataset,
    "digits_depth": depth_scenes_dataset,
    "digits_masks": scenes_dataset,
    "folder": folder_dataset,
    "hf": hub_dataset,
    "manifest": manifest_dataset,
    "masks": masks_dataset,
    "pairs": pairs_dataset,
    "parquet": parquet_dataset,
    "packed": packed_dataset,
    "raw": raw_dataset,
    "tar": tar_dataset,
}


def find_dataset(name: str, *, data_dir: str | None) -> Dataset | TfdsDataset:
    """The dataset of a name.

    Args:
      name: of a TFDS dataset, or one of `KINDS` with a path; or the name of a part with or without
        a text after another colon: a TFDS builder, or a function from that text to a `Dataset`.
      data_dir: where TFDS keeps its datasets; None for its default.

    Raises:
      UserError: the path is missing, or has no such dataset.
    """
    kind, colon, path = name.partition(":")
    if is_part(":".join(name.partition("#")[0].split(":")[:2])) and kind not in KINDS:
        # TFDS has names with a colon too, those of datasets of a community.
        module_exists = _has_module(kind)
        if not module_exists and has_folder(name, data_dir):
            return TfdsDataset(name, data_dir)
        try:
            return _find_outside(name, data_dir)
        except UserError as e:
            other = "" if module_exists else f"; and {name} is no TFDS dataset in data.data_dir"
            raise UserError(f"{e}{other}{_suggest_kind(kind, path)}") from e
    if not colon or kind not in KINDS:
        given = path if colon and "://" not in name else name
        hint = suggest_name(given) if is_path(given) else _suggest_kind(kind, path)
        if hint:
            raise UserError(f"data.name={name!r} is no name of a dataset{hint}")
        return TfdsDataset(name, data_dir)
    if not path:
        raise UserError(f"data.name={name!r}: expected {kind}:PATH")
    # A manifest and the hub have texts of their own.
    if kind not in ("manifest", "hf") and find_foreign_scheme(path):
        raise UserError(f"data.name={name!r} can't be read{suggest_name(path)}")
    return KINDS[kind](path)


def _suggest_kind(kind: str, path: str) -> str:
    """Returns a hint for a misspelled prefix, such as `Folder:PATH`; else an empty text."""
    near = difflib.get_close_matches(kind.lower(), KINDS, n=1)
    return f"; did you mean '{near[0]}:{path}'?" if path and near else ""


def _has_module(name: str) -> bool:
    """Whether the top-level package of a module is there, which is not imported."""
    top = name.partition(".")[0]
    return top in sys.modules or importlib.util.find_spec(top) is not None


@functools.cache
def _find_outside(name: str, data_dir: str | None) -> Dataset | TfdsDataset:
    module, attribute, *text = name.split(":", 2)
    attribute, mark, features = attribute.partition("#")
    part = import_part(f"{module}:{attribute}", key="data.name", gives=(Dataset,))
    if is_builder(part.imported):
        return TfdsDataset(f"{part.name}{mark}{features}", data_dir)
    if mark:
        raise UserError(
            f"data.name={name!r}: expected {module}:{attribute} alone, as only features of TFDS "
            "builders are chosen"
        )
    return part(*text)


def dataset_info(name: str, *, data_dir: str | None) -> DatasetInfo:
    """Classes and image shape. A TFDS dataset need not be prepared for it; others are listed.

    Raises:
      UserError: no such dataset, or one that is not for classification.
    """
    return find_dataset(name, data_dir=data_dir).info


def find_labelled(dataset: Dataset | TfdsDataset) -> tuple[dict[str, int], list[NoLabelError]]:
    """The lengths of the splits of a dataset that have labels, and an error for each other one.

    Raises `UserError` for another fault of a split, and `NoLabelError` if none has labels.
    """
    found, errors = {}, []
    for split, length in dataset.lengths.items():
        try:
            if length:
                source = dataset.open(split, key="split")
                with contextlib.suppress(ImageError):
                    source[0]  # A source may learn labels only from the records.
            found[split] = length
        except NoLabelError as e:
            errors.append(e)
    if errors and not any(found.values()):
        raise errors[-1]
    return found, errors


def open_source(name: str, split: str, *, data_dir: str | None, key: str) -> Source:
    """Opens a split, preparing a TFDS dataset first if that was never done.

    Args:
      name: of a TFDS dataset, or one of `KINDS` with a path.
      split: with slices, such as `train[:98%]`.
      data_dir: where TFDS keeps its datasets; None for its default.
      key: the config key of `split`, for errors.

    Raises:
      UserError: the dataset can't be prepared or read, or has no such split.
    """
    return find_dataset(name, data_dir=data_dir).open(split, key=key)
