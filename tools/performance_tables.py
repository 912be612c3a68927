# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of speed into the documentation, from the results of the benchmarks.

python -m tools.performance_tables
"""

import json
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
        f"| batches of {results['batch_size']} | images/s | of ours | first step | peak memory |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for variant, rows in results["results"].items():
        lines += [
            f"| {variant}, {PEERS[name]} | {row['images_per_sec']:,.1f} "
            f"| {row['images_per_sec_of_vit_jax']:.2f} | {row['first_step_s']:.1f} s "
            f"| {row['peak_gib']:.1f} GiB |"
            for name, row in rows.items()
        ]
    return lines


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "step_cpu.json": make_step_table,
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
    """The page with what stands between the marks made anew."""
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
