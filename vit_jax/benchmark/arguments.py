# SPDX-License-Identifier: Apache-2.0
"""The arguments of the benchmarks, apart from the modules that measure, which import JAX."""

import argparse
from typing import Any

from vit_jax.config.load import load_config
from vit_jax.config.reduced import reduce_for_planning


def add_arguments(parser: argparse.ArgumentParser, part: str) -> None:
    """Adds the arguments of a part of `vit_jax.benchmark`."""
    if part == "input":
        _add_input(parser)
        return
    _add_config(parser, sizes=part != "startup")
    add = parser.add_argument
    default = "The default is %(default)s."
    if part == "step":
        add("--repeats", type=int, default=5, help=f"Measure so many times. {default}")
    elif part == "loop":
        add("--rounds", type=int, default=5, help=f"Measure each loop so many times. {default}")
    elif part == "startup":
        add("--rounds", type=int, default=3, help=f"Start each process so many times. {default}")
    elif part == "checkpoint":
        add("--folder", default=".", help="Write to the disk of this folder. The default is here.")
        add(
            "--saves",
            type=int,
            default=5,
            help=f"Write so many checkpoints, and as many plain files. {default}",
        )
    if part in ("step", "loop"):
        seconds = 3 if part == "step" else 5
        add(
            "--seconds",
            type=float,
            default=seconds,
            help=f"Let each measurement take so long. {default}",
        )


def _add_config(parser: argparse.ArgumentParser, *, sizes: bool) -> None:
    """Adds `--config` and, for benchmarks that need no dataset, the sizes of its images."""
    add = parser.add_argument
    add(
        "--config",
        required=True,
        help="Measure a run of this config; --config.KEY=VALUE overrides a key.",
    )
    if sizes:
        add("--num_classes", type=int, help="Take this many classes, without reading the dataset.")
        add("--image_size", type=int, help="Take images of this size, with --num_classes.")


def _add_input(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help="Read this dataset, given as data.name in a config, such as folder:/data/birds.",
    )
    add(
        "--split",
        default="train",
        help="Read this split, which may have slices. The default is %(default)s.",
    )
    add(
        "--preprocess",
        default="decode|inception_crop(224)|flip_lr",
        metavar="LINE",
        help="Prepare images by this line. The default is '%(default)s'.",
    )
    add(
        "--batch_size",
        type=int,
        default=128,
        help="Make batches of this many images. The default is %(default)s.",
    )
    add("--data_dir", help="Read TFDS datasets from this folder.")
    add(
        "--num_threads",
        type=int,
        help="Read in this many threads. The default is one for each core.",
    )
    add(
        "--seconds",
        type=float,
        default=10,
        help="Let each measurement take so long. The default is %(default)s.",
    )
    add(
        "--step_ms",
        type=float,
        help="Measure how long a training step of so many milliseconds waits for data.",
    )


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    """The config of a benchmark, without evaluators and checkpoints."""
    config = load_config(args.config, args.overrides).to_dict()
    return reduce_for_planning(config, num_classes=args.num_classes, image_size=args.image_size)
