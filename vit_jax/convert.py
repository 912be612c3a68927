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

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vit_jax.checkpoint.pretrained.adapt import describe_own
from vit_jax.checkpoint.pretrained.load import load_pretrained
from vit_jax.checkpoint.pretrained.npz import write_npz
from vit_jax.checkpoint.pretrained.safetensors import write_safetensors
from vit_jax.checkpoint.pretrained.weights import POSEMB, Weights
from vit_jax.models.positions import FIXED_POSITIONS
from vit_jax.observe.console import CommandParser, run_command, say
from vit_jax.utils.errors import UserError

# By the ending of a file: what writes it, and the endings of all files that it writes.
WRITERS: dict[str, tuple[Callable[[Path, Weights], None], tuple[str, ...]]] = {
    ".npz": (write_npz, (".npz", ".json")),
    ".safetensors": (write_safetensors, (".safetensors",)),
}


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
        *(f"  note        {note}" for note in (*weights.notes, *describe_own(weights))),
    ]


def convert(weights: Weights, destination: Path) -> list[str]:
    """Writes weights to a file and reads them back.

    Args:
      weights: to be written.
      destination: `.npz` or `.safetensors`; must not exist.

    Returns:
      Lines for the screen: the files written, and how they compare with the weights.

    Raises:
      UserError: the ending is another, the file exists or can't be written, the layout can't hold
        this model, or what is read back differs.
    """
    if destination.suffix not in WRITERS:
        raise UserError(f"DST={destination}: expected a file that ends in {' or '.join(WRITERS)}")
    write, endings = WRITERS[destination.suffix]
    files = [destination.with_suffix(ending) for ending in endings]
    for path in files:
        if path.exists():
            raise UserError(f"DST={destination}: {path} exists; remove it, or choose another name")
    try:
        write(destination, weights)
    except OSError as e:
        raise UserError(f"DST={destination} can't be written: {e.strerror or e}") from e
    lines = [f"wrote {path} ({path.stat().st_size / 2**20:,.1f} MiB)" for path in files]
    return [*lines, _compare(weights, load_pretrained(str(destination)), destination)]


def _compare(weights: Weights, again: Weights, destination: Path) -> str:
    if not _list_differences(weights.params, again.params):
        return "read back: every parameter is the same"
    ours, theirs = (_fold_positions(w.params) for w in (weights, again))
    if weights.model.get("position_embedding") in FIXED_POSITIONS:
        theirs.pop(POSEMB, None)  # They are written as learned ones.
    if different := _list_differences(ours, theirs):
        raise UserError(
            f"DST={destination}: {len(different)} parameters are not the same when read back, "
            f"{different[0]} among them; this is a bug"
        )
    return "read back: the same function; positions are put where this layout has them"


def _list_differences(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> list[str]:
    return [
        path
        for path in sorted(ours.keys() | theirs.keys())
        if path not in ours or path not in theirs or not np.array_equal(ours[path], theirs[path])
    ]


def _fold_positions(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds the class token's position embedding into the token, which gives the same function."""
    folded = dict(params)
    if "cls" in folded and POSEMB in folded:
        first, rest = np.split(folded[POSEMB], [1], axis=1)
        folded |= {"cls": folded["cls"] + first, POSEMB: rest}
    return folded


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
    say(args.SRC)
    for line in describe(weights):
        say(line)
    if args.DST is not None:
        for line in convert(weights, args.DST):
            say(line)


if __name__ == "__main__":
    run_command(main)
