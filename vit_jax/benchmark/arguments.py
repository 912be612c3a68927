# SPDX-License-Identifier: Apache-2.0
"""Arguments that several benchmarks share."""

import argparse
from typing import Any

from vit_jax.config.load import load_config
from vit_jax.config.reduced import reduce_for_planning
from vit_jax.utils.errors import UserError


def add_config(parser: argparse.ArgumentParser, *, sizes: bool = True) -> None:
    """Adds `--config` and, for benchmarks that need no dataset, the sizes of its images."""
    parser.add_argument(
        "--config", required=True, help="config file; --config.KEY=VALUE overrides a key"
    )
    if sizes:
        parser.add_argument("--num_classes", type=int, help="in place of the dataset's")
        parser.add_argument("--image_size", type=int, help="with --num_classes")


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    """The config of a benchmark, without evaluators and checkpoints."""
    config = load_config(args.config, args.overrides).to_dict()
    return reduce_for_planning(config, num_classes=args.num_classes, image_size=args.image_size)


def check_positive(args: argparse.Namespace, *names: str, expected: str = "more than 0") -> None:
    """Raises `UserError` unless the arguments that are given are above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name}={value}: expected {expected}")
