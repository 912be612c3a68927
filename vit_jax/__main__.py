# SPDX-License-Identifier: Apache-2.0
"""Runs a command of the package: `vit_jax COMMAND ...`, or `python -m vit_jax COMMAND ...`."""

import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vit_jax import __version__
from vit_jax.checkpoint.pretrained.catalogue import count_repositories, list_models
from vit_jax.config.shipped import find_config, list_configs, read_docstring
from vit_jax.utils.command import CommandParser, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.streams import print_result
from vit_jax.utils.suggestions import find_near, suggest

USAGE = """\
usage: vit_jax COMMAND ...

Trains Vision Transformers with JAX, from one CPU to a pod, and uses what was trained.
Start with: vit_jax train --config=digits --workdir=runs/digits
"""

# The module of each command; the first line of its docstring says what it does.
COMMANDS = {
    "suggest": "suggest",
    "train": "main",
    "evaluate": "evaluate",
    "predict": "predict",
    "search": "search",
    "explain": "explain",
    "report": "report",
    "status": "status",
    "compare": "compare",
    "sweep": "sweep",
    "average": "average",
    "find_lr": "find_lr",
    "convert": "convert",
    "export": "export",
    "serve": "serve",
    "plan": "plan",
    "benchmark": "benchmark",
    "check": "data.check",
    "pack": "data.pack",
    "prepare": "data.prepare",
    "launch": "launch.local",
}


def show_configs(argv: Sequence[str]) -> None:
    """Prints the shipped configs, or the whole docstring of one."""
    parser = CommandParser(prog="vit_jax configs", description=show_configs.__doc__)
    parser.add_argument("name", nargs="?", help="config whose docstring is printed")
    name = parser.parse_args(argv).name
    if name is not None:
        path = find_config(name)
        print_result(f"{path}\n\n{read_docstring(path)}")
        return
    _print_table(list_configs())
    print_result(
        "\nvit_jax configs NAME prints more; vit_jax train --config=NAME --workdir=DIR trains."
    )


def show_models(argv: Sequence[str]) -> None:
    """Prints the published weights that `init_from`, `predict` and `load_model` take by name."""
    parser = CommandParser(prog="vit_jax models", description=show_models.__doc__)
    parser.add_argument(
        "text",
        nargs="*",
        help="print names that contain this text; of models of the Hugging Face hub also those "
        "whose family and licence do (clip 336 apache)",
    )
    text = " ".join(parser.parse_args(argv).text)
    found = list_models(text)
    if not found:
        near = find_near(text, list_models())
        raise UserError(
            f"no published weights are named {text!r}; "
            + (f"did you mean {near!r}?" if near else "`vit_jax models` prints all names")
            + " (other models of timm and Hugging Face are timm:NAME and hf:REPO)"
        )
    if text:
        _print_table(found)
        return
    _print_table({n: line for n, line in found.items() if not n.startswith(("timm:", "hf:"))})
    families = count_repositories()
    listed = ", ".join(f"{family} ({count})" for family, count in sorted(families.items()))
    print_result(
        f"\n{sum(families.values())} more are on the Hugging Face hub, of these families: {listed}."
        "\n`vit_jax models TEXT` prints those whose name, family or licence contains a text, such "
        "as `vit_jax models dinov3`; `vit_jax models timm:` and `vit_jax models hf:` print all."
    )


LISTINGS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "configs": show_configs,
    "models": show_models,
}


def describe_commands() -> dict[str, str]:
    """Returns what each command does, by name."""
    folder = Path(__file__).parent
    texts = {}
    for name, module in COMMANDS.items():
        path = folder.joinpath(*module.split("."))
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        texts[name] = read_docstring(file).partition("\n")[0]
    return texts | {name: listing.__doc__ or "" for name, listing in LISTINGS.items()}


def _print_table(rows: Mapping[str, str]) -> None:
    width = max(map(len, rows))
    for name, text in rows.items():
        print_result(f"  {name:<{width}}  {text}")


def main(argv: Sequence[str]) -> None:
    """Runs the command that the first argument names, with the arguments after it."""
    name, *rest = argv or ["--help"]
    if name == "help":  # `vit_jax help train`, as git has it.
        name, *rest = [*rest[:1], "--help"]
    if name in ("-h", "--help"):
        print_result(USAGE)
        _print_table(describe_commands())
        print_result("\nvit_jax COMMAND --help prints the arguments of a command.")
    elif name == "--version":
        print_result(__version__)
    elif name in LISTINGS:
        LISTINGS[name](rest)
    elif name in COMMANDS:
        sys.argv = [f"vit_jax {name}", *rest]
        runpy.run_module(f"vit_jax.{COMMANDS[name]}", run_name="__main__")
    elif name.startswith("-"):
        raise UserError(
            f"{name} comes before the command: expected a command first, such as "
            f"`vit_jax train {name}`"
        )
    else:
        raise UserError(f"{name!r} is not a command{suggest(name, [*COMMANDS, *LISTINGS])}")


def run() -> None:
    """The entry point of the console script."""
    run_command(main)


if __name__ == "__main__":
    run()
