# SPDX-License-Identifier: Apache-2.0
r"""Finds a learning rate for a config: a range test, with a picture and a suggestion.

The first steps of the run are taken while the learning rate rises exponentially, until the loss
diverges. --output gets a page with the loss over the rate, and the numbers; weights are not kept.

Examples:
  python -m vit_jax.find_lr --config=configs/digits.py --output=runs/digits_lr
  python -m vit_jax.find_lr --config=configs/folder.py --config.data.name=folder:/data/birds \
      --config.data.batch_size=256 --output=runs/birds_lr --steps=400 --max_lr=0.1
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vit_jax.config.load import load_config, parse_overrides
from vit_jax.observe.console import log, log_lines, set_up
from vit_jax.pages.chart import Curve, plot_curves
from vit_jax.pages.html import make_card, make_page, make_section
from vit_jax.utils.command import CommandParser, local_path, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import check_fresh, fresh_folder
from vit_jax.utils.signals import importing
from vit_jax.utils.text import encode_text

if TYPE_CHECKING:
    from vit_jax.training.lr_range_test import LrRangeTest

PAGE, TABLE = "index.html", "rates.csv"
# Losses above this many times that of the start are left out of the picture.
_SHOWN = 1.1


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments, without overrides of the config; `UserError` if one is invalid."""
    parser = CommandParser(prog="python -m vit_jax.find_lr", description=__doc__)
    add = parser.add_argument
    add(
        "--config",
        help="Test this config: a file or a name, as in vit_jax.main. --config.KEY=VALUE overrides "
        "a key.",
    )
    add("--output", type=local_path, help="Make this folder for the page. It must not exist.")
    add("--steps", type=int, default=200, help="Take so many steps. The default is %(default)s.")
    add(
        "--min_lr",
        type=float,
        default=1e-6,
        help="Start with this learning rate. The default is %(default)s.",
    )
    add(
        "--max_lr",
        type=float,
        default=1.0,
        help="End with this learning rate. The default is %(default)s.",
    )
    args = parser.parse_args(argv)
    examples = {"config": "a config, such as digits", "output": "a new folder, such as runs/lr"}
    for name, example in examples.items():
        if not getattr(args, name):
            raise UserError(f"--{name} is missing: expected {example}; see {parser.prog} --help")
    return args


def describe(found: "LrRangeTest") -> list[str]:
    """Returns what the test found, as lines for the screen."""
    suggestion = found.suggestion
    if suggestion is None:
        return [
            found.end,
            "the loss did not fall: no learning rate is suggested; try more --steps, or a lower "
            "--min_lr",
        ]
    for_batch = "" if found.scale == 1 else f"; times {found.scale:.3g} for this batch size"
    return [
        found.end,
        f"the loss was lowest at {found.lowest:.3g}, and fell fastest at {found.fastest:.3g}",
        f"suggested: --config.optimizer.lr={suggestion:g} (the config has {found.lr:g}{for_batch})",
    ]


def make_lr_page(found: "LrRangeTest", *, title: str) -> str:
    """Returns the page of a test: the loss, and its moving average, over the learning rate."""
    import numpy as np

    x = np.log10(found.rates)
    shown = np.maximum(found.losses, found.smoothed) <= _SHOWN * max(found.losses[0], 1e-9)
    shown[0] = True  # The picture has a point in any case.
    curves = [
        Curve("loss of a step", list(zip(x[shown], found.losses[shown], strict=True)), color=7),
        Curve("moving average", list(zip(x[shown], found.smoothed[shown], strict=True)), color=0),
    ]
    if found.fastest is not None:
        at = int(np.argmin(np.abs(found.rates - found.fastest)))
        curves.append(Curve("falls fastest", [(x[at], found.smoothed[at])], color=4))
    chart = plot_curves(curves, label="training loss over the logarithm of the learning rate")
    card = make_card(
        "Training loss",
        chart,
        caption="over the base-10 logarithm of the learning rate: -3 is a rate of 0.001",
        wide=True,
    )
    return make_page(title, describe(found), [make_section("Range test", [card])])


def main(argv: Sequence[str]) -> None:
    """Runs the test, writes the folder and logs the suggestion."""
    overrides, rest = parse_overrides(list(argv))
    args = parse_arguments(rest)
    with importing():
        from vit_jax.config.cpu_devices import count_cpu_devices
        from vit_jax.runtime import compile_cache
        from vit_jax.runtime.cpu_devices import set_cpu_devices
        from vit_jax.training.lr_range_test import run_lr_range_test
    set_up(quiet=False)
    check_fresh(args.output)
    config = load_config(args.config, overrides)
    compile_cache.set_up(None)
    set_cpu_devices(count_cpu_devices(config.to_dict()))
    found = run_lr_range_test(config, steps=args.steps, min_lr=args.min_lr, max_lr=args.max_lr)
    rows = zip(found.rates, found.losses, found.smoothed, strict=True)
    table = [
        "lr,loss,smoothed_loss",
        *(f"{lr:.9g},{loss:.9g},{mean:.9g}" for lr, loss, mean in rows),
    ]
    with fresh_folder(args.output) as folder:
        page = make_lr_page(found, title=f"Learning-rate range test: {args.config}")
        (folder / PAGE).write_bytes(encode_text(page))
        (folder / TABLE).write_text("\n".join(table) + "\n")
    log_lines(describe(found))
    log(f"wrote {args.output / PAGE}, {args.output / TABLE}")


if __name__ == "__main__":
    run_command(main)
