# SPDX-License-Identifier: Apache-2.0
"""Prepares a TFDS dataset in the form that training reads: downloads, extracts, writes records.

Training does this on first use; this command does it earlier, on a machine with a network.

Example:
  python -m vit_jax.data.prepare cifar10 --data_dir=/data/tfds
"""

from collections.abc import Sequence

from vit_jax.observe.console import log, set_up
from vit_jax.utils.command import CommandParser, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import find_parts, trust_parts
from vit_jax.utils.signals import importing


def main(argv: Sequence[str]) -> None:
    """Prepares the dataset, and logs its folder and splits."""
    parser = CommandParser(prog="python -m vit_jax.data.prepare", description=__doc__)
    parser.add_argument(
        "NAME", help="Prepare the dataset of this name, which may include a config and a version."
    )
    parser.add_argument("--data_dir", help="Keep TFDS datasets in this folder.")
    args = parser.parse_args(argv)
    set_up(quiet=False)
    with importing():
        from vit_jax.data.sources import KINDS, find_dataset
        from vit_jax.data.sources.tfds import TfdsDataset
    trust_parts(find_parts(args.NAME))
    own = args.NAME.partition(":")[0] in KINDS
    dataset = None if own else find_dataset(args.NAME, data_dir=args.data_dir)
    if not isinstance(dataset, TfdsDataset):
        raise UserError(
            f"{args.NAME!r} is read as it is: only datasets of TFDS have to be prepared"
        )
    lengths = dataset.lengths
    log(f"{args.NAME} is prepared in {dataset.folder}")
    for split, length in lengths.items():
        log(f"  {split:<15} {length:>12,} examples")


if __name__ == "__main__":
    run_command(main)
