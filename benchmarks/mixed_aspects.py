# SPDX-License-Identifier: Apache-2.0
"""Images of mixed aspects: a model that keeps the aspect (NaFlex) against one that squashes images.

    python -m benchmarks.mixed_aspects --source=folder:/data/cifar10 --workdir=runs/mixed_aspects \
        --json benchmarks/results/mixed_aspects.json

From each image of CIFAR-10 a rectangle is cut by rule: its aspect is drawn from 1:MOST to MOST:1,
its longer side is that of the image, its place is drawn, and it is enlarged by a factor of 1 to 2.
Both models are trained on the same rectangles with as many steps and the same settings; an image
has at most 64 patches of 4 x 4 pixels. NaFlex scales it to these with its aspect kept, the other
model resizes it to 32 x 32. The results are their accuracies on the rectangles of the test images.
The same command resumes where it was stopped; --steps shortens all runs, and --set changes keys of
the config of all of them, which the results state.
"""

import argparse
import io
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.environment import write_results
from vit_jax.data.ops.decode import decode_image
from vit_jax.data.sources import open_source
from vit_jax.observe.summary import last_results

MOST_ASPECT, MOST_SCALE = 3.0, 2.0
# The line of images before and after `flip_lr`, in training, and other overrides.
LINES = {"naflex": "patches(4, 64)", "squash": "resize(32, method='bilinear_antialias')"}
OVERRIDES = {"naflex": ("model.posemb_grid=(8, 8)",), "squash": ()}


def cut(image: np.ndarray, seed: int) -> Image.Image:
    """Cuts a rectangle out of an image, uint8 `[height, width, 3]`, and enlarges it, by rule."""
    rng = np.random.RandomState(seed)
    aspect = math.exp(rng.uniform(-1, 1) * math.log(MOST_ASPECT))  # width over height
    sides = np.array(image.shape[:2])
    height, width = np.rint(sides * (min(1, 1 / aspect), min(1, aspect))).astype(int)
    top, left = (rng.randint(space + 1) for space in sides - (height, width))
    scale = rng.uniform(1, MOST_SCALE)
    part = Image.fromarray(image[top : top + height, left : left + width])
    size = round(width * scale), round(height * scale)
    return part.resize(size, Image.Resampling.BICUBIC)


def write_data(args: argparse.Namespace) -> Path:
    """Writes the rectangles as Parquet files, one for each split, unless they are there."""
    folder = args.workdir / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(("train", "test")):
        path = folder / f"{split}.parquet"
        if path.exists():
            continue
        source = open_source(args.source, split, data_dir=None, key="--source")
        images, labels = [], []
        for i in range(len(source)):
            record, stream = source[i], io.BytesIO()
            cut(decode_image(record["image"]), seed=2 * i + number).save(stream, "PNG")
            images.append(stream.getvalue())
            labels.append(int(record["label"]))
        table = pa.table({"image": images, "label": labels, "split": [split] * len(labels)})
        fresh = path.with_suffix(".part")
        pq.write_table(table, fresh, row_group_size=1000)
        os.replace(fresh, path)
        print(f"wrote {path}: {len(labels):,} images", flush=True)
    return folder


def train(kind: str, seed: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the command, and returns the results on test as fractions."""
    workdir, line = args.workdir / f"{kind}_{seed}", LINES[kind]
    changes = {
        "data.name": f"parquet:{folder}",
        "data.preprocess": f"decode|flip_lr|{line}",
        "evals.test.preprocess": f"decode|{line}",
        "evals.val.preprocess": f"decode|{line}",
        "evals.val.every_percent": "25",
        "seed": str(seed),
    }
    given = [*(f"{key}={value}" for key, value in changes.items()), *OVERRIDES[kind], *args.set]
    if args.steps:
        given += ["epochs=none", f"total_steps={args.steps}"]
    command = [
        *(sys.executable, "-m", "vit_jax.main", "--config=configs/cifar10.py"),
        *(f"--workdir={workdir}", *(f"--config.{change}" for change in given)),
    ]
    subprocess.run(command, check=True)
    results = last_results(workdir)
    return {"seed": seed, **{name: results[f"test/{name}"] for name in ("top1", "loss", "count")}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="data.name, such as folder:/data/cifar10")
    parser.add_argument("--workdir", type=Path, required=True, help="of the data and the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="length of all runs in place of 20 epochs")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as model.hidden_size=64"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args()

    folder = write_data(args)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in LINES}
    for seed in args.seeds:
        for kind in LINES:
            runs[kind].append(train(kind, seed, folder, args))
    for kind, of_seeds in runs.items():
        scores = [run["top1"] for run in of_seeds]
        span = f"{min(scores):.2%} to {max(scores):.2%} over {len(scores)} seeds"
        print(f"{kind:<8} test accuracy: mean {statistics.mean(scores):.2%}, {span}")
    if args.json:
        measured = {
            "device": jax.devices()[0].device_kind,
            "steps": args.steps,
            "set": args.set,
            "runs": runs,
        }
        write_results(args.json, measured, "jax", "flax", "optax")


if __name__ == "__main__":
    main()
