# SPDX-License-Identifier: Apache-2.0
"""Looks into a checkpoint, and writes it as a file of another kind.

Without DST it only says what SRC is. DST is told by its ending: `.npz` has the layout of the files
published with vision_transformer, `.safetensors` the names of timm.

Examples:
  python -m vit_jax.convert ViT-B_16.npz
  python -m vit_jax.convert augreg:B/16 vit_b16.safetensors
  python -m vit_jax.convert runs/digits digits.npz
  python -m vit_jax.convert runs/digits digits.safetensors --params=ema
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_jax.checkpoint.pretrained.adapt import describe_objective_params
from vit_jax.checkpoint.pretrained.convert import convert
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.weights import Weights
from vit_jax.observe.console import log_lines
from vit_jax.utils.command import CommandParser, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import count

_LISTED = 8  # class names in the description of a file


def describe(weights: Weights) -> list[str]:
    """What weights are, in lines for the screen."""
    size = count(weights.params)
    head = weights.params.get("head/kernel")
    state = "none"
    if head is not None:
        untrained = "" if np.any(head) else ", all zero: published untrained"
        state = f"{head.shape[-1]} classes{untrained}"
    model, preprocess = (
        " ".join(f"{key}={value}" for key, value in values.items())
        for values in (weights.model, weights.preprocess)
    )
    names = weights.class_names or ("not known",)
    classes = ", ".join([*names[:_LISTED], *(["..."] if len(names) > _LISTED else [])])
    notes = (*weights.notes, *describe_objective_params(weights))
    return [
        f"  layout      {weights.layout}",
        f"  parameters  {size:,} in {len(weights.params)} arrays",
        f"  head        {state}",
        *([f"  class names {classes}"] if head is not None else []),
        f"  model       {model}",
        f"  images      {preprocess or 'their preprocessing is not known'}",
        *(f"  note        {note}" for note in notes),
    ]


def main(argv: Sequence[str]) -> None:
    """Converts, and says what was read and written."""
    parser = CommandParser(prog="python -m vit_jax.convert", description=__doc__)
    parser.add_argument("SRC", help="file, workdir, Orbax checkpoint, or name of the catalogue")
    parser.add_argument("DST", nargs="?", type=Path, help="file to write")
    parser.add_argument(
        "--params",
        choices=("raw", "ema"),
        help="of a run: the parameters as they are (raw, the default), or their average (ema)",
    )
    args = parser.parse_intermixed_args(argv)
    source = args.SRC
    if args.params is not None:
        if not Path(source).is_dir():
            raise UserError(f"--params={args.params}: {source} is no run; leave --params out")
        source += ":ema_params" if args.params == "ema" else ""
    weights = load_pretrained(source)
    log_lines([args.SRC, *describe(weights)])
    if args.DST is not None:
        log_lines(convert(weights, args.DST))


if __name__ == "__main__":
    run_command(main)
