# SPDX-License-Identifier: Apache-2.0
"""Arguments that several benchmarks share."""

import argparse
from typing import Any

from vit_jax.config.load import load_config
from vit_jax.config.reduced import reduce_for_planning


def add_config(parser: argparse.ArgumentParser, *, sizes: bool = True) -> None:
    """Adds `--config` and, for benchmarks that need no dataset, the sizes of its images."""
    add = parser.add_argument
    add("--config", required=True, help="config file; --config.KEY=VALUE overrides a key")
    if sizes:
        add("--num_classes", type=int, help="in place of the dataset's")
        add("--image_size", type=int, help="with --num_classes")


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    """The config of a benchmark, without evaluators and checkpoints."""
    config = load_config(args.config, args.overrides).to_dict()
    return reduce_for_planning(config, num_classes=args.num_classes, image_size=args.image_size)
