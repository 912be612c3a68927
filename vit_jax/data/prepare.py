# SPDX-License-Identifier: Apache-2.0
"""Prepares a TFDS dataset in the form that training reads: downloads, extracts, writes records.

Training does that too on first use; here it can be done before, on a machine with a network.

Example:
  python -m vit_jax.data.prepare cifar10 --data_dir=/data/tfds
"""

from collections.abc import Sequence

from vit_jax.data.sources import prepare
from vit_jax.observe.console import log, set_up
from vit_jax.utils.command import CommandParser, run_command


def main(argv: Sequence[str]) -> None:
    """Prepares, and says what is there then."""
    parser = CommandParser(prog="python -m vit_jax.data.prepare", description=__doc__)
    parser.add_argument("NAME", help="of the dataset, with config and version if need be")
    parser.add_argument("--data_dir", help="where TFDS keeps its datasets")
    args = parser.parse_args(argv)
    set_up(quiet=False)
    folder, lengths = prepare(args.NAME, data_dir=args.data_dir)
    log(f"{args.NAME} is prepared in {folder}")
    for split, length in lengths.items():
        log(f"  {split:<15} {length:>12,} examples")


if __name__ == "__main__":
    run_command(main)
