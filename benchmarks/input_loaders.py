# SPDX-License-Identifier: Apache-2.0
"""The loaders that `benchmarks.input` compares; each is run in a process of its own.

    python benchmarks/input_loaders.py LOADER DATASET THREADS

After the line "ready", each line that is read from stdin is a number of seconds; for each, a line
of JSON is written, with the seconds up to the first batch and the memory of all processes too.
DATASET is `folder:PATH`, or a name for vit_jax; for the readers of shards, `PATH/*.tar`. This file
imports only what its loader needs, so that it runs in environments without vit_jax.
"""

import collections
import concurrent.futures
import glob
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
import threading
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


def crop(image):
    """The random crop of a Pillow image, as torchvision draws it, uint8 `[SIZE, SIZE, 3]`."""
    import numpy as np
    from PIL import Image

    box, flip = draw(*image.size)
    left, top, width, height = box
    size, box = (SIZE, SIZE), (left, top, left + width, top + height)
    made = image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box)
    return np.asarray(made.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else made)


def draw(width, height):
    """A part (left, top, width, height) of 5 to 100 % of an image, and whether to flip it."""
    for _ in range(10):
        area = width * height * random.uniform(0.05, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = random.randint(0, width - w), random.randint(0, height - h)
    return (left, top, w, h), random.random() < 0.5


def in_processes(make, threads):
    """Batches of the images that `make(worker)` yields in each of several processes.

    They are written to memory that all processes share, as PyTorch's DataLoader does it.
    """
    import numpy as np

    context, slots = multiprocessing.get_context("fork"), 2
    shape, nbytes = (BATCH, SIZE, SIZE, 3), BATCH * SIZE * SIZE * 3
    filled = context.SimpleQueue()
    memories = [context.RawArray("B", slots * nbytes) for _ in range(threads)]
    free = [context.SimpleQueue() for _ in range(threads)]

    def end_with(parent):
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    def work(worker, parent):
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
        random.seed(worker)
        try:
            images = make(worker)
            while True:
                slot = free[worker].get()
                memory = np.frombuffer(memories[worker], np.uint8, nbytes, slot * nbytes)
                for row in memory.reshape(shape):
                    row[:] = next(images)
                filled.put((worker, slot))
        finally:  # It has failed, with a traceback.
            filled.put((worker, None))

    for worker in range(threads):
        for slot in range(slots):
            free[worker].put(slot)
        context.Process(target=work, args=(worker, os.getpid()), daemon=True).start()
    while True:
        worker, slot = filled.get()
        if slot is None:
            sys.exit(f"process {worker} of the loader has failed")
        yield BATCH
        free[worker].put(slot)


def webdataset(dataset, threads):
    """Shards in a shuffled order, and a buffer of 1,000 images in each process."""

    def make(worker):
        import webdataset as wds

        shards = sorted(glob.glob(dataset))[worker::threads]
        data = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).repeat()
        data = data.shuffle(1000).decode("pil").to_tuple("jpg", "cls")
        return (crop(image) for image, _ in data)

    return in_processes(make, threads)


def datasets_streaming(dataset, threads):
    """As above, by Hugging Face's `datasets`."""

    def make(worker):
        data = open_datasets(dataset, streaming=True).shard(threads, worker)
        data = data.shuffle(seed=0, buffer_size=1000)
        for epoch in itertools.count():
            data.set_epoch(epoch)
            yield from (crop(row["jpg"]) for row in data)

    return in_processes(make, threads)


def datasets_map(dataset, threads):
    """All images in any order, after `datasets` has copied them into its own files."""
    data = open_datasets(dataset, streaming=False)

    def make(worker):
        while True:
            yield crop(data[random.randrange(len(data))]["jpg"])

    return in_processes(make, threads)


def open_datasets(dataset, *, streaming):
    import datasets

    files = {"train": sorted(glob.glob(dataset))}
    return datasets.load_dataset("webdataset", data_files=files, split="train", streaming=streaming)


def spdl(dataset, threads):
    """Threads, and FFmpeg's decoder and filters; the images of a shard in their order."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    def read():
        shards = sorted(glob.glob(dataset))
        while True:
            for shard in random.sample(shards, len(shards)):
                with open(shard, "rb") as file:
                    for name, content in spdl.io.iter_tarfile(file):
                        if name.endswith(".jpg"):
                            yield bytes(content)

    def decode(content):
        packets = spdl.io.demux_image(content)
        (left, top, width, height), flip = draw(packets.width, packets.height)
        line = f"crop={width}:{height}:{left}:{top},scale={SIZE}:{SIZE}:flags=bilinear"
        line += f"{',hflip' * flip},format=pix_fmts=rgb24"
        return spdl.io.decode_packets(packets, filter_desc=line)

    decode(next(read()))  # The pipeline would leave out what can't be decoded, and wait for ever.
    builder = PipelineBuilder().add_source(read()).pipe(decode, concurrency=threads)
    builder = builder.aggregate(BATCH).pipe(spdl.io.convert_frames)
    pipeline = builder.add_sink(2).build(num_threads=threads)
    pipeline.start()
    return (len(spdl.io.to_numpy(batch)) for batch in pipeline)


def folder(dataset):
    return os.path.join(dataset.partition(":")[2], "train")


OF_FOLDERS = (vit_jax, vit_jax_opencv, libjpeg_turbo, tf_data, timm)
OF_SHARDS = (webdataset, datasets_streaming, datasets_map, spdl)
LOADERS = {f.__name__: f for f in (*OF_FOLDERS, *OF_SHARDS)}


def cpu_seconds():
    """Of all processes of this session, of which this one is the leader."""
    ticks = sum(int(fields[11]) + int(fields[12]) for _, fields in of_session())
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mb():
    """Of all processes of this session, of which pages that are shared count once."""
    total = 0
    for process, _ in of_session():
        try:
            with open(f"/proc/{process}/smaps_rollup") as file:
                total += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
        except OSError:  # it has ended
            continue
    return total * 1024 / 1e6


def of_session():
    """The number and the fields of `stat`, after the name, of each process of this session."""
    me = str(os.getsid(0))
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path) as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[3] == me:
            yield path.split("/")[2], fields


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
    begun = time.perf_counter()
    counts = LOADERS[name](dataset, int(threads))
    next(counts)
    start_seconds = time.perf_counter() - begun
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
        result |= {"start_seconds": start_seconds, "memory_mb": memory_mb()}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
