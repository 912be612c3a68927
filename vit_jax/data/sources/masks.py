# SPDX-License-Identifier: Apache-2.0
"""Folders of images and of masks or depth images, which label each pixel."""

import functools
import logging
import os
import unicodedata

import numpy as np

from vit_jax.data.sources.base import Dataset, DatasetInfo, make_splits
from vit_jax.data.sources.files import ENDINGS, Files, list_images
from vit_jax.data.sources.label_maps import DEPTH_ENDINGS, add_label_maps, check_scale
from vit_jax.data.sources.layout import find_split, list_few, log_cut, map_splits
from vit_jax.utils.errors import UserError, describe_error

# Names of the folders, as in ADE20k and Pascal VOC, in lower case.
_IMAGES = ("images", "image", "jpegimages")
_MASKS = ("masks", "mask", "annotations", "labels", "segmentationclass")
_DEPTHS = ("depth", "depths", "depth_maps", "depthmaps")

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
    return _pair_images("mask", path)


@functools.cache
def depth_dataset(path: str) -> Dataset:
    """A dataset of `PATH/images/x.jpg` with `PATH/depth/x.png`, `x.npy` or `x.npz`.

    Folders are as in `masks_dataset`. `PATH/depth_scale.txt` has the number that is one metre in
    images of integers; see `decode_depth`.

    Raises:
      UserError: the folder can't be read, has no such pairs, or the scale of PNG files is missing.
    """
    return _pair_images("depth", path)


def _pair_images(kind: str, path: str) -> Dataset:
    prefix, what, folders, example, endings = {
        "mask": ("masks", "masks", _MASKS, "masks/x.png", ENDINGS),
        "depth": ("depth", "depth images", _DEPTHS, "depth/x.png", DEPTH_ENDINGS),
    }[kind]
    name = f"{prefix}:{path}"
    key = f"data.name={name!r}"
    if "://" in path:
        raise UserError(
            f"{key}: expected a local folder; mount the bucket, or list its images in a manifest"
        )
    root = os.path.abspath(os.path.expanduser(path))
    images = _list(root, _IMAGES, ENDINGS, key=key)
    masks = _list(root, folders, endings, key=key)
    if not images or not masks:
        lacks = " or ".join(("images",) * (not images) + (what,) * (not masks))
        raise UserError(
            f"{key} has no {lacks}: expected images/x.jpg and {example} in {root}, in these "
            "folders or beside each other in train, validation and test"
        )
    if kind == "depth":
        check_scale(masks.values(), root, key=key)
    if alone := sorted(images.keys() - masks.keys()):
        paths = [images[stem] for stem in alone]
        few = list_few(paths)
        logger.info("%s: left out %s images without a %s: %s", name, f"{len(alone):,}", kind, few)
    if alone := sorted(masks.keys() - images.keys()):
        paths = [masks[stem] for stem in alone]
        few = list_few(paths)
        logger.info("%s: left out %s %s without an image: %s", name, f"{len(alone):,}", what, few)
    stems = sorted(images.keys() & masks.keys(), key=lambda s: (unicodedata.normalize("NFC", s), s))
    if not stems:
        raise UserError(
            f"{key} has {len(images):,} images and {len(masks):,} {what}, and none of the same "
            f"name: expected images/x.jpg and {example}, and has {next(iter(images.values()))} "
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
    info, label_maps = add_label_maps(
        DatasetInfo(0, (None, None, 3)), kind, files.read, root, key=key
    )
    dataset = Dataset(
        name,
        info,
        Files(root, [images[stem] for stem in stems]),
        labels,
        splits,
        cut=not split_of,
        label_maps=label_maps,
    )
    log_cut(dataset)
    return dataset


def _list(
    root: str, names: tuple[str, ...], endings: tuple[str, ...], *, key: str
) -> dict[str, str]:
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
                for path in list_images(root, os.path.join(root, start), endings=endings)[0]:
                    rest = os.path.splitext(os.path.relpath(path, start))[0]
                    stem = f"{top}/{rest}" if folder else rest
                    if stem in found:
                        raise UserError(f"{key}: {found[stem]} and {path}: expected one of them")
                    found[stem] = path
    except OSError as e:
        raise UserError(f"{key} can't be read: {describe_error(e)}") from None
    return found
