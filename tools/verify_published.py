# SPDX-License-Identifier: Apache-2.0
"""Fetches published checkpoints, loads them, and evaluates them on a folder of labelled images.

    python -m tools.verify_published --images FOLDER

FOLDER has a folder for each class, named by the index of the class, or one for each of the classes
(such as n01440764), whose alphabetical order is that of the indices. Says for each checkpoint its
SHA-256 and its accuracy next to the published one; ends with 1 if one is wrong or cannot be loaded.
"""

import argparse
import csv
import functools
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoint.pretrained.adapt import adapt_params, check_arguments
from vit_jax.checkpoint.pretrained.catalogue import CATALOGUE, Published, find, load_catalogue
from vit_jax.checkpoint.pretrained.download import compute_sha256, fetch
from vit_jax.checkpoint.pretrained.npz import read_npz
from vit_jax.data.ops.transforms import apply
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.models.variants import MODELS
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import lookup

SMALL = (
    "augreg+imagenet2012:Ti/16@384",
    "augreg+imagenet2012:R+Ti/16@384",
    "augreg+imagenet2012:S/32@384",
)
_SUFFIXES = (".jpg", ".jpeg", ".png")


def make_model(published: Published) -> nn.Module:
    """The model that the checkpoint is of, with its head."""
    make = lookup(MODELS, published.model, key="model.name")
    return make(num_classes=published.num_classes, variant=published.variant)


def load_model(published: Published, path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its parameters, all of them from the file.

    Raises:
      UserError: the file does not fit the model as it is.
    """
    model = make_model(published)
    image = jax.ShapeDtypeStruct((1, published.image_size, published.image_size, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    target = jax.eval_shape(init, jax.random.key(0), image)["params"]
    weights = read_npz(path)
    check_arguments(weights, model)
    params, notes = adapt_params(
        weights,
        target,
        target_grid=model.grid((published.image_size, published.image_size)),
        num_class_tokens=model.num_class_tokens,
    )
    if any("kept" not in note for note in notes):
        raise UserError(f"{path} does not fit {published.name}: {'; '.join(notes)}")
    return model, params


def list_images(folder: Path, num_classes: int) -> list[tuple[Path, int]]:
    """Image files below `folder` and their labels.

    Raises:
      UserError: the folders are neither named by index nor as many as there are classes.
    """
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if classes and all(name.isdecimal() and int(name) < num_classes for name in classes):
        labels = {name: int(name) for name in classes}
    elif classes and len(classes) == num_classes:
        labels = {name: i for i, name in enumerate(classes)}
    else:
        raise UserError(
            f"--images={folder}: {len(classes)} folders; expected folders named 0 to "
            f"{num_classes - 1}, or {num_classes} of any names, in the order of the classes"
        )
    images = [
        (path, label)
        for name, label in labels.items()
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in _SUFFIXES
    ]
    if not images:
        raise UserError(f"--images={folder}: no {', '.join(_SUFFIXES)} in its folders")
    return images


def evaluate(
    model: nn.Module,
    params: dict[str, Any],
    published: Published,
    images: list[tuple[Path, int]],
    *,
    batch_size: int,
) -> int:
    """The number of images whose label gets the highest logit."""
    predict = jax.jit(lambda params, x: model.apply({"params": params}, x, train=False)[0])
    params = jax.device_put(params)
    correct = 0
    read = _make_reader(published)
    for pixels, labels in _batches(images, read, batch_size):
        logits = predict(params, pixels)
        correct += int(np.sum(np.argmax(logits, -1)[: len(labels)] == labels))
    return correct


def record(path: Path, name: str, *, size: int, sha256: str) -> None:
    """Writes what was measured of a file into its row of the catalogue file."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        fields, rows = list(reader.fieldnames or ()), list(reader)
    for row in rows:
        if row["name"] == name:
            row |= {"size": str(size), "sha256": sha256}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"  recorded in {path}")


def verify(published: Published, args: argparse.Namespace) -> None:
    """Fetches, loads and evaluates one checkpoint, and prints the result.

    Raises:
      UserError: the file is not the published one, or does not fit.
    """
    print(f"{published.name}")
    path = fetch(published, cache_dir=args.cache_dir)  # It compares with what is recorded.
    sha256 = compute_sha256(path)
    print(f"  sha256 {sha256}, {'as' if published.sha256 else 'none'} recorded")
    if args.record and not published.sha256:
        record(args.catalogue, published.name, size=path.stat().st_size, sha256=sha256)
    model, params = load_model(published, path)
    print(f"  loaded: {sum(x.size for x in jax.tree.leaves(params)):,} parameters")
    if args.images is None:
        return
    images = list_images(args.images, published.num_classes or 0)
    correct = evaluate(model, params, published, images, batch_size=args.batch_size)
    top1 = correct / len(images)
    error = 1.96 * math.sqrt(top1 * (1 - top1) / len(images))
    expected = "nothing published"
    if published.top1 is not None:
        expected = f"published {published.top1:.2f} % at {published.top1_image_size} pixels"
    print(
        f"  top-1 {100 * top1:.2f} ± {100 * error:.2f} % ({correct} of {len(images)} images, "
        f"{published.eval}); {expected}"
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="labelled images")
    parser.add_argument("--names", nargs="+", default=SMALL, help="checkpoints of the catalogue")
    parser.add_argument("--record", action="store_true", help="write new hashes to the catalogue")
    parser.add_argument("--catalogue", type=Path, default=CATALOGUE, metavar="CSV")
    parser.add_argument("--cache-dir", type=Path, metavar="FOLDER", help="where files are kept")
    parser.add_argument("--batch-size", type=int, default=32)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Verifies all that was asked for; the exit code."""
    args = parse_args(argv)
    failed = 0
    for name in args.names:
        try:
            verify(find(name, catalogue=load_catalogue(args.catalogue)), args)
        except UserError as e:
            failed += 1
            print(f"  FAILED: {e}")
    print(f"{len(args.names) - failed} of {len(args.names)} checkpoints verified")
    return 1 if failed else 0


def _make_reader(published: Published) -> Callable[[Path], np.ndarray]:
    ops = parse_preprocess(published.eval, key=published.name)
    rng = np.random.default_rng(0)  # Nothing in an evaluation asks for it.

    def read(path: Path) -> np.ndarray:
        try:
            pixels = apply(ops, {"image": path.read_bytes()}, rng)["image"]
        except ValueError as e:
            raise UserError(f"{path}: {e}") from None
        return (pixels / np.float32(255) - np.float32(published.mean)) / np.float32(published.std)

    return read


def _batches(
    images: list[tuple[Path, int]], read: Callable[[Path], np.ndarray], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of pixels, all of one size, and the labels of the images in them, perhaps fewer."""
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(images), batch_size):
            paths, labels = zip(*images[start : start + batch_size], strict=True)
            pixels = np.stack(list(threads.map(read, paths)))
            padding = [(0, batch_size - len(labels))] + [(0, 0)] * 3
            yield np.pad(pixels, padding), np.array(labels)


if __name__ == "__main__":
    sys.exit(main())
