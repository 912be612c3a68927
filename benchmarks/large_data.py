# SPDX-License-Identifier: Apache-2.0
"""Start-up, memory and the cost of the order for as many rows as the largest datasets have.

    python -m benchmarks.large_data --rows 20000000

The rows are invented: files of the right sizes without images. Each source is opened by a process
of its own, which opens the split, makes the order of training, and looks up 1,000 positions of a
shuffle of all rows, of windows of 16,384 rows, and of a mixture of the source with itself. Seconds
of the clock and of the processor are shown, and memory above that of the imports: what is held
after the start, and the most that was needed. `tar` is opened with its index, which the first start
on a machine makes, at the speed at which it reads shards.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.environment import write_results
from benchmarks.turns import ROOT

SOURCES = ("tar", "manifest", "raw")
_CLASSES, _WINDOW, _POSITIONS = 1000, 2**14, 1000
_TAR, _RAW = 10_000, 4096  # rows of a shard
_BYTES = 512 * 10  # of a sample in a tar file


def write_source(kind: str, folder: Path, rows: int) -> str:
    """Writes files that look like a dataset; returns its name."""
    return {"tar": _write_tar, "manifest": _write_manifest, "raw": _write_raw}[kind](folder, rows)


def _write_tar(folder: Path, rows: int) -> str:
    """Shards that are holes, and their indices."""
    from vit_jax.data.sources import tar_index
    from vit_jax.data.sources.ranges import LocalRanges
    from vit_jax.data.sources.tar import DEFAULT

    places = 512 + _BYTES * np.arange(_TAR, dtype=np.int64)
    for number, start in enumerate(range(0, rows, _TAR)):
        count, path = min(_TAR, rows - start), folder / f"train-{number:05}.tar"
        path.touch()
        os.truncate(path, _BYTES * (count + 1))
        values = np.arange(start, start + count) % _CLASSES
        codes, labels = np.unique(values, return_inverse=True)
        index = tar_index.Index(
            images=np.stack([places[:count], np.full(count, 4000)], axis=1),
            captions=np.zeros((count, 2), np.int64),
            labels=labels.astype(np.int32),
            counts=np.ones(count, np.int32),
            values=[f"class {code}" for code in codes],
            several=False,
            notes={},
            endings={"jpg": count, "cls": count},
        )
        names = [f"{row:09}.jpg" for row in range(start, start + count)]
        tar_index.store(LocalRanges([str(path)]), 0, DEFAULT, index, names)
    return f"tar:{folder}"


def _write_manifest(folder: Path, rows: int) -> str:
    (folder / "0.jpg").write_bytes(_jpeg())
    with open(folder / "rows.csv", "w") as file:
        file.write("image,label\n0.jpg,class 0\n")
        for row in range(1, rows):
            file.write(f"{row % _CLASSES}/{row:09}.jpg,class {row % _CLASSES}\n")
    return f"manifest:{folder}/rows.csv"


def _write_raw(folder: Path, rows: int) -> str:
    from vit_jax.data.sources.packed import MANIFEST, Manifest

    names = tuple(f"class {code}" for code in range(_CLASSES))
    manifest = Manifest("x", {"train": rows}, _CLASSES, False, names, None, None, 1, _RAW)
    (folder / MANIFEST).write_text(json.dumps(vars(manifest)))
    for shard in manifest.shards():
        labels = np.arange(shard.start, shard.stop, dtype=np.int32) % _CLASSES
        arrays = {"counts": np.ones_like(labels), "good": np.ones(len(labels), bool)}
        file = io.BytesIO()
        np.savez(file, labels=labels, **arrays)
        (folder / f"{shard.name}.npz").write_bytes(file.getvalue())
    (folder / "train.pixels").write_bytes(bytes(rows * 3))
    return f"raw:{folder}"


def _jpeg() -> bytes:
    import cv2

    return cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()


def measure(name: str) -> dict[str, float]:
    """Opens a dataset in this process; see the module."""
    from vit_jax.data.mixture import Mixture, make_schedule
    from vit_jax.data.order import Mixed, shuffled
    from vit_jax.data.sources import open_source

    before, begun, used = _rss(), time.perf_counter(), time.process_time()
    source = open_source(name, "train", data_dir=None, key="data.split")
    orders = {"shuffle": shuffled(source, seed=0)}
    orders["shuffle"][0]
    result = {
        "rows": float(len(source)),
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - used,
        "held_gb": _rss() - before,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9 - before,
    }
    begun = time.perf_counter()
    if source.shards() is not None:
        orders["window"] = shuffled(source, seed=0, window=_WINDOW)
        orders["window"][0]
        result["window_seconds"] = time.perf_counter() - begun
    schedule = make_schedule((0.7, 0.3), key="data.mixture")
    orders["mixture"] = Mixed(Mixture([source, source]), schedule, seed=0)
    for kind, order in orders.items():
        used = time.process_time()
        for position in range(_POSITIONS):
            order[position]
        result[f"{kind}_us"] = (time.process_time() - used) / _POSITIONS * 1e6
    result["all_gb"] = _rss() - before
    return result


def _rss() -> float:
    """Memory of this process in 10**9 bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def measure_apart(kind: str, rows: int, folder: Path) -> dict[str, float]:
    """Writes a source into an empty folder, and measures it in another process."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    (folder / "data").mkdir(parents=True)
    name = write_source(kind, folder / "data", rows)
    command = [sys.executable, "-m", "benchmarks.large_data", f"--open={name}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--sources", default=",".join(SOURCES), help="some of these")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--folder", type=Path, help="write the rows below it, 2 GB for 20 million")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.open:
        print(json.dumps(measure(args.open)))
        return
    results = {}
    for kind in args.sources.split(","):
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            results[kind] = found = measure_apart(kind, args.rows, Path(temporary))
        print(
            f"{kind:<9} {args.rows:>11,} rows: {found['seconds']:6.1f} s to start "
            f"({found['cpu_seconds']:.1f} s of a core), {found['held_gb']:.2f} GB held, "
            f"{found['peak_gb']:.2f} GB at most; "
            + ", ".join(f"{k[:-3]} {v:.0f} us" for k, v in found.items() if k.endswith("_us")),
            flush=True,
        )
    if args.json:
        write_results(args.json, {"sources": results}, "numpy")


if __name__ == "__main__":
    main(sys.argv[1:])
