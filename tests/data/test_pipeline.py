# SPDX-License-Identifier: Apache-2.0
"""Batches by position."""

import dataclasses
import hashlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import cv2
import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.ops import transforms as image_ops
from vit_jax.data.ops.decode import ImageError
from vit_jax.data.ops.transforms import apply
from vit_jax.data.pipeline import (
    Buffers,
    DatasetSpec,
    eval_batches,
    find_shapes,
    plan_buffers,
    train_batches,
)
from vit_jax.utils.errors import UserError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def digits(data_dir):
    """50 digits with random shifts, 16 a batch."""
    return DatasetSpec(
        name="digits",
        split="train[:50]",
        preprocess="decode|random_shift(2)",
        batch_size=16,
        data_dir=data_dir,
        key="data",
    )


@pytest.fixture(scope="module")
def records(data_dir):
    """The 50 digits as TFDS gives them, each as (pixels, label), in the order of the files."""
    source = tfds.data_source("digits", split="train[:50]", data_dir=data_dir)
    return [(r["image"].repeat(3, axis=-1).tobytes(), int(r["label"])) for r in source]


def stripes(data_dir, preprocess):
    return DatasetSpec("stripes", "train", preprocess, 8, data_dir, "data")


def take(batches, count):
    return list(itertools.islice(batches, count))


def train(spec, steps, *, seed=0, step=0, **hosts):
    return take(train_batches(spec, seed=seed, step=step, **hosts), steps)


def examples(batches):
    """(pixels, label) of each example."""
    images = np.concatenate([b["image"] for b in batches])
    labels = np.concatenate([b["label"] for b in batches])
    return [(i.tobytes(), int(label)) for i, label in zip(images, labels, strict=True)]


def join(parts):
    """One batch from the parts of all hosts."""
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def plain(spec):
    return dataclasses.replace(spec, preprocess="decode")


# Training batches


def test_train_batches_are_uint8_images_and_int32_labels(digits):
    (batch,) = train(digits, 1)
    assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
        "image": (np.uint8, (16, 8, 8, 3)),
        "label": (np.int32, (16,)),
    }


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_batch_is_the_same_from_any_first_step(step, digits):
    assert_same(train(digits, 10)[step:], train(digits, 10 - step, step=step))


def test_a_far_step_is_there_at_once_and_belongs_to_its_position(digits):
    # Both are positions 16,000,000 to 16,000,016.
    whole = train(digits, 1, step=1_000_000)
    halves = train(dataclasses.replace(digits, batch_size=8), 2, step=2_000_000)
    assert_same([join(halves)], whole)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_load_the_batch_of_one_host(hosts, digits):
    parts = [train(digits, 5, step=2, shards=(host,), num_shards=hosts) for host in range(hosts)]
    assert {len(b["label"]) for part in parts for b in part} == {16 // hosts}
    assert_same([join(part) for part in zip(*parts, strict=True)], train(digits, 5, step=2))


def test_threads_do_not_change_the_batches(digits):
    one, three = (train(dataclasses.replace(digits, num_threads=n), 12, seed=3) for n in (0, 3))
    assert_same(one, three)


def test_each_epoch_of_positions_holds_every_example_once_in_an_order_of_its_own(digits, records):
    stream = examples(train(plain(digits), 10))
    epochs = [stream[start : start + 50] for start in (0, 50, 100)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(records)
    assert records not in epochs
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_other_seeds_give_another_order(digits):
    orders = {seed: examples(train(plain(digits), 10, seed=seed)) for seed in (0, 1, 2)}
    # Nor may an epoch of one seed come again as a later epoch of another.
    epochs = [tuple(order[i : i + 50]) for order in orders.values() for i in (0, 50, 100)]
    assert len(set(epochs)) == 9


def test_augmentation_does_not_change_the_order(digits):
    assert [b["label"].tolist() for b in train(digits, 5)] == [
        b["label"].tolist() for b in train(plain(digits), 5)
    ]


def test_a_record_is_augmented_differently_in_each_epoch(digits):
    spec = dataclasses.replace(digits, split="train[:16]")  # a step is an epoch
    seen = {}
    for original, augmented in zip(train(plain(spec), 6), train(spec, 6), strict=True):
        for record, image in zip(examples([original]), examples([augmented]), strict=True):
            seen.setdefault(record, []).append(image)
    # Of 25 shifts, six draws give 5.4 different ones on average.
    assert np.mean([len(set(images)) for images in seen.values()]) > 4


@pytest.mark.parametrize("shards", [(0,), (1, 2)])
@pytest.mark.parametrize("step", [0, 1000])
def test_examples_and_their_random_choices_are_those_of_grain(step, shards, digits):
    num_shards = 1 if shards == (0,) else 4
    source, ops = digits.open(), digits.ops()
    examples = grain.MapDataset.source(source).seed(5).shuffle().repeat()
    examples = examples.random_map(lambda record, rng: apply(ops, record, rng))
    block = 16 // num_shards
    for offset, batch in enumerate(
        train(digits, 3, seed=5, step=step, shards=shards, num_shards=num_shards)
    ):
        first = (step + offset) * 16
        want = [examples[first + s * block + i] for s in shards for i in range(block)]
        np.testing.assert_array_equal(batch["image"], [w["image"] for w in want])
        np.testing.assert_array_equal(batch["label"], [w["label"] for w in want])


def test_order_and_augmentation_stay_as_they_are(digits):
    # Written once, when Grain still decoded: a checkpoint of then must see the same examples now.
    (batch,) = train(digits, 1, seed=3, step=11)
    assert batch["label"].tolist() == [9, 0, 0, 4, 8, 4, 2, 4, 3, 9, 4, 3, 6, 1, 9, 5]
    assert (
        hashlib.sha256(batch["image"].tobytes()).hexdigest()
        == "895198b56cf248b3d4659c3fd72d1fe89fcecc1ab51de17978f3ace27b45f8b2"
    )


def test_an_error_in_a_record_comes_in_one_line_and_ends_the_threads(digits, monkeypatch):
    spec = dataclasses.replace(digits, preprocess="decode")
    batches = train_batches(spec, seed=0, step=0)
    monkeypatch.setattr(image_ops, "decode_image", lambda *_, **__: np.zeros((8, 8, 1), np.uint8))
    with pytest.raises(UserError, match=r"^data.preprocess='decode' made an image of uint8 \(8, 8"):
        next(batches)
    assert list(batches) == []


REFUSALS = {
    "decode|central_crop(56)": r"small.png: central_crop\(56\) of a 40x90 image",
    "decode|random_crop(48)|resize(8)": r"small.png: random_crop\(48\) of a 40x90 image",
    "decode|resize_long(60)|central_crop(30)": r"small.png: central_crop\(30\) of a 27x60 image",
    "decode|resize_small(60)|central_crop(40)": r"strip.png: an image of 2400000x60 pixels",
}


@pytest.mark.parametrize("line", REFUSALS)
def test_an_image_that_an_operation_refuses_counts_as_corrupt(line, tmp_path, caplog):
    for name, size in {"small": (40, 90), "strip": (1, 40_000)}.items():
        for number in range(2):
            (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
            path = tmp_path / "train" / "a" / f"{number}{name}.png"
            cv2.imwrite(str(path), np.full((*size, 3), 9, np.uint8))
    cv2.imwrite(str(tmp_path / "train" / "a" / "good.png"), np.full((70, 70, 3), 100, np.uint8))
    corrupt = CorruptCounter()
    spec = DatasetSpec(f"folder:{tmp_path}", "train", line, 8, None, "data", num_threads=0)
    (evaluated,) = eval_batches(spec, corrupt=corrupt)
    assert evaluated["mask"].sum() == 5 - corrupt.counts.corrupt
    assert evaluated["mask"][-1] == 0
    assert corrupt.counts.corrupt >= 2
    assert re.search(REFUSALS[line], caplog.text)
    for batch in itertools.islice(train_batches(spec, seed=0, step=0, corrupt=corrupt), 2):
        assert batch["image"].any(axis=(1, 2, 3)).all()
    assert corrupt.counts.lost == 0


def test_an_error_of_opencv_is_the_image_s(monkeypatch):
    monkeypatch.setattr(image_ops, "resize_image", lambda *_: cv2.resize(np.zeros((0, 0)), (1, 1)))
    ops = [image_ops.Resize(8)]
    with pytest.raises(
        ImageError, match=r"Resize\(height=8.*\) of an image of \[4, 5, 3\]: \(-215"
    ):
        apply(ops, {"image": np.zeros((4, 5, 3), np.uint8)}, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("decode|resize(20000)", "'resize(20000)': an image of 20000x20000 pixels: expected 1 to"),
        ("decode|resize(2, 10000000000)", "10000000000x2 pixels"),
        ("decode|resize_small(20000)|central_crop(8)", "30000x20000 pixels"),
        ("decode|resize_long(30000)|resize(8)", "30000x20000 pixels"),
        ("decode|inception_crop(30000)", "30000x30000 pixels"),
        ("decode|pad(30000)|resize(8)", "60096x60064 pixels"),
        ("decode|pad_to(30000)|resize(8)", "30000x30000 pixels"),
        ("decode|random_shift(30000)|resize(8)", "60096x60064 pixels"),
        ("decode|central_crop(30000)", "central_crop(30000) of a 64x96 image: put"),
    ],
)
def test_a_line_whose_images_are_too_large_is_refused(line, words):
    with pytest.raises(UserError, match=r"^data.preprocess: ") as error:
        find_shapes(line, (None, None, 3), key="data.preprocess")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_other_seeds_augment_differently(digits):
    spec = dataclasses.replace(digits, split="train[:1]")  # 16 times the same record
    zero, one = (train(spec, 1, seed=seed)[0]["image"] for seed in (0, 1))
    assert len(set(map(bytes, zero))) > 4
    assert not np.array_equal(zero, one)


# Memory


def test_memory_for_batches_is_planned_and_limited(digits):
    batch = 16 * 8 * 8 * 3
    spec = dataclasses.replace(digits, num_threads=4)
    free = plan_buffers(spec)
    assert free.nbytes == (free.ahead + 2) * batch
    assert free.ahead > 2
    assert plan_buffers(spec, num_shards=4, shards=2).nbytes < free.nbytes
    limited = dataclasses.replace(spec, max_ram_gb=4.5 * batch / 1e9)
    assert plan_buffers(limited) == Buffers(2, 4 * batch)
    assert_same(train(limited, 10), train(spec, 10))
    with pytest.raises(
        UserError, match=r"^data\.max_ram_gb=1e-06: 3 batches of [\d.]+ kB.*batch_size"
    ):
        plan_buffers(dataclasses.replace(spec, max_ram_gb=1e-6))


RESIDENT = """
import sys
from vit_jax.data.pipeline import DatasetSpec, train_batches

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

line = "decode|random_shift(1)"
spec = DatasetSpec("digits", "train", line, 16, sys.argv[1], "data", num_threads=2)
sizes = []
for step, batch in enumerate(train_batches(spec, seed=0, step=0)):
    if step % 1000 == 0:
        sizes.append(resident())
    if step == 10_000:
        break
print(sizes[-1] - sizes[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_the_same_over_ten_thousand_batches(data_dir):
    command = [sys.executable, "-c", RESIDENT, data_dir]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3_000_000


# Evaluation batches


@pytest.mark.parametrize("batch_size", [8, 16, 64])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_sees_each_example_once_in_order(batch_size, hosts, digits, records):
    spec = dataclasses.replace(plain(digits), batch_size=batch_size)
    parts = [list(eval_batches(spec, shards=(host,), num_shards=hosts)) for host in range(hosts)]
    assert [len(part) for part in parts] == [-(-50 // batch_size)] * hosts
    batches = [join(part) for part in zip(*parts, strict=True)]
    for batch in batches:
        assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
            "image": (np.uint8, (batch_size, 8, 8, 3)),
            "label": (np.int32, (batch_size,)),
            "mask": (np.float32, (batch_size,)),
        }
    mask = np.concatenate([b["mask"] for b in batches])
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < 50)
    assert examples(batches)[:50] == records


def test_a_split_that_fills_its_batches_is_not_padded(digits):
    spec = dataclasses.replace(plain(digits), batch_size=10)
    assert [b["mask"].sum() for b in eval_batches(spec)] == [10] * 5


# Shapes


def test_image_shape_is_known_without_data(tmp_path):
    spec = DatasetSpec("digits", "train", "decode|resize(12, 20)", 8, str(tmp_path), "data")
    assert spec.image_shape() == (12, 20, 3)
    assert dataclasses.replace(spec, preprocess="decode").image_shape() == (8, 8, 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "preprocess",
    ["decode|resize(24)", "decode|resize_small(24)|central_crop(24)", "decode|inception_crop(24)"],
)
def test_images_of_varying_size_are_read_at_one_size(preprocess, stripes_dir):
    spec = stripes(stripes_dir, preprocess)
    assert spec.image_shape() == (24, 24, 3)
    batches = train(spec, 8)
    assert {b["image"].shape for b in batches} == {(8, 24, 24, 3)}
    labels = np.concatenate([b["label"] for b in batches])
    assert np.bincount(labels).tolist() == [32, 32]


def test_labels_stay_with_their_images(stripes_dir):
    for batch in train(stripes(stripes_dir, "decode|central_crop(32)"), 8):
        image = batch["image"].astype(np.float32).mean(-1)
        down, across = image.mean(2).std(1), image.mean(1).std(1)
        np.testing.assert_array_equal(down > across, batch["label"] == 1)


@pytest.mark.parametrize("preprocess", ["decode", "decode|flip_lr", "decode|resize_small(24)"])
def test_preprocessing_that_leaves_different_sizes_is_refused(preprocess, stripes_dir):
    with pytest.raises(UserError, match=r"data\.preprocess=.* different sizes: add resize\(SIZE\)"):
        stripes(stripes_dir, preprocess).image_shape()


@pytest.mark.parametrize("preprocess", ["flip_lr", "resize(8)", "flip_lr|decode", "decode|decode"])
def test_preprocessing_that_does_not_start_with_decode_is_refused(preprocess, digits):
    spec = dataclasses.replace(digits, preprocess=preprocess)
    with pytest.raises(UserError, match=r"data\.preprocess=.*'decode'"):
        spec.image_shape()


@pytest.mark.parametrize("batch_size", [16, 256])
def test_blocks_of_a_host_need_not_be_neighbours(batch_size, digits):
    spec = dataclasses.replace(digits, split="train", batch_size=batch_size)
    (whole,) = train(spec, 1, step=3)
    parts = [train(spec, 1, step=3, shards=s, num_shards=4)[0] for s in ((0, 3), (1, 2))]
    blocks = [np.split(part["image"], 2) for part in parts]
    together = [blocks[0][0], blocks[1][0], blocks[1][1], blocks[0][1]]
    np.testing.assert_array_equal(np.concatenate(together), whole["image"])


def test_repeated_images_stand_in_one_batch_and_are_augmented_each_time(digits):
    spec = dataclasses.replace(digits, preprocess="decode", repeats=4)
    plain = dataclasses.replace(digits, preprocess="decode", batch_size=4)
    first = take(train_batches(plain, seed=3, step=0), 2)
    batches = take(train_batches(spec, seed=3, step=0), 2)
    for batch, once in zip(batches, first, strict=True):
        np.testing.assert_array_equal(batch["image"], np.concatenate([once["image"]] * 4))
    shifted = take(train_batches(dataclasses.replace(digits, repeats=4), seed=3, step=0), 1)[0]
    copies = shifted["image"].reshape(4, 4, -1)
    assert all(len({copy.tobytes() for copy in copies[:, i]}) > 1 for i in range(4))


def test_repeats_are_arithmetic_of_position(digits):
    """The same for any hosts and after resuming; a rest leaves some images with a copy less."""
    spec = dataclasses.replace(digits, repeats=3)
    whole = take(train_batches(spec, seed=0, step=0), 3)
    resumed = take(train_batches(spec, seed=0, step=2), 1)
    np.testing.assert_array_equal(resumed[0]["image"], whole[2]["image"])
    half = take(train_batches(spec, seed=0, step=0, shards=(1,), num_shards=2), 1)
    np.testing.assert_array_equal(half[0]["image"], whole[0]["image"][8:])
    plain = dataclasses.replace(spec, preprocess="decode")
    images = take(train_batches(plain, seed=0, step=0), 1)[0]["image"]
    counts = np.unique([x.tobytes() for x in images], return_counts=True)[1]
    assert sorted(counts) == [2, 2, 3, 3, 3, 3]


# Captions


@pytest.fixture(scope="module")
def captioned(captions_dir):
    """Digits with three captions each."""
    return DatasetSpec(
        name="digits_captions",
        split="train[:50]",
        preprocess="decode|random_shift(2)",
        batch_size=16,
        data_dir=captions_dir,
        key="data",
        tokenizer="bytes(length=64)",
    )


def as_text(tokens):
    return bytes(int(token) - 3 for token in tokens if token > 2).decode()


def test_a_tokenizer_adds_tokens_of_one_of_the_captions(captioned):
    batch = train(captioned, 1)[0]
    assert batch["tokens"].shape == (16, 64)
    assert batch["tokens"].dtype == np.int32
    source = captioned.open()
    by_image = {}
    for index in range(len(source)):
        pixels = apply(plain(captioned).ops(), source[index], np.random.default_rng(0))["image"]
        by_image[pixels.tobytes()] = source.captions(index)
    batches = train(plain(captioned), 30)
    places = [
        by_image[image.tobytes()].index(as_text(tokens))
        for b in batches
        for image, tokens in zip(b["image"], b["tokens"], strict=True)
    ]
    shares = np.bincount(places, minlength=3) / len(places)
    assert np.abs(shares - 1 / 3).max() < 0.08  # 480 draws


def test_evaluation_takes_the_first_caption(captioned):
    source = captioned.open()
    batches = list(eval_batches(captioned))
    tokens = np.concatenate([b["tokens"] for b in batches])
    mask = np.concatenate([b["mask"] for b in batches])
    want = [source.captions(index)[0] for index in range(50)]
    assert [as_text(row) for row in tokens[mask > 0]] == want


def test_captions_are_the_same_for_any_number_of_hosts_and_threads(captioned):
    whole = train(captioned, 3, seed=5, step=7)
    spec = dataclasses.replace(captioned, num_threads=0)
    assert_same(train(spec, 3, seed=5, step=7), whole)
    parts = [train(captioned, 3, seed=5, step=7, shards=(k,), num_shards=4) for k in range(4)]
    assert_same([join(hosts) for hosts in zip(*parts, strict=True)], whole)


def test_a_tokenizer_changes_neither_images_nor_labels(captioned):
    without = train(dataclasses.replace(captioned, tokenizer=None), 3)
    assert without[0].keys() == {"image", "label"}
    batches = train(captioned, 3)
    assert_same([{k: b[k] for k in ("image", "label")} for b in batches], without)
    images = dataclasses.replace(captioned, preprocess="decode|keep('image')")
    assert train(images, 1)[0].keys() == {"image", "tokens"}


def test_a_tokenizer_adds_nothing_to_data_without_captions(digits):
    spec = dataclasses.replace(digits, tokenizer="bytes(length=64)")
    assert_same(train(spec, 2), train(digits, 2))


def test_luma_comes_last():
    assert find_shapes("decode|resize(6)|luma", (None, None, 3), key="k") == {(6, 6, 1)}
    with pytest.raises(UserError, match=r"^k='decode\|luma\|flip_lr': expected 'luma' last"):
        find_shapes("decode|luma|flip_lr", (None, None, 3), key="k")
