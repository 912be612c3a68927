# SPDX-License-Identifier: Apache-2.0
"""Folders of images and of masks that give the class of each pixel."""

import functools
import logging
import os
import unicodedata

import numpy as np

from vit_jax.data.sources.base import Dataset, DatasetInfo, make_splits
from vit_jax.data.sources.files import Files, list_images
from vit_jax.data.sources.label_maps import Masks, read_values
from vit_jax.data.sources.layout import find_split, list_few, log_cut, map_splits
from vit_jax.utils.errors import UserError, describe_error

# Names of the folders, as in ADE20k and Pascal VOC, in lower case.
_IMAGES = ("images", "image", "jpegimages")
_MASKS = ("masks", "mask", "annotations", "labels", "segmentationclass")

logger = logging.getLogger(__name__)


@functools.cache
def masks_dataset(path: str) -> Dataset:
    """A dataset of `PATH/images/x.jpg` with `PATH/masks/x.png` and `PATH/classes.txt`.

    `images` and `masks` (or `annotations`) may have folders for splits, or be in folders for
    splits; without any, `make_splits` cuts the images. Below, an image and its mask have the same
    path but for the ending. Images without a mask are left out. See `read_values` for classes.

    Raises:
      UserError: the folder can't be read, or has no such pairs.
    """
    name = f"masks:{path}"
    key = f"data.name={name!r}"
    if "://" in path:
        raise UserError(
            f"{key}: expected a local folder; mount the bucket, or list its images in a manifest"
        )
    root = os.path.abspath(os.path.expanduser(path))
    images, masks = (_list(root, names, key=key) for names in (_IMAGES, _MASKS))
    if not images or not masks:
        lacks = " or ".join(("images",) * (not images) + ("masks",) * (not masks))
        raise UserError(
            f"{key} has no {lacks}: expected images/x.jpg and masks/x.png in {root}, in these "
            "folders or beside each other in train, validation and test"
        )
    values = read_values(root, key=key)
    if alone := sorted(images.keys() - masks.keys()):
        paths = [images[stem] for stem in alone]
        few = list_few(paths)
        logger.info("%s: left out %s images without a mask: %s", name, f"{len(alone):,}", few)
    if alone := sorted(masks.keys() - images.keys()):
        paths = [masks[stem] for stem in alone]
        few = list_few(paths)
        logger.info("%s: left out %s masks without an image: %s", name, f"{len(alone):,}", few)
    stems = sorted(images.keys() & masks.keys(), key=lambda s: (unicodedata.normalize("NFC", s), s))
    if not stems:
        raise UserError(
            f"{key} has {len(images):,} images and {len(masks):,} masks, and none of the same "
            f"name: expected images/x.jpg and masks/x.png, and has {next(iter(images.values()))} "
            f"and {next(iter(masks.values()))}"
        )
    tops = [stem.partition("/")[0] if "/" in stem else "" for stem in stems]
    split_of = {top: split for top in set(tops) if (split := find_split(top))}
    if split_of and len(split_of) < len(set(tops)):
        other = next(stem for stem, top in zip(stems, tops, strict=True) if top not in split_of)
        raise UserError(
            f"{key} holds {next(iter(split_of))} and {images[other]}: expected folders of splits "
            "alone (train, test, validation), or none of them"
        )
    if split_of:
        map_splits(split_of, key=key)
    labels = np.zeros(len(stems), np.int32)
    splits = make_splits(labels, [split_of[top] for top in tops] if split_of else None)
    files = Files(root, [masks[stem] for stem in stems])
    dataset = Dataset(
        name,
        DatasetInfo(0, (None, None, 3), pixel_classes=values.names),
        Files(root, [images[stem] for stem in stems]),
        labels,
        splits,
        cut=not split_of,
        label_maps=Masks(files.read, values),
    )
    log_cut(dataset)
    return dataset


def _list(root: str, names: tuple[str, ...], *, key: str) -> dict[str, str]:
    """Paths of images relative to the root, by `SPLIT/REST` without the ending, or `REST`.

    Raises `UserError` if the folder can't be read, or if two images differ in their ending only.
    """
    found: dict[str, str] = {}
    try:
        for top in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
            below = [""] if top.lower() in names else []
            if find_split(top):
                folders = (e.name for e in os.scandir(os.path.join(root, top)) if e.is_dir())
                below = sorted(folder for folder in folders if folder.lower() in names)
            for folder in below:
                start = os.path.join(top, folder) if folder else top
                for path in list_images(root, os.path.join(root, start))[0]:
                    rest = os.path.splitext(os.path.relpath(path, start))[0]
                    stem = f"{top}/{rest}" if folder else rest
                    if stem in found:
                        raise UserError(f"{key}: {found[stem]} and {path}: expected one of them")
                    found[stem] = path
    except OSError as e:
        raise UserError(f"{key} can't be read: {describe_error(e)}") from None
    return found
