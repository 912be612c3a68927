# SPDX-License-Identifier: Apache-2.0
"""The loaders that `benchmarks.input` compares; each is run in a process of its own.

    python benchmarks/input_loaders.py LOADER DATASET THREADS

After the line "ready", each line that is read from stdin is a number of seconds; for each, a line
of JSON is written. This file imports only what its loader needs, so that it runs in environments
without vit_jax.
"""

import collections
import concurrent.futures
import glob
import itertools
import json
import os
import random
import sys
import time
from pathlib import Path

SIZE, BATCH = 224, 128
PREPROCESS = f"decode|inception_crop({SIZE})|flip_lr"


def vit_jax(dataset, threads):
    from vit_jax.data.pipeline import DatasetSpec, train_batches

    spec = DatasetSpec(dataset, "train", PREPROCESS, BATCH, None, "data", num_threads=threads)
    return (len(batch["image"]) for batch in train_batches(spec, seed=0, step=0))


def vit_jax_opencv(dataset, threads):
    """As where the C extension could not be built."""
    from vit_jax.data.ops import fused

    fused.extension = None
    return vit_jax(dataset, threads)


def libjpeg_turbo(dataset, threads):
    """The C extension alone: files in memory, crops drawn before, nothing kept."""
    import numpy as np

    from vit_jax.data.ops import fused
    from vit_jax.data.ops.transforms import InceptionCrop

    files = [path.read_bytes() for path in sorted(Path(folder(dataset)).glob("*/*.jpg"))]
    rng, crop = np.random.default_rng(0), InceptionCrop(SIZE)
    parts = [crop.draw(*fused.extension.size(file)[:2], rng) for file in files]

    def decode(start):
        out = np.empty((SIZE, SIZE, 3), np.uint8)
        chosen = [i % len(files) for i in range(start, start + BATCH)]
        full, window = (SIZE, SIZE), (0, 0, SIZE, SIZE)
        jobs = [(files[i], out, parts[i], full, window, False) for i in chosen]
        assert all(fused.extension.decode(jobs))
        return BATCH

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        starts = itertools.count(0, BATCH)
        running = collections.deque(pool.submit(decode, next(starts)) for _ in range(threads))
        while True:
            yield running.popleft().result()
            running.append(pool.submit(decode, next(starts)))


def tf_data(dataset, threads):
    """As big_vision writes it: the crop is drawn from the header, then decoded and resized."""
    import tensorflow as tf

    def load(path):
        encoded = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(encoded),
            tf.zeros([0, 0, 4], tf.float32),
            area_range=(0.05, 1),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
        image = tf.cast(tf.image.resize(image, (SIZE, SIZE)), tf.uint8)
        return tf.image.random_flip_left_right(image)

    paths = sorted(glob.glob(f"{folder(dataset)}/*/*.jpg"))
    data = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
    data = data.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    data = data.batch(BATCH, drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.deterministic = False
    options.threading.max_intra_op_parallelism = 1
    options.threading.private_threadpool_size = threads
    return (len(image) for image in data.with_options(options).as_numpy_iterator())


def timm(dataset, threads):
    """Pillow in processes, with the transforms and the collation of timm's training."""
    import torch
    from timm.data import ImageDataset, create_transform
    from timm.data.loader import fast_collate

    transform = create_transform(
        SIZE,
        is_training=True,
        use_prefetcher=True,
        color_jitter=None,
        scale=(0.05, 1),
        interpolation="bilinear",
    )
    # One epoch has no end, so that workers are not restarted.
    images = ImageDataset(folder(dataset), transform=transform)
    endless = torch.utils.data.RandomSampler(images, replacement=True, num_samples=10**9)
    loader = torch.utils.data.DataLoader(
        images,
        BATCH,
        sampler=endless,
        num_workers=threads,
        collate_fn=fast_collate,
        drop_last=True,
    )
    return (len(image) for image, _ in loader)


def folder(dataset):
    return os.path.join(dataset.partition(":")[2], "train")


LOADERS = {f.__name__: f for f in (vit_jax, vit_jax_opencv, libjpeg_turbo, tf_data, timm)}


def cpu_seconds():
    """Of all processes of this session, of which this one is the leader."""
    total, me = 0, str(os.getsid(0))
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path) as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[3] == me:
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def wait_until_idle():
    """What is loaded ahead would take the time of the next loader."""
    used = cpu_seconds()
    while True:
        time.sleep(0.2)
        before, used = used, cpu_seconds()
        if used - before < 0.05:
            return


def main():
    name, dataset, threads = sys.argv[1:]
    random.seed(0)
    counts = LOADERS[name](dataset, int(threads))
    next(counts)
    wait_until_idle()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = float(line)
        # What was loaded ahead, while the others ran.
        start = time.perf_counter()
        while time.perf_counter() - start < seconds / 3:
            next(counts)
        start, cpu, images = time.perf_counter(), cpu_seconds(), 0
        while time.perf_counter() - start < seconds:
            images += next(counts)
        elapsed, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        wait_until_idle()
        result = {"images_per_sec": images / elapsed, "images_per_core": images / cpu}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
