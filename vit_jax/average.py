# SPDX-License-Identifier: Apache-2.0
r"""Averages the parameters of several fine-tuned models into one.

  uniform      the mean of all weights (a model soup, arXiv:2203.05482)
  greedy       the mean of those that help: weights are tried in the order of their own results,
               and one stays if the mean with it is not worse
  interpolate  two weights, (1 - a) times the first plus a times the second (WiSE-FT,
               arXiv:2109.01903), for each a of --alphas; the best one is kept

The runs should have started from the same weights. greedy and interpolate judge by --metric, from
the evaluators of the first workdir or of --config: choose a split that is not the test set. With
evaluators, uniform shows the results of all weights and of their mean too.

Examples:
  python -m vit_jax.average runs/a runs/b runs/c --output=soup.npz
  python -m vit_jax.average runs/a runs/b runs/c --method=greedy --metric=val/top1 --output=soup.npz
  python -m vit_jax.average runs/digits runs/tuned --method=interpolate --output=wise.safetensors
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax.checkpoint.workdir import is_workdir, read_config
from vit_jax.config.load import find_file, load_config, parse_overrides
from vit_jax.observe.console import log, log_lines, set_up
from vit_jax.utils.command import CommandParser, local_path, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.metrics import format_value
from vit_jax.utils.mirrors import find_local
from vit_jax.utils.registry import trust_parts
from vit_jax.utils.signals import importing
from vit_jax.utils.suggestions import suggest

if TYPE_CHECKING:
    from vit_jax.checkpoint.pretrained.averaging import Score
    from vit_jax.checkpoint.pretrained.weights import Weights

METHODS = ("uniform", "greedy", "interpolate")
_METRIC = "val/top1"
_ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments, without overrides of the config; `alphas` becomes numbers.

    Raises:
      UserError: an argument is invalid, or they do not go together.
    """
    parser = CommandParser(prog="python -m vit_jax.average", description=__doc__)
    add = parser.add_argument
    add(
        "SOURCE",
        nargs="*",
        help="Average these weights: workdirs, checkpoints or files, as --config.init_from takes "
        "them.",
    )
    add("--method", default="uniform", help=f"Use this one: {', '.join(METHODS)}.")
    add(
        "--output",
        type=local_path,
        metavar="FILE",
        help="Write this file, which must not exist and ends in .npz or .safetensors.",
    )
    add(
        "--config",
        help="Use the evaluators of this config in place of that of the first workdir. "
        "--config.KEY=VALUE overrides a key of either.",
    )
    add("--metric", help=f"Judge by this metric. The default is {_METRIC}.")
    add(
        "--alphas",
        metavar="A,B,...",
        help="Try these shares of the second weights. The default is 0 to 1 in steps of 0.1.",
    )
    parser.add_parts()
    args = parser.parse_args(argv)
    if args.method not in METHODS:
        raise UserError(f"--method={args.method}: it is unknown{suggest(args.method, METHODS)}")
    if args.output is None:
        raise UserError(f"--output is missing; see {parser.prog} --help")
    if args.output.suffix not in (".npz", ".safetensors"):
        raise UserError(
            f"--output={args.output}: expected a file that ends in .npz or .safetensors"
        )
    if args.output.exists():
        raise UserError(f"--output={args.output} exists; remove it, or choose another name")
    count = len(args.SOURCE)
    if count < 2 or (args.method == "interpolate" and count != 2):
        expected = "two" if args.method == "interpolate" else "two or more"
        raise UserError(
            f"{count} weights are given ({', '.join(args.SOURCE) or 'none'}): expected {expected}"
        )
    if args.alphas is not None and args.method != "interpolate":
        raise UserError(f"--alphas={args.alphas} is of --method=interpolate; leave it out")
    args.alphas = _ALPHAS if args.alphas is None else _parse_alphas(args.alphas)
    if args.config is not None:
        find_file(args.config)
    return args


def _parse_alphas(text: str) -> tuple[float, ...]:
    try:
        alphas = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        alphas = ()
    if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
        raise UserError(f"--alphas={text}: expected numbers from 0 to 1, such as 0,0.25,0.5")
    return alphas


def _make_score(
    config: dict[str, Any], overrides: dict[str, Any], metric: str | None
) -> tuple[str, "Score"]:
    """Returns the metric, and a function that evaluates weights and logs its value."""
    from vit_jax.evaluators.base import evaluate
    from vit_jax.training.evaluation import Judge, make_evaluation

    experiment = make_evaluation(config, overrides)
    found = {f"{e.name}/{name}": e.name for e in experiment.evaluators for name in e.metrics}
    metric = metric or (_METRIC if _METRIC in found else next(iter(found)))
    if metric not in found:
        raise UserError(f"--metric={metric}: it is unknown{suggest(metric, found)}")
    judge = Judge(experiment)

    def score(weights: "Weights", name: str) -> float:
        # What an average is of has been logged.
        params = judge.place(dataclasses.replace(weights, notes=()), name)
        evaluator = next(e for e in judge.evaluators if e.name == found[metric])
        value = evaluate(evaluator, params, None)[metric]
        log(f"  {name:<30} {metric} {format_value(metric, value)}")
        return value

    return metric, score


def main(argv: Sequence[str]) -> None:
    """Averages, evaluates on the way, and writes the file."""
    overrides, rest = parse_overrides(list(argv))
    args = parse_arguments(rest)
    trust_parts(args.parts)
    set_up(quiet=False)
    with importing():
        from vit_jax.checkpoint.pretrained.averaging import (
            average,
            average_greedily,
            check_alike,
            interpolate,
        )
        from vit_jax.checkpoint.pretrained.convert import check_destination, convert
        from vit_jax.checkpoint.pretrained.hub import find_weights
        from vit_jax.checkpoint.pretrained.load import load_pretrained
    check_destination(args.output, key="--output")
    names = [find_local(name, key="SOURCE") for name in args.SOURCE]
    # A folder of the Hugging Face hub has a config too.
    runs = [p for p in map(Path, names) if is_workdir(p) and find_weights(p) is None]
    config = None
    if args.config is not None:
        config = load_config(args.config, {}).to_dict()
    elif runs:
        config = read_config(runs[0])
    elif args.method != "uniform" or args.metric is not None:
        raise UserError(
            f"--method={args.method}: none of {', '.join(names)} is a workdir with evaluators; "
            "expected --config"
        )
    weights = [load_pretrained(name) for name in names]
    check_alike(weights, names)
    metric, score = "", None
    if config is not None:
        metric, score = _make_score(config, overrides, args.metric)
    if score and args.method == "greedy":
        result = average_greedily(weights, names, score, metric=metric)
    elif score and args.method == "interpolate":
        result = interpolate(weights, names, score, metric=metric, alphas=args.alphas)
    else:
        note = f"the mean of {', '.join(names)}"
        result = average(weights, [1 / len(weights)] * len(weights), note=note)
        if score:
            for w, name in zip((*weights, result), (*names, "their mean"), strict=True):
                score(w, name)
        else:
            log("not evaluated: --config names a config with evaluators")
    log_lines(convert(result, args.output))


if __name__ == "__main__":
    run_command(main)
