# SPDX-License-Identifier: Apache-2.0
"""Images a second from a bucket that takes long to answer, beside those from the disk.

    python -m benchmarks.bucket_input --delay_ms 50

The bucket is `tools.bucket_server` on this machine, in a process of its own, which waits before
each answer. `one by one` is the same bucket without reading ahead. Tar shards and a pack of the
same JPEGs are read in a shuffled order, cropped to 224x224, by as many threads as there are cores.
The sources take turns, and medians over the rounds are shown.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from benchmarks.environment import write_results
from benchmarks.turns import ROOT
from tools.bucket_server import BucketServer

_PREPROCESS = "decode|inception_crop(224)|flip_lr"
_BATCH = 128


def write_shards(folder: Path, images: int) -> None:
    """Tar shards of 256 JPEGs of 500x375, in two classes."""
    rng = np.random.default_rng(0)
    for shard in range(-(-images // 256)):
        with tarfile.open(folder / f"train-{shard:03}.tar", "w") as tar:
            for number in range(shard * 256, min(shard * 256 + 256, images)):
                image = cv2.resize(rng.integers(0, 256, (24, 32, 3), np.uint8), (500, 375))
                jpeg = cv2.imencode(".jpg", image)[1].tobytes()
                for ending, content in (("jpg", jpeg), ("cls", b"%d" % (number % 2))):
                    info = tarfile.TarInfo(f"{number:06}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def serve(folder: str, delay_ms: float) -> None:
    """Serves the files of a folder until its standard input ends."""
    server = BucketServer("bucket")
    for path in Path(folder).rglob("*"):
        if path.is_file():
            server.put("bucket", path.relative_to(folder).as_posix(), path.read_bytes())
    server.delay = delay_ms / 1000
    print(json.dumps(server.variables()), flush=True)
    sys.stdin.read()


def images_a_second(name: str, steps: int, *, ahead: bool) -> float:
    """The rate of a source after its first batch."""
    from vit_jax.data.pipeline import DatasetSpec, train_batches
    from vit_jax.data.sources.ranges import BucketRanges

    spec = DatasetSpec(name, "train", _PREPROCESS, _BATCH, None, "data")
    read_ahead = BucketRanges.ahead
    if not ahead:
        BucketRanges.ahead = lambda *args: None
    try:
        loader = train_batches(spec, seed=0, step=0)
        next(loader)
        begun = time.perf_counter()
        for _ in range(steps):
            next(loader)
        seconds = time.perf_counter() - begun
        loader.close()
    finally:
        BucketRanges.ahead = read_ahead
    return steps * _BATCH / seconds


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--delay_ms", type=float, default=50)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8, help="batches of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        return serve(args.serve, args.delay_ms)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        (folder / "data").mkdir()
        write_shards(folder / "data", args.images)
        from vit_jax.data import pack

        pack.main([f"tar:{folder}/data/*.tar", f"{folder}/data/pack"])
        command = [sys.executable, "-m", "benchmarks.bucket_input", f"--delay_ms={args.delay_ms}"]
        server = subprocess.Popen(
            [*command, f"--serve={folder}/data"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        os.environ.update(json.loads(server.stdout.readline()))
        names = {
            "tar, disk": (f"tar:{folder}/data/train-*.tar", True),
            "tar, bucket": ("tar:gs://bucket/train-*.tar", True),
            "tar, bucket, one by one": ("tar:gs://bucket/train-*.tar", False),
            "packed, disk": (f"packed:{folder}/data/pack", True),
            "packed, bucket": ("packed:gs://bucket/pack", True),
        }
        rates: dict[str, list[float]] = {name: [] for name in names}
        try:
            for _, (name, (source, ahead)) in itertools.product(range(args.rounds), names.items()):
                rates[name].append(images_a_second(source, args.steps, ahead=ahead))
        finally:
            server.communicate()
    medians = {name: round(statistics.median(of)) for name, of in rates.items()}
    for name, median in medians.items():
        print(f"{name:<28} {median:>8,} images/s")
    if args.json:
        write_results(args.json, {"delay_ms": args.delay_ms, "images/s": medians})


if __name__ == "__main__":
    main(sys.argv[1:])
