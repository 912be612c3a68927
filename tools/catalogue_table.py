# SPDX-License-Identifier: Apache-2.0
"""Writes the table of published checkpoints into the documentation, from the catalogue.

python -m tools.catalogue_table
"""

from pathlib import Path

from vit_jax.checkpoint.pretrained.catalogue import load_catalogue, make_table

PAGE = Path(__file__).parent.parent / "docs" / "checkpoints.md"
START, END = "<!-- made by tools/catalogue_table.py -->\n", "<!-- end -->\n"


def renew(text: str) -> str:
    """The page with what stands between the two marks made anew."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{make_table(load_catalogue().values())}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
