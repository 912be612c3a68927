# SPDX-License-Identifier: Apache-2.0
"""Writes the table of input speed into the documentation, from the results of the benchmark.

python -m tools.input_table
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "input.md"
RESULTS = ROOT / "benchmarks" / "results" / "input.json"
START, END = "<!-- made by tools/input_table.py -->\n", "<!-- end -->\n"
LABELS = {
    "vit_jax": "**vit_jax**",
    "vit_jax, packed": "vit_jax, packed at 256",
    "vit_jax, raw": "vit_jax, raw pixels at 256",
    "vit_jax, tar": "vit_jax, tar shards",
    "vit_jax_opencv": "vit_jax without the extension",
    "libjpeg_turbo": "libjpeg_turbo",
    "tf_data": "tf.data, as in big_vision",
    "timm": "timm: Pillow, PyTorch's DataLoader",
    "webdataset": "webdataset: tar shards, Pillow, processes",
    "datasets_streaming": "datasets, streaming: tar shards, Pillow, processes",
    "datasets_map": "datasets, copied to Arrow: Pillow, processes",
    "spdl": "spdl: tar shards, FFmpeg, threads",
}


def make_table(results: dict[str, Any]) -> str:
    """Markdown: a table for each kind of JPEGs, and where they were measured."""
    lines = []
    for kind, measured in results["results"].items():
        lines += [
            f"| {kind}, {measured['mean_kb']:.0f} KB | images/s a core | of vit_jax "
            "| images/s predicted | seen |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, row in measured["loaders"].items():
            core = row["images_per_core"]
            lines.append(
                f"| {LABELS[name]} | {core:,.0f} | {row['images_per_core_of_vit_jax']:.2f} "
                f"| {core * results['threads']:,.0f} | {row['images_per_sec']:,.0f} |"
            )
        lines.append("")
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines.append(
        f"Medians, and medians of the ratios of each round, on {results['date'][:10]}: "
        f"{machine['cores']} cores of {machine['cpu']}, {results['threads']} threads, load "
        f"{results['load_at_start'][0]} before and {results['load_at_end'][0]} after; {versions}."
    )
    return "\n".join(lines) + "\n"


def renew(text: str) -> str:
    """Returns the page with the text between the two marks replaced."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    table = make_table(json.loads(RESULTS.read_text(encoding="utf-8")))
    return f"{before}{START}{table}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
