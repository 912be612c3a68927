# SPDX-License-Identifier: Apache-2.0
"""Writes `tests/testdata/datasets`: folders and a file as the library `datasets` writes them.

`order.json` has the grey values, labels and texts in the order in which the library reads them.
Needs an environment with `datasets` and Pillow:

  python tests/testdata/make_datasets_golden.py
"""

import json
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "datasets"
FEATURES = datasets.Features(
    {
        "img": datasets.Image(),
        "fine": datasets.ClassLabel(names=["auk", "bat", "crow"]),
        "text": datasets.Value("string"),
    }
)


def make(count: int) -> datasets.Dataset:
    """Images of one grey each, with a label and a text."""
    images = [Image.fromarray(np.full((8, 8, 3), grey, np.uint8)) for grey in range(count)]
    labels = [grey % 3 for grey in range(count)]
    texts = [f"grey {grey}" for grey in range(count)]
    return datasets.Dataset.from_dict(
        {"img": images, "fine": labels, "text": texts}, features=FEATURES
    )


def read(dataset: datasets.Dataset) -> list[tuple[int, int, str]]:
    """The grey value, label and text of each example."""
    return [(int(np.asarray(row["img"])[0, 0, 0]), row["fine"], row["text"]) for row in dataset]


def main() -> None:
    """Writes the folders."""
    train = make(25).shuffle(seed=1).filter(lambda row: row["fine"] < 2)
    both = datasets.DatasetDict(train=train, validation=make(4))
    both.save_to_disk(FOLDER / "saved", num_shards={"train": 2, "validation": 1})
    (FOLDER / "hub" / "data").mkdir(parents=True, exist_ok=True)
    make(6).to_parquet(FOLDER / "hub" / "data" / "train-00000-of-00001.parquet")
    order = {
        "saved": {split: read(dataset) for split, dataset in both.items()},
        "hub": {"train": read(make(6))},
    }
    (FOLDER / "order.json").write_text(json.dumps(order) + "\n")


if __name__ == "__main__":
    main()
