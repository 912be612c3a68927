# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of ways to fine-tune into the documentation, from results of the benchmark.

python -m tools.fine_tuning_tables
"""

import json
from pathlib import Path

from benchmarks.fine_tuning import TASKS, make_tables

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "finetuning.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- made by tools/fine_tuning_tables.py -->\n", "<!-- end -->\n"
TITLES = {
    "digits": "Digits, from 16 x 16 to 32 x 32 pixels",
    "cifar10": "CIFAR-10, from five classes to the other five, with 500 images of each",
}


def make_text(folder: Path) -> str:
    """Markdown: the tables of each task that the folder has results of."""
    parts = []
    for task in TASKS:
        file = folder / f"fine_tuning_{task}.json"
        if not file.exists():
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        seeds = sorted({row["seed"] for row in record["rows"] if "seed" in row})
        where = f"{record['machine']['cores']} cores of {record['machine']['cpu']}"
        parts.append(
            f"{TITLES[task]} (`benchmarks/results/{file.name}`, {len(seeds)} seeds, {where}):\n\n"
            f"{make_tables(record)}\n"
        )
    return "\n" + "".join(parts) if parts else ""


def renew(text: str) -> str:
    """Returns the page with the text between the two marks replaced."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{make_text(RESULTS)}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
