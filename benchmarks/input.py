# SPDX-License-Identifier: Apache-2.0
"""Images a second of the input pipeline, beside those of other loaders on the same JPEGs.

    python -m benchmarks.input --images folder --json benchmarks/results/input.json

Tar shards of the same JPEGs are read by vit_jax, and by `webdataset`, Hugging Face's `datasets` and
`spdl` if `--shards_python` has these: `pip install webdataset datasets spdl Pillow`.

All give uint8 batches of 224x224, of random resized crops of 5 to 100 % of the area, flipped in
half of the cases. The loaders stay alive and take turns, a few seconds each, so that what else the
machine does hits all of them; none starts before the last one has filled its queues. Medians over
the rounds are shown, and medians of the ratios of each round. The JPEGs are made of photographs:
those in a folder, or else scikit-learn's two.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from benchmarks.environment import describe_environment, versions_of, write_results
from benchmarks.input_loaders import BATCH, OF_SHARDS
from benchmarks.turns import ROOT, compare, run, start
from vit_jax.data.ops import fused

# Width, height, quality and number of the JPEGs. An order of few records takes Grain long.
KINDS = {"500x375": (500, 375, 96, 4000), "1600x1200": (1600, 1200, 90, 1000)}
# The arguments of `vit_jax.data.pack`.
PACKS = {"packed": ("--short_side=256",), "raw": ("--raw=256",)}
# Packages whose versions matter, of the environments of the loaders.
VERSIONS = {
    "tf_data": "tensorflow-cpu",
    "timm": "torch timm Pillow",
    "shards": "webdataset datasets spdl Pillow",
}
# Columns that are shown without ratios: width and decimals.
_LAST = (("start_seconds", 10, 1), ("memory_mb", 8, 0))
_SHARD = 250  # images


def read_photos(folder: Path | None) -> list[np.ndarray]:
    """Photographs, BGR."""
    if folder is None:
        import sklearn.datasets  # takes seconds

        found = sklearn.datasets.load_sample_images().images
        return [np.ascontiguousarray(image[..., ::-1]) for image in found]
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    images = [cv2.imread(str(path)) for path in paths]
    if not images:
        sys.exit(f"--images={folder}: there are no .jpg, .jpeg or .png files in it")
    return [image for image in images if image is not None]


def write_jpegs(photos: list[np.ndarray], kind: str, folder: Path) -> None:
    """Crops of photographs at the size of `kind`, 4:2:0, in two classes, unless they are there."""
    width, height, quality, count = KINDS[kind]
    done = folder / "done"
    if done.exists() and done.read_text() == str(KINDS[kind]):
        return
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    sampling = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420)
    for number in range(count):
        photo = photos[number % len(photos)]
        # At most as large as the photo allows, so that its structures are not blown up further.
        scale = min(photo.shape[1] / width, photo.shape[0] / height) * rng.uniform(0.8, 1)
        w, h = int(width * scale), int(height * scale)
        x, y = rng.integers(photo.shape[1] - w + 1), rng.integers(photo.shape[0] - h + 1)
        way = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
        image = cv2.resize(photo[y : y + h, x : x + w], (width, height), interpolation=way)
        path = folder / "train" / "ab"[number % 2] / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling])
    done.write_text(str(KINDS[kind]))


def write_shards(jpegs: Path, folder: Path) -> str:
    """Tar shards of the JPEGs of a folder, in an order of their own; returns their pattern."""
    paths = sorted(jpegs.glob("train/*/*.jpg"))
    order = np.random.default_rng(0).permutation(len(paths))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, len(paths), _SHARD)):
        with tarfile.open(folder / f"train-{number:04}.tar", "w") as tar:
            for place in order[first : first + _SHARD]:
                path = paths[place]
                tar.add(path, f"{path.stem}.jpg")
                label = b"01"["ab".index(path.parent.name) :][:1]
                info = tarfile.TarInfo(f"{path.stem}.cls")
                info.size = len(label)
                tar.addfile(info, io.BytesIO(label))
    return f"{folder}/*.tar"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of photographs to make JPEGs of")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-input")
    parser.add_argument("--tf_python", help="an interpreter that has TensorFlow")
    parser.add_argument("--torch_python", help="an interpreter that has PyTorch and timm")
    parser.add_argument(
        "--shards_python", help="an interpreter that has webdataset, datasets, spdl and Pillow"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of these sizes")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3, help="of each turn")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results here")
    args = parser.parse_args(argv)
    pythons = {
        "tf_data": args.tf_python, "timm": args.torch_python, "shards": args.shards_python
    }  # fmt: skip
    pythons = {name: python for name, python in pythons.items() if python}
    for name in VERSIONS.keys() - pythons.keys():
        print(f"{name} is left out: no interpreter was given for it")

    if unknown := set(args.kinds.split(",")) - KINDS.keys():
        parser.error(f"--kinds={','.join(sorted(unknown))}: expected some of {', '.join(KINDS)}")
    # The first start of each loader is measured, which copies or indexes the shards.
    caches = args.folder / "caches"
    shutil.rmtree(caches, ignore_errors=True)
    os.environ |= {"XDG_CACHE_HOME": str(caches), "HF_HOME": str(caches / "huggingface")}

    load_at_start = [round(load, 1) for load in os.getloadavg()]
    environment = describe_environment("numpy", "opencv-python-headless", "grain")
    for name, python in pythons.items():
        environment["versions"] |= versions_of(python, VERSIONS[name])  # pyright: ignore
    photos, results = read_photos(args.images), {}
    for kind in args.kinds.split(","):
        folder = args.folder / f"{args.images.name if args.images else 'sklearn'}-{kind}"
        write_jpegs(photos, kind, folder)
        sizes = [path.stat().st_size for path in folder.glob("train/*/*.jpg")]
        entries = {"vit_jax": ("vit_jax", f"folder:{folder}")}
        for name, flags in PACKS.items():
            packed = folder.with_name(f"{folder.name}-{len(sizes)}-{name}")
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "vit_jax.data.pack",
                    f"folder:{folder}",
                    str(packed),
                    *flags,
                ],
                cwd=ROOT,
                check=True,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is reported once, by this process
            )
            entries[f"vit_jax, {name}"] = ("vit_jax", f"{name}:{packed}")
        shards = write_shards(folder, folder.with_name(f"{folder.name}-shards"))
        entries["vit_jax, tar"] = ("vit_jax", f"tar:{shards}")
        for name in ("vit_jax_opencv", "libjpeg_turbo", *(pythons.keys() - {"shards"})):
            entries[name] = (name, f"folder:{folder}")
        for name in (loader.__name__ for loader in OF_SHARDS if "shards" in pythons):
            entries[name] = (name, shards)
            pythons[name] = pythons["shards"]
        if fused.extension is None:
            print("the C extension was not built: vit_jax is vit_jax_opencv")
            del entries["libjpeg_turbo"]
        script, threads = str(ROOT / "benchmarks" / "input_loaders.py"), str(args.threads)
        commands = {
            name: (pythons.get(loader, sys.executable), script, loader, dataset, threads)
            for name, (loader, dataset) in entries.items()
        }
        with start(commands) as loaders:
            table = compare(
                loaders,
                ours="vit_jax",
                rounds=args.rounds,
                seconds=args.seconds,
                show="images_per_sec",
            )
        print(f"\n{kind}, {len(sizes)} JPEGs of {np.mean(sizes) / 1000:.0f} KB on average")
        print(
            f"{'loader':<20}{'images/s':>10}{'ratio':>8}{'a core':>10}{'ratio':>8}"
            f"{'start s':>10}{'MB':>8}"
        )
        for name, row in table.items():
            values = (row[key] for key in ("images_per_sec", "images_per_core"))
            ratios = (row[f"{key}_of_vit_jax"] for key in ("images_per_sec", "images_per_core"))
            pairs = (f"{v:>10,.0f}{r:>8.2f}" for v, r in zip(values, ratios, strict=True))
            last = "".join(f"{row[key]:>{n}.{d}f}" for key, n, d in _LAST)
            print(f"{name:<20}{''.join(pairs)}{last}", flush=True)
        results[kind] = {"mean_kb": round(float(np.mean(sizes)) / 1000, 1), "loaders": table}
    if args.json:
        notes = {
            "batch": BATCH,
            "threads": args.threads,
            "photos": "a folder" if args.images else "scikit-learn's",
            "load_at_start": load_at_start,
            "load_at_end": [round(load, 1) for load in os.getloadavg()],
        }
        write_results(args.json, environment | notes | {"results": results})


if __name__ == "__main__":
    run(main)
