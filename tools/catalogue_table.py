# SPDX-License-Identifier: Apache-2.0
"""Writes the table of published checkpoints into the documentation, from the catalogue.

python -m tools.catalogue_table
"""

from collections.abc import Iterable
from pathlib import Path

from vit_jax.checkpoint.pretrained.catalogue import Published, load_catalogue

PAGE = Path(__file__).parent.parent / "docs" / "checkpoints.md"
START, END = "<!-- made by tools/catalogue_table.py -->\n", "<!-- end -->\n"


def make_table(catalogue: Iterable[Published]) -> str:
    """Returns the catalogue as a Markdown table, for the documentation."""
    lines = [
        "| name | `model` | pixels | trained on | classes | ImageNet top-1 | images/s | MiB |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for p in catalogue:
        classes = {"zero": "zeros", "none": "none"}.get(p.head, f"{p.num_classes:,}")
        top1 = "" if p.top1 is None else str(p.top1)
        speed = "" if p.images_per_sec is None else f"{p.images_per_sec:,.0f}"
        size = "" if p.size is None else f"{p.size / 2**20:,.0f}"
        name = f"**`{p.name}`**" if p.recommended else f"`{p.name}`"
        model = f"{p.model} {p.variant}"
        cells = (name, model, p.image_size, p.pretraining, classes, top1, speed, size)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def renew(text: str) -> str:
    """Returns the page with a new table between the two marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{make_table(load_catalogue().values())}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
