# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of images of mixed sizes and aspects into the documentation.

python -m tools.mixed_tables
"""

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "any_resolution.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- made by tools/mixed_tables.py from {} -->\n", "<!-- end -->\n"
ROWS = {
    "packed": "packed, four in a row",
    "padded": "a row each, padded to the largest",
    "squashed": "squashed to a square",
}


def make_speed_table(results: dict[str, Any]) -> list[str]:
    """Of `benchmarks.mixed_sizes`."""
    topologies = [name for name, rows in results["predicted"].items() if rows]
    titles = [f"{name}, images/s predicted" for name in topologies]
    lines = [
        " | ".join(["| images", "images/s of a core", "of packed", *titles]) + " |",
        "| --- |" + " ---: |" * (2 + len(topologies)),
    ]
    packed = results["steps"]["packed"]["images_per_core"]
    for kind, name in ROWS.items():
        speed = results["steps"][kind]["images_per_core"]
        others = [_format_speed(results["predicted"][t].get(kind)) for t in topologies]
        lines.append(
            " | ".join([f"| {name}", f"{speed:.1f}", f"{speed / packed:.2f}", *others]) + " |"
        )
    read = results["input"]["kinds"]
    return [
        *lines,
        "",
        f"The input prepares {read['packed']['images_per_core']:,.0f} packed images a second of a "
        f"core, {read['naflex']['images_per_core']:,.0f} of NaFlex and "
        f"{read['squashed']['images_per_core']:,.0f} squares of as many patches; cutting patches "
        f"is {results['input']['patchify_share']:.1%} of it. Of the patches of packed rows "
        f"{results['largest']['1024']['padding']:.1%} are padding. {_where(results)}",
    ]


def _format_speed(predicted: dict[str, Any] | None) -> str:
    return "not compiled" if predicted is None else f"{predicted['images_per_sec']:,.0f}"


def make_accuracy_table(results: dict[str, Any]) -> list[str]:
    """Of `benchmarks.mixed_aspects`."""
    names = {"naflex": "NaFlex", "squash": "squashed to 32 x 32"}
    lines = ["| model | test accuracy | seeds |", "| --- | ---: | --- |"]
    for kind, runs in results["runs"].items():
        scores = [run["top1"] for run in runs]
        each = ", ".join(f"{score:.1%}" for score in scores)
        lines.append(f"| {names[kind]} | {statistics.mean(scores):.1%} | {each} |")
    changes = ", ".join(f"`{change}`" for change in results["set"])
    return [*lines, "", f"{results['steps']:,} steps; {changes}. {_where(results)}"]


def _where(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{results['date'][:10]}, {machine['cores']} cores of {machine['cpu']}; {versions}."


TABLES = {"mixed_sizes.json": make_speed_table, "mixed_aspects.json": make_accuracy_table}


def renew(text: str) -> str:
    """Returns the page with the text between the marks of each table replaced."""
    for name, make in TABLES.items():
        before, start, rest = text.partition(START.format(name))
        if not start:
            continue
        _, _, after = rest.partition(END)
        results = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        text = f"{before}{start}" + "\n".join(make(results)) + f"\n{END}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
