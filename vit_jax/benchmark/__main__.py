# SPDX-License-Identifier: Apache-2.0
"""Measures how fast a part of a run is on this machine.

Examples:
  python -m vit_jax.benchmark input --source=folder:/data/birds --step_ms=100
  python -m vit_jax.benchmark step --config=configs/vit_i1k.py --num_classes=1000 --image_size=224
  python -m vit_jax.benchmark loop --config=configs/digits.py
  python -m vit_jax.benchmark checkpoint --config=configs/vit_i1k.py --num_classes=1000
  python -m vit_jax.benchmark startup --config=configs/digits.py
"""

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from vit_jax.benchmark.arguments import add_arguments
from vit_jax.config.load import find_file, parse_overrides
from vit_jax.config.shipped import read_docstring
from vit_jax.observe.console import log, set_up
from vit_jax.utils.command import CommandParser, local_path, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.signals import importing

# Modules of this package with `run(args)`, which returns a JSON object and lines to print.
PARTS = ("input", "step", "loop", "checkpoint", "startup")


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes the results."""
    set_up(quiet=False)
    parser = CommandParser(prog="python -m vit_jax.benchmark", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name in PARTS:
        text = read_docstring(Path(__file__).with_name(f"{name}.py"))
        sub = parts.add_parser(name, help=text.partition("\n")[0], description=text)
        add_arguments(sub, name)
        sub.add_argument(
            "--json", type=local_path, metavar="PATH", help="Write the results to this file too."
        )
    overrides, rest = parse_overrides(list(argv))
    args = parser.parse_args(rest, argparse.Namespace(overrides=overrides))
    if overrides and "config" not in args:
        raise UserError(f"--config.{next(iter(overrides))}: {args.part} has no config to override")
    if "config" in args:
        find_file(args.config)
    with importing():
        part = importlib.import_module(f"vit_jax.benchmark.{args.part}")
    results, lines = part.run(args)
    if "config" in args:
        results = {"config": args.config, "overrides": overrides} | results
    for line in lines:
        log(line)
    if args.json:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=2) + "\n")
        except OSError as e:
            raise UserError(f"--json={args.json}: {e.strerror}") from None
        log(f"wrote {args.json}")


if __name__ == "__main__":
    run_command(main)
