# SPDX-License-Identifier: Apache-2.0
"""Prepares a dataset, as training does on first use, so that a run starts at once.

A dataset of TFDS is downloaded and written as records, one of the Hugging Face hub is downloaded
into its cache, and tar shards get their index. Other data is read as it is; it is opened and
checked. The last lines are the splits that there are.

Examples:
  python -m vit_jax.data.prepare cifar10 --data_dir=/data/tfds
  python -m vit_jax.data.prepare hf:uoft-cs/cifar10
  python -m vit_jax.data.prepare 'tar:/data/birds/train-{000..146}.tar'
"""

from collections.abc import Sequence

from vit_jax.observe.console import log, set_up
from vit_jax.utils.command import CommandParser, run_command
from vit_jax.utils.registry import find_parts, trust_parts
from vit_jax.utils.signals import importing


def main(argv: Sequence[str]) -> None:
    """Prepares the dataset, and logs where it is and its splits."""
    parser = CommandParser(prog="python -m vit_jax.data.prepare", description=__doc__)
    parser.add_argument(
        "NAME",
        help="Prepare the dataset of this name, as data.name has it; that of TFDS may include a "
        "config and a version.",
    )
    parser.add_argument("--data_dir", help="Keep TFDS datasets in this folder.")
    args = parser.parse_args(argv)
    set_up(quiet=False)
    with importing():
        from vit_jax.data.sources import find_dataset
        from vit_jax.data.sources.hub import pin_name
        from vit_jax.data.sources.tfds import TfdsDataset
    trust_parts(find_parts(args.NAME))
    dataset = find_dataset(args.NAME, data_dir=args.data_dir)
    lengths = dataset.lengths
    pinned = pin_name(args.NAME)
    if isinstance(dataset, TfdsDataset):
        log(f"{args.NAME} is prepared in {dataset.folder}")
    elif pinned != args.NAME:
        log(f"{args.NAME} is downloaded; this commit of it is read by {pinned}")
    elif args.NAME.startswith("hf:"):
        log(f"{args.NAME} is here, and training reads it as it is")
    elif args.NAME.startswith("tar:"):
        log(f"{args.NAME} has its index, and training reads the shards as they are")
    else:
        log(f"{args.NAME} needs no preparation: training reads it as it is")
    for split, length in lengths.items():
        log(f"  {split:<15} {length:>12,} examples")


if __name__ == "__main__":
    run_command(main)
