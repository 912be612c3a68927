# SPDX-License-Identifier: Apache-2.0
"""Looks into a checkpoint, and writes it as a file of another kind.

Without DST it only says what SRC is. DST is told by its ending: `.npz` has the layout of the files
published with vision_transformer, `.safetensors` the names of timm.

Examples:
  python -m vit_jax.convert ViT-B_16.npz
  python -m vit_jax.convert augreg:B/16 vit_b16.safetensors
  python -m vit_jax.convert runs/digits digits.npz
  python -m vit_jax.convert runs/digits:ema_params digits.safetensors
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.npz import write_npz
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.observe.console import report_errors, say
from vit_jax.utils.errors import UserError

WRITERS: dict[str, Callable[[Path, Weights], list[Path]]] = {".npz": write_npz}


def describe(weights: Weights) -> list[str]:
    """What weights are, in lines for the screen."""
    count = sum(value.size for value in weights.params.values())
    head = weights.params.get("head/kernel")
    state = "none"
    if head is not None:
        untrained = "" if np.any(head) else ", all zero: published untrained"
        state = f"{head.shape[-1]} classes{untrained}"
    model = " ".join(f"{key}={value}" for key, value in weights.model.items())
    preprocess = " ".join(f"{key}={value}" for key, value in weights.preprocess.items())
    return [
        f"  layout      {weights.layout}",
        f"  parameters  {count:,} in {len(weights.params)} arrays",
        f"  head        {state}",
        f"  model       {model}",
        f"  images      {preprocess or 'nothing is known of their preparation'}",
        *(f"  note        {note}" for note in weights.notes),
    ]


def convert(weights: Weights, destination: Path) -> list[Path]:
    """Writes weights to a file and reads them back.

    Args:
      weights: to be written.
      destination: `.npz` or `.safetensors`; must not exist.

    Returns:
      The files written.

    Raises:
      UserError: the ending is another, the file exists or can't be written, the layout can't hold
        this model, or what is read back differs.
    """
    write = WRITERS.get(destination.suffix)
    if write is None:
        raise UserError(f"DST={destination}: expected a file that ends in {' or '.join(WRITERS)}")
    for path in (destination, destination.with_suffix(".json")):
        if path.exists():
            raise UserError(f"DST={destination}: {path} exists; remove it, or choose another name")
    try:
        written = write(destination, weights)
    except OSError as e:
        raise UserError(f"DST={destination} can't be written: {e.strerror or e}") from e
    again = load_pretrained(str(destination))
    different = [
        path
        for path in {**weights.params, **again.params}
        if path not in weights.params
        or path not in again.params
        or not np.array_equal(weights.params[path], again.params[path])
    ]
    if different:
        raise UserError(
            f"DST={destination}: {len(different)} parameters are not the same when read back, "
            f"{different[0]} among them; this is a bug"
        )
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """Converts, and says what was read and written."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("SRC", help="file, workdir, Orbax checkpoint, or name of the catalogue")
    parser.add_argument("DST", nargs="?", type=Path, help="file to write")
    args = parser.parse_args(argv)
    weights = load_pretrained(args.SRC)
    say(args.SRC)
    for line in describe(weights):
        say(line)
    if args.DST is not None:
        for path in convert(weights, args.DST):
            say(f"wrote {path} ({path.stat().st_size / 2**20:,.1f} MiB)")
        say("read back: every parameter is the same")


if __name__ == "__main__":
    with report_errors():
        main(sys.argv[1:])
