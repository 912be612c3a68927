# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of speed into the documentation, from the results of the benchmarks.

python -m tools.performance_tables
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- made by tools/performance_tables.py from {} -->\n", "<!-- end -->\n"
PEERS = {
    "vit_jax": "**vit_jax**",
    "vit_jax_one_device": "vit_jax on one device",
    "vit_jax_tcmalloc": "vit_jax with tcmalloc",
    "flax_plain": "plain Flax and optax",
    "timm_eager": "timm",
    "timm_compile": "timm, `torch.compile`",
}


def make_step_table(results: dict[str, Any]) -> list[str]:
    """Of `benchmarks.step`."""
    lines = [
        "| model, batch | images/s | of ours | first step | peak memory |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for variant, found in results["results"].items():
        model = f"{variant.partition(':')[0]}, {found['batch_size']}"
        lines += [
            f"| {model}, {PEERS[name]} | {row['images_per_sec']:,.1f} "
            f"| {row['images_per_sec_of_vit_jax']:.2f} | {row['first_step_s']:.1f} s "
            f"| {row['peak_gib']:.1f} GiB |"
            for name, row in found["peers"].items()
        ]
    return lines


def make_profile_table(results: dict[str, Any]) -> list[str]:
    """Of `benchmarks.step_profile`."""
    found = results["results"]
    columns = [(variant, peer) for variant in found for peer in found[variant]]
    names = {"vit_jax": "vit_jax", "timm_eager": "timm"}
    kinds = next(iter(found[columns[0][0]].values()))
    return [
        f"| milliseconds of a step | {' | '.join(f'{v}, {names[p]}' for v, p in columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
        *(
            f"| {kind} | {' | '.join(f'{found[v][p][kind]:,.0f}' for v, p in columns)} |"
            for kind in kinds
            if any(found[v][p][kind] for v, p in columns)
        ),
    ]


def make_costs_table(results: dict[str, Any]) -> list[str]:
    """Of `benchmarks.costs`."""
    start, loop, save = (results["results"][part] for part in ("startup", "loop", "checkpoint"))
    seconds, step = start["seconds"], statistics.median(loop["step_ms"])
    rows = [
        ("`import jax`", f"{seconds['import_jax']:.2f} s"),
        ("`import jax, vit_jax`", f"{seconds['import_vit_jax']:.2f} s"),
        ("first step of `digits.py` after the command", f"{seconds['cold']:.1f} s"),
        ("the same, with a warm compile cache", f"{seconds['warm']:.1f} s"),
        (f"what the loop adds to steps of {step:.0f} ms", f"{loop['overhead']:.1%}"),
        (
            "the same, with images that are read and prepared on the cores of the steps",
            f"{loop['overhead_with_data']:.1%}",
        ),
        (f"a file of {save['bytes'] / 2**30:.2f} GiB is written and synced", _s(save, "raw_write")),
        ("the next step waits for a checkpoint of as many bytes", _s(save, "blocked")),
        ("until that is complete, with checksums", _s(save, "save")),
        ("the file is read", _s(save, "raw_read")),
        ("the checkpoint is verified and restored", _s(save, "restore")),
    ]
    return ["| what | takes |", "| --- | ---: |", *(f"| {a} | {b} |" for a, b in rows)]


def make_commands_table(results: dict[str, Any]) -> list[str]:
    """Of `benchmarks.commands`."""
    found = results["results"]
    help_rows = {name: row for name, row in found.items() if name.endswith(" --help")}
    slowest = max(help_rows, key=lambda name: help_rows[name]["seconds"])
    typos = ("an unknown command", "an unknown flag", "an unknown config", "a missing workdir")
    names = {
        "`python -c pass`": "python",
        "`import jax`": "import jax",
        f"help, the slowest of {len(help_rows)}: `{slowest}`": slowest,
        **{name: name for name in typos},
        "`vit_jax status WORKDIR`": "vit_jax status WORKDIR",
        "`vit_jax compare WORKDIR`": "vit_jax compare WORKDIR",
    }
    return [
        "| what | takes | of CPU |",
        "| --- | ---: | ---: |",
        *(
            f"| {what} | {found[name]['seconds']:.2f} s | {found[name]['cpu_seconds']:.2f} s |"
            for what, name in names.items()
        ),
    ]


def _s(results: dict[str, float], name: str) -> str:
    return f"{results[f'{name}_s']:.2f} s"


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "step_cpu.json": make_step_table,
    "step_profile.json": make_profile_table,
    "costs.json": make_costs_table,
    "commands.json": make_commands_table,
}


def describe(results: dict[str, Any]) -> str:
    """When, where and with what it was measured."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"Medians, on {results['date'][:10]}: {machine['cores']} cores of {machine['cpu']}, load "
        f"{results['load_at_start'][0]} before and {results['load_at_end'][0]} after; {versions}."
    )


def renew(text: str) -> str:
    """Returns the page with the text between the marks replaced."""
    for name, make_table in TABLES.items():
        start = START.format(name)
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(END)
        results = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        table = "\n".join([*make_table(results), "", describe(results)])
        text = f"{before}{start}{table}\n{END}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
