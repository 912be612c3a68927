# SPDX-License-Identifier: Apache-2.0
"""Speed with images of mixed sizes and aspects: packed, padded to the largest, and squashed.

    python -m benchmarks.mixed_sizes --images=photos.tar --workdir=runs/mixed_sizes \
        --json benchmarks/results/mixed_sizes.json

From the photographs of a tar file or a folder, 512 rectangles are cut by rule, with aspects from
1:3 to 3:1. Four of them share a row as in `configs/navit.py`, with sides that differ by a factor of
up to six: `packed`. `padded` gives each image a row as long as the largest of them, and `squashed`
resizes all to the square that has as many patches as an image has on average. On this machine the
input and the training step of a small model are measured, in seconds of CPU time, so that other
programs matter little. `--plan h200:1 v5e:2x2` predicts the steps of `configs/navit.py` for other
devices, whose compilers must be installed (see docs/pods.md).
"""

import argparse
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.environment import describe_environment
from vit_jax.benchmark.input import measure_speed
from vit_jax.config.load import load_config
from vit_jax.data.ops.patches import to_column
from vit_jax.data.pipeline import DatasetSpec, train_batches
from vit_jax.data.rows import Packing
from vit_jax.training.experiment import Experiment
from vit_jax.utils.errors import UserError

KINDS = ("packed", "padded", "squashed")
IMAGES, PER_ROW, SPREAD, PATCH = 512, 4, 6.0, 16
MOST_ASPECT, SHORTEST = 3.0, 0.5
# Patches of a row, and images of a batch, of the small model here and of configs/navit.py.
HERE, THERE = (256, 32), (1024, 256)


def write_images(photos: Path, folder: Path) -> Path:
    """Cuts rectangles out of photographs by rule, and writes them as JPEGs into a Parquet file."""
    path = folder / "train.parquet"
    if path.exists():
        return path
    if photos.is_dir():
        contents = [file.read_bytes() for file in sorted(photos.iterdir()) if file.is_file()]
    else:
        with tarfile.open(photos) as tar:
            members = sorted((m for m in tar if m.isfile()), key=lambda m: m.name)
            contents = [tar.extractfile(m).read() for m in members]  # type: ignore[union-attr]
    if not contents:
        raise UserError(f"--images={photos} has no files")
    rng, images = np.random.RandomState(0), []
    for number in range(IMAGES):
        image = Image.open(io.BytesIO(contents[number % len(contents)])).convert("RGB")
        aspect = np.exp(rng.uniform(-1, 1) * np.log(MOST_ASPECT))
        # The largest rectangle of this aspect, then a share of it.
        width = min(image.width, image.height * aspect) * rng.uniform(SHORTEST, 1)
        width, height = max(round(width), PATCH), max(round(width / aspect), PATCH)
        left, top = (
            rng.randint(max(a - b, 0) + 1)
            for a, b in ((image.width, width), (image.height, height))
        )
        stream = io.BytesIO()
        image.crop((left, top, left + width, top + height)).save(stream, "JPEG", quality=90)
        images.append(stream.getvalue())
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": [0, 1] * (IMAGES // 2)}), path)
    print(f"wrote {path}: {IMAGES} images", flush=True)
    return path


def list_changes(kind: str, tokens: int, batch_size: int, most: int) -> dict[str, Any]:
    """What the config of a kind changes in `configs/navit.py`, for rows of so many patches.

    `most` is the number of patches of the largest image.
    """
    side = round((tokens // PER_ROW) ** 0.5) * PATCH
    lines = {
        "packed": f"patches({PATCH}, {tokens})",
        "padded": f"patches({PATCH}, {most})",
        "squashed": f"resize({side}, method='bilinear_antialias')",
    }
    changes = {
        "data.preprocess": f"decode|{lines[kind]}",
        "data.batch_size": batch_size,
        "data.drop_patches": (0.0, 0.0),
    }
    if kind != "packed":
        changes |= {"data.images_per_row": 1, "data.size_spread": 1.0}
    return changes


def find_largest(spec: DatasetSpec) -> tuple[int, float]:
    """Patches of the largest image of packed rows, and the share of patches that are padding."""
    most, padding = 0, []
    for batch, _ in zip(
        train_batches(spec, seed=0, step=0), range(IMAGES // spec.batch_size), strict=False
    ):
        most = max(most, int(batch["grids"].prod(axis=-1).max()))
        padding.append(float((batch["places"][..., 0] == 0).mean()))
    return most, statistics.mean(padding)


def measure_input(path: Path, seconds: float) -> dict[str, Any]:
    """Images per second of CPU time of the input of each kind, and the share of cutting patches."""
    tokens, batch_size = HERE[0] * 4, 64
    results: dict[str, Any] = {}
    for kind in KINDS:
        changes = list_changes(kind, tokens, batch_size, tokens)
        packing = Packing(images_per_row=PER_ROW, size_spread=SPREAD) if kind == "packed" else None
        spec = _make_spec(path, changes, batch_size)
        if packing:
            spec = dataclasses.replace(spec, packing=packing)
        if kind == "padded":  # The line of NaFlex, with as many patches as `squashed`.
            line = f"decode|patches({PATCH}, {tokens // PER_ROW})"
            spec = dataclasses.replace(spec, preprocess=line)
        batches = train_batches(spec, seed=0, step=0)
        speed = measure_speed(batches, batch_size, seconds=seconds)
        batches.close()  # type: ignore[attr-defined]
        results["naflex" if kind == "padded" else kind] = {"images_per_core": speed.images_per_core}
    side = round((tokens // PER_ROW) ** 0.5)
    image = np.zeros((side * PATCH, side * PATCH, 3), np.uint8)
    start, count = time.process_time(), 0
    while time.process_time() - start < 1:
        to_column(image, size=PATCH, budget=side * side)
        count += 1
    patchify = (time.process_time() - start) / count
    for row in results.values():
        row["images_per_core"] = round(row["images_per_core"], 1)
    share = patchify * results["naflex"]["images_per_core"]
    return {"kinds": results, "patchify_seconds": patchify, "patchify_share": round(share, 4)}


def _make_spec(path: Path, changes: dict[str, Any], batch_size: int) -> DatasetSpec:
    return DatasetSpec(
        f"parquet:{path}", "train", changes["data.preprocess"], batch_size, None, "data"
    )


def measure_steps(path: Path, kind: str, most: int) -> dict[str, Any]:
    """Images per second of CPU time of training steps over all images, after the first step."""
    tokens, batch_size = HERE
    changes = list_changes(kind, tokens, batch_size, most)
    changes |= {
        "data.name": f"parquet:{path}",
        "data.split": "train",
        "model.variant": "Ti/16",
        "model.posemb_grid": (16, 16),
        "precision": "float32",
        "examples": None,
        "total_steps": 100,
        "optimizer.warmup_steps": 10,
        "evals": {},
    }
    experiment = Experiment.from_config(
        load_config("configs/navit.py", changes), devices=jax.devices()[:1]
    )
    state, seconds = experiment.init_state(), []
    stream, count = experiment.train_batches(0), range(IMAGES // batch_size)
    batches = [batch for batch, _ in zip(stream, count, strict=False)]
    state, metrics = experiment.train_step(state, batches[0])
    jax.block_until_ready(metrics)
    for batch in batches:
        start = time.process_time()
        state, metrics = experiment.train_step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.process_time() - start)
    return {"images_per_core": round(batch_size / statistics.median(seconds), 2)}


def predict_steps(kind: str, most: int, topology: str, cache: Path) -> dict[str, Any]:
    """Images a second of one device, as the planner predicts them."""
    tokens, batch_size = THERE
    changes = list_changes(kind, tokens, batch_size, most)
    command = [
        *(sys.executable, "-m", "vit_jax.plan", "--config=configs/navit.py", "--json"),
        *(f"--topology={topology}", "--num_classes=1000", f"--cache={cache}"),
        *(f"--config.{key}={value}" for key, value in changes.items()),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    plan = json.loads(done.stdout)
    per_device = plan["batch_size"] / plan["expected_seconds"] / plan["num_devices"]
    return {"images_per_sec": round(per_device, 1), "fits": plan["fits"], "batch_size": batch_size}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="a tar file or a folder")
    parser.add_argument("--workdir", type=Path, required=True, help="of the images and of plans")
    parser.add_argument(
        "--seconds", type=float, default=10, help="of each measurement of the input"
    )
    parser.add_argument("--plan", nargs="*", default=[], metavar="TOPOLOGY", help="such as h200:1")
    parser.add_argument("--json", type=Path, metavar="PATH", help="results; kept, and added to")
    args = parser.parse_args()

    path = write_images(args.images, args.workdir)
    results: dict[str, Any] = {}
    if args.json and args.json.exists():
        results = json.loads(args.json.read_text())

    def keep() -> None:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=2) + "\n")

    if "largest" not in results:
        results |= describe_environment("jax", "flax", "numpy")
        results["largest"] = {}
        for tokens, _ in (HERE, THERE):
            spec = _make_spec(path, list_changes("packed", tokens, 64, tokens), 64)
            packing = Packing(images_per_row=PER_ROW, size_spread=SPREAD)
            most, padding = find_largest(dataclasses.replace(spec, packing=packing))
            results["largest"][str(tokens)] = {"patches": most, "padding": round(padding, 4)}
        keep()
    if "input" not in results:
        results["input"] = measure_input(path, args.seconds)
        keep()
    largest = {tokens: results["largest"][str(tokens)]["patches"] for tokens, _ in (HERE, THERE)}
    steps = results.setdefault("steps", {})
    for kind in KINDS:
        if kind not in steps:
            steps[kind] = measure_steps(path, kind, largest[HERE[0]])
            print(f"{kind}: {steps[kind]}", flush=True)
            keep()
    plans = results.setdefault("predicted", {})
    for topology in args.plan:
        of_device = plans.setdefault(topology, {})
        for kind in KINDS:
            if kind not in of_device:
                of_device[kind] = predict_steps(kind, largest[THERE[0]], topology, args.workdir)
                print(f"{topology}, {kind}: {of_device[kind]}", flush=True)
                keep()
    keep()
    print(json.dumps(results["input"], indent=2))
    if args.json:
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
