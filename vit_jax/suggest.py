# SPDX-License-Identifier: Apache-2.0
"""Looks at images in folders and at the devices, and prints commands that fine-tune on them.

There are three: a linear probe, LoRA adapters, and all parameters. Memory and time of each are
expected by arithmetic: nothing is compiled or trained.

Examples:
  python -m vit_jax.suggest folder:/data/birds
  python -m vit_jax.suggest folder:/data/birds --init_from=augreg:B/16 --workdir=runs/birds
"""

import argparse
import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vit_jax.checkpoint.pretrained.catalogue import find
from vit_jax.config.load import load_config
from vit_jax.config.reduced import reduce_for_planning
from vit_jax.config.shipped import find_config
from vit_jax.utils.command import CommandParser, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.signals import importing
from vit_jax.utils.streams import print_result
from vit_jax.utils.text import describe_size

if TYPE_CHECKING:
    from vit_jax.checkpoint.pretrained.catalogue import Published
    from vit_jax.data.sources.base import Dataset

_SAMPLED = 100  # images whose size is read
_FEW = 1000  # training images, below which batches are small
_LONG = 3  # a class is rare if the largest has more than so many times its images
_PRODUCT = 1024  # rows of the product that measures a device without known speed


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune: why, for how many epochs, and the config keys that it sets."""

    name: str
    why: str
    epochs: int
    overrides: dict[str, Any]


METHODS = (
    Method(
        "probe",
        "Only the head is trained. It shows in the shortest time how good the features are.",
        10,
        {"optimizer.lr": 1e-3, "optimizer.freeze": ("(?!head/).*",)},
    ),
    Method(
        "lora",
        "Low-rank adapters and the head are trained. It comes close to full fine-tuning with "
        "little optimizer state and checkpoints of a few MB, and overfits less on few images.",
        20,
        {"optimizer.lr": 1e-3, "lora.rank": 8, "lora.alpha": 16},
    ),
    Method(
        "full",
        "All parameters are trained, early layers more slowly. It is usually the most accurate "
        "with thousands of images.",
        20,
        {"optimizer.lr": 1e-4, "optimizer.layer_decay": 0.75},
    ),
)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments; raises `UserError` if one is invalid."""
    parser = CommandParser(prog="python -m vit_jax.suggest", description=__doc__)
    add = parser.add_argument
    add("data", metavar="DATA", help="Look at this dataset: folder:PATH, manifest:FILE, ...")
    add(
        "--init_from",
        default="augreg:S/16",
        help="Start from these weights, by a name that `vit_jax models` lists. The default is "
        "%(default)s.",
    )
    add(
        "--workdir",
        default="runs/finetune",
        help="Start the names of the workdirs with this. The default is %(default)s.",
    )
    add(
        "--memory_gb",
        type=float,
        help="Choose batches that fit a device with so many GB, in place of those found here.",
    )
    args = parser.parse_args(argv)
    if ":" not in args.data:
        raise UserError(f"DATA={args.data!r}: expected a kind and a path, such as folder:PATH")
    if args.memory_gb is not None and not args.memory_gb > 0:
        raise UserError(f"--memory_gb={args.memory_gb}: expected more than 0")
    try:
        published = find(args.init_from)
    except UserError as e:
        raise UserError(f"--init_from={args.init_from}: {e}; `vit_jax models` lists all") from None
    if published.model != "vit":
        raise UserError(
            f"--init_from={args.init_from} is a {published.model}: expected a Vision Transformer, "
            "whose products can have adapters"
        )
    return args


def main(argv: Sequence[str]) -> None:
    """Prints what the data and the devices are, and the commands."""
    args = parse_arguments(argv)
    with importing():
        import jax

        from vit_jax.data.sources import find_dataset
        from vit_jax.runtime.chips import find_chip
    dataset: Any = find_dataset(args.data, data_dir=None)
    if not hasattr(dataset, "records"):
        raise UserError(f"DATA={args.data!r}: expected files, such as folder:PATH")
    if dataset.info.multi_label or not dataset.info.num_classes:
        raise UserError(f"DATA={args.data!r}: expected images with one class each")
    lines, train = describe_data(dataset)
    for line in lines:
        print_result(line)
    devices = jax.devices()
    kind, chip = devices[0].device_kind, find_chip(devices[0].device_kind)
    limit = chip.hbm_bytes if chip else None
    if args.memory_gb:
        limit = args.memory_gb * 1e9
    speed = chip.flops * chip.product_share if chip else measure_product()
    source = (
        "the share of its peak that products reach"
        if chip
        else "measured here with one product of float32"
    )
    room = f", {describe_size(limit)} each" if limit else ""
    print_result(
        f"devices: {len(devices)} x {kind}{room}; {speed / 1e12:,.3g} TFLOP/s each, {source}"
    )
    published = find(args.init_from)
    print_result(
        f"weights: {args.init_from}, of {published.pretraining}, for images of "
        f"{published.image_size} pixels"
    )
    for method in METHODS:
        print_result("")
        for line in describe_method(
            method, args, published, dataset, train, limit, speed, len(devices), bool(chip)
        ):
            print_result(line)


def describe_data(dataset: "Dataset") -> tuple[list[str], int]:
    """Describes the images, classes and sizes of a dataset; also gives its training images."""
    import numpy as np

    from vit_jax.data.ops.decode import ImageError, decode_image

    rows = dataset.splits.get("train", np.arange(0))
    if not len(rows):
        raise UserError(f"data.name={dataset.name!r} has no split train: expected one")
    shown = ", ".join(f"{split} {count:,}" for split, count in dataset.lengths.items())
    counts = np.bincount(np.asarray(dataset.labels)[rows], minlength=dataset.info.num_classes)
    names = dataset.info.class_names or tuple(map(str, range(len(counts))))
    least, most = int(counts.argmin()), int(counts.argmax())
    lines = [
        f"data: {dataset.name}: {shown} images{' (cut by the package)' if dataset.cut else ''}",
        f"classes: {len(counts):,}; from {counts[least]:,} images for training, of "
        f"{names[least]!r}, to {counts[most]:,}, of {names[most]!r}"
        if counts[least] < counts[most]
        else f"classes: {len(counts):,}; {counts[least]:,} images for training of each",
    ]
    if np.count_nonzero(counts) == 1:
        lines.append(f"  there are images of {names[most]!r} alone, so every prediction is right")
    if counts[most] > _LONG * max(counts[least], 1):
        lines.append(
            "  they are unbalanced: look at mean_per_class beside top1, which hides rare classes"
        )
    sizes, unread = [], 0
    for row in rows[:: max(1, len(rows) // _SAMPLED)][:_SAMPLED]:
        try:
            sizes.append(decode_image(dataset.records.read(int(row))).shape[:2])
        except ImageError:
            unread += 1
    if unread:
        lines.append(
            f"  {unread} of {unread + len(sizes)} images that were tried can't be read: "
            f"python -m vit_jax.data.check {dataset.name} lists them"
        )
    if not sizes:
        raise UserError(
            f"DATA={dataset.name!r}: none of {unread} images that were tried can be read: "
            f"python -m vit_jax.data.check {dataset.name} says why"
        )
    height, width = np.median(np.array(sizes), axis=0).astype(int)
    lines.append(f"sizes: {width}x{height} pixels, the median of {len(sizes)} images")
    return lines, len(rows)


def choose_splits(dataset: "Dataset") -> dict[str, Any]:
    """The config keys of splits that `configs/folder.py` does not have as the dataset does."""
    import numpy as np

    labels = np.asarray(dataset.labels)
    there = {
        split for split, rows in dataset.splits.items() if len(rows) and min(labels[rows]) >= 0
    }
    train, chosen = len(dataset.splits["train"]), {}
    if "validation" in there and not dataset.cut:
        chosen = {"data.split": "train", "evals.val.split": "validation"}
    elif "validation" not in there and (dataset.cut or round(0.98 * train) == train):
        chosen = {"data.split": "train", "evals.val": None}
    return chosen if "test" in there else chosen | {"evals.test": None}


def measure_product() -> float:
    """Operations a second of a float32 matrix product on the first device."""
    import time

    import jax
    import jax.numpy as jnp

    x = jnp.ones((_PRODUCT, _PRODUCT))
    multiply = jax.jit(lambda x: x @ x)
    jax.block_until_ready(multiply(x))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x))
        times.append(time.perf_counter() - start)
    return 2 * _PRODUCT**3 / min(times)


def make_overrides(
    method: Method,
    data: str,
    init_from: str,
    published: "Published",
    *,
    batch_size: int,
    bfloat16: bool,
) -> dict[str, Any]:
    """The config keys of a method, with their values, to set in `configs/folder.py`."""
    size = published.image_size
    evaluated = f"decode(orient=True)|resize({size})"
    return {
        "data.name": data,
        "init_from": init_from,
        "model": {"name": "vit", "variant": published.variant},
        "epochs": method.epochs,
        "data.preprocess": f"decode(orient=True)|inception_crop({size}, area_min=20)|flip_lr",
        "data.batch_size": batch_size,
        "evals.val.preprocess": evaluated,
        "evals.test.preprocess": evaluated,
        "objective.pixel_mean": published.mean,
        "objective.pixel_std": published.std,
        "objective.mixup": 0.0,
        **({"precision": "bfloat16"} if bfloat16 else {}),
        **method.overrides,
    }


def describe_method(
    method: Method,
    args: argparse.Namespace,
    published: "Published",
    dataset: "Dataset",
    train: int,
    limit: float | None,
    speed: float,
    devices: int,
    bfloat16: bool,
) -> Iterator[str]:
    """Describes a method, with the command and what arithmetic expects of it."""
    # The config keeps two percent of data without a validation split for validation.
    splits = choose_splits(dataset)
    most = max(train * 98 // 100, 1)
    batch_size = min(128 if train >= _FEW else 32, 2 ** (most.bit_length() - 1))
    batch_size = max(batch_size - batch_size % devices, devices)
    while True:
        given = {"batch_size": batch_size, "bfloat16": bfloat16}
        overrides = make_overrides(method, args.data, args.init_from, published, **given)
        for key, value in splits.items():
            if value is None:  # Nothing else is set of an evaluator that is removed.
                overrides.pop(f"{key}.preprocess")
            overrides[key] = value
        memory, flops = expect(overrides, dataset.info.num_classes, published.image_size)
        if limit is None or memory <= limit or batch_size <= devices:
            break
        batch_size = max(batch_size // 2 - batch_size // 2 % devices, devices)
    images = train if "data.split" in splits else round(0.98 * train)
    steps = max(round(method.epochs * images / batch_size), 1)
    seconds = steps * flops / speed / devices
    yield f"{method.name}: {method.why}"
    fits = "" if limit is None or memory <= limit else ", which does not fit"
    yield (
        f"  expected by arithmetic: {describe_size(memory)} a device{fits}; "
        f"{describe_time(seconds)} for {method.epochs} epochs, {steps:,} steps of {batch_size}, "
        "without reading images, compiling and evaluating"
    )
    workdir = quote(f"{args.workdir}_{method.name}")
    yield f"  python -m vit_jax.main --config=folder --workdir={workdir} \\"
    shown = [f"--config.{key}={quote(str(value))}" for key, value in overrides.items()]
    yield from (f"      {flag} \\" for flag in shown[:-1])
    yield f"      {shown[-1]}"


def expect(overrides: dict[str, Any], num_classes: int, size: int) -> tuple[float, float]:
    """Bytes on each device, and operations of a step over all devices, without compiling it."""
    from vit_jax.models.flops import count_flops
    from vit_jax.planning.memory import estimate_memory
    from vit_jax.training.experiment import Experiment

    config = load_config(str(find_config("folder")), overrides).to_dict()
    config = reduce_for_planning(config, num_classes=num_classes, image_size=size)
    experiment = Experiment.from_config(config)
    memory = estimate_memory(experiment)
    total = memory.arguments + memory.gradients + memory.activations
    return total, count_flops(experiment.trace_step().jaxpr)


def quote(text: str) -> str:
    """Quotes a value for a shell, in double quotes where it has single ones of its own."""
    quoted = shlex.quote(text)
    return f'"{text}"' if "'" in text and not set('"$`\\\\!') & set(text) else quoted


def describe_time(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"


if __name__ == "__main__":
    run_command(main)
