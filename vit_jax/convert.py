# SPDX-License-Identifier: Apache-2.0
"""Describes a checkpoint, and writes it as a file of another layout.

Without DST the command only describes SRC. The ending of DST chooses the layout: `.npz` is that of
the files published with vision_transformer, `.safetensors` has the names of timm.

Examples:
  python -m vit_jax.convert ViT-B_16.npz
  python -m vit_jax.convert augreg:B/16 vit_b16.safetensors
  python -m vit_jax.convert runs/digits digits.npz
  python -m vit_jax.convert runs/digits digits.safetensors
  python -m vit_jax.convert runs/averaged average.npz --params=ema
  python -m vit_jax.convert runs/lora adapters --adapters
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax.observe.console import log_lines
from vit_jax.utils.buckets import is_url
from vit_jax.utils.command import CommandParser, local_path, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.mirrors import find_local
from vit_jax.utils.signals import importing
from vit_jax.utils.suggestions import suggest_workdir

if TYPE_CHECKING:
    from vit_jax.checkpoint.pretrained.weights import Weights

_LISTED = 8  # class names in the description of a file


def describe(weights: "Weights") -> list[str]:
    """What weights are, in lines for the screen."""
    import numpy as np

    from vit_jax.checkpoint.pretrained.adapt import describe_objective_params
    from vit_jax.checkpoint.pretrained.towers import has_towers
    from vit_jax.utils.nested import flatten_config
    from vit_jax.utils.tree import count

    size = count(weights.params)
    head = weights.params.get("head/kernel")
    state = "none"
    if head is not None:
        untrained = "" if np.any(head) else ", all zero: published untrained"
        state = f"{head.shape[-1]} classes{untrained}"
    if has_towers(weights.params):
        state = "none: images and texts are compared"
    model, preprocess = (
        " ".join(f"{key}={value}" for key, value in flatten_config(values).items())
        for values in (_leave_out_defaults(weights.model), weights.preprocess)
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


def _leave_out_defaults(model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a model section, dotted, whose values are not the defaults."""
    from vit_jax.models.variants import MODELS, TOWER_MAKERS
    from vit_jax.utils.nested import flatten_config
    from vit_jax.utils.registry import keywords

    makers = {"": MODELS.get(model.get("name", "vit"))}
    if makers[""] is MODELS["two_towers"]:
        makers |= {f"{section}.": make for section, make in TOWER_MAKERS.items()}
    defaults = {
        f"{prefix}{key}": parameter.default
        for prefix, make in makers.items()
        if make is not None
        for key, parameter in keywords(make).items()
    }
    return {
        key: value
        for key, value in flatten_config(model).items()
        # JSON has no tuples.
        if key not in defaults or defaults[key] != (tuple(value) if type(value) is list else value)
    }


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments; `SRC` is set, also to the workdir of `--workdir`.

    Raises:
      UserError: an argument is invalid.
    """
    parser = CommandParser(prog="python -m vit_jax.convert", description=__doc__)
    add = parser.add_argument
    add(
        "SRC",
        nargs="?",
        help="Read this file, workdir or Orbax checkpoint, or the published weights of this name, "
        "which `vit_jax models` lists.",
    )
    add("DST", nargs="?", type=local_path, help="Write this file, which must not exist.")
    add(
        "--workdir",
        metavar="WORKDIR",
        help="Read the newest checkpoint of this run instead of SRC.",
    )
    add(
        "--params",
        choices=("raw", "ema"),
        help="Read the parameters of a run as they are (raw) or their average (ema). The default "
        "is raw.",
    )
    add(
        "--adapters",
        action="store_true",
        help="Write the adapters of a run alone, without the weights that they are added to, into "
        "the folder DST, as Hugging Face's PEFT loads them.",
    )
    args = parser.parse_intermixed_args(argv)
    if args.workdir is not None:
        args.workdir = find_local(args.workdir, key="--workdir")
        if args.DST is not None:
            parser.error(f"SRC={args.SRC} and --workdir={args.workdir}: expected one of them")
        if not Path(args.workdir).is_dir():
            raise UserError(
                f"--workdir={args.workdir} is no folder; expected the workdir of a run"
                f"{suggest_workdir(Path(args.workdir))}"
            )
        if args.SRC is not None and is_url(args.SRC):
            parser.error(f"argument DST: {args.SRC!r}: expected a path on this machine")
        args.SRC, args.DST = args.workdir, Path(args.SRC) if args.SRC else None
    if args.SRC is None:
        parser.error("the following arguments are required: SRC (or --workdir=WORKDIR)")
    args.SRC = find_local(args.SRC, key="SRC")
    if args.params is not None and not Path(args.SRC).is_dir():
        raise UserError(f"--params={args.params}: {args.SRC} is no run; leave --params out")
    if args.adapters and (args.params == "ema" or args.DST is None or not Path(args.SRC).is_dir()):
        raise UserError("--adapters: expected SRC as a run, DST as a folder, and no average")
    return args


def main(argv: Sequence[str]) -> None:
    """Converts, and logs what was read and written."""
    args = parse_arguments(argv)
    with importing():
        from vit_jax.checkpoint.pretrained.convert import convert, convert_adapters
        from vit_jax.checkpoint.pretrained.load import load_pretrained
    weights = load_pretrained(f"{args.SRC}:ema_params" if args.params == "ema" else args.SRC)
    log_lines([args.SRC, *describe(weights)])
    if args.adapters:
        log_lines(convert_adapters(Path(args.SRC), args.DST))
    elif args.DST is not None:
        log_lines(convert(weights, args.DST))


if __name__ == "__main__":
    run_command(main)
