# SPDX-License-Identifier: Apache-2.0
"""Packing: what comes out reads like the source, and what is killed goes on."""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from tests.buckets import server
from tests.images import write_folder
from vit_jax.data import check, pipeline, sources
from vit_jax.data import pack as pack_module
from vit_jax.data.ops import fused
from vit_jax.data.ops.decode import ImageError, decode_image
from vit_jax.data.ops.geometry import resize_image
from vit_jax.data.ops.transforms import Decode
from vit_jax.data.pack import main
from vit_jax.data.pipeline import DatasetSpec, eval_batches, train_batches
from vit_jax.data.sources import dataset_info, find_dataset, open_source, riegeli
from vit_jax.utils.errors import UserError

__all__ = ["server"]

ROOT = Path(__file__).parent.parent.parent


def jpeg(height, width, seed):
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.uniform(0, 255, (4, 4, 3)), (width, height))
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


@pytest.fixture
def folder(tmp_path):
    """Two splits of two classes: 21 JPEGs of 40 to 60 x 80, of which one is broken, and a PNG."""
    root = tmp_path / "photos"
    for number in range(22):
        split = "train" if number < 15 else "test"
        path = root / split / ("cat", "dog")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"nothing" if number == 4 else jpeg(40 + number, 80, number))
    Image.fromarray(np.full((20, 30, 3), 7, np.uint8)).save(path.with_suffix(".png"))
    return root


def pack(source, target, *flags):
    main([f"folder:{source}" if isinstance(source, Path) else source, str(target), *flags])


def read(name, split):
    source = open_source(name, split, data_dir=None, key="data.split")
    return [source[i] if readable(source, i) else None for i in range(len(source))]


def readable(source, index):
    try:
        Decode()(source[index])
    except ImageError:
        return False
    return True


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("split", ["train", "test", "train[3:9]", "train+test"])
def test_packed_jpegs_are_those_of_the_source_made_smaller(split, folder, tmp_path, said):
    pack(folder, tmp_path / "dst", "--short_side=32", "--shard_size=4")
    before, after = read(f"folder:{folder}", split), read(f"packed:{tmp_path / 'dst'}", split)
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a["label"] == b["label"]
            old, new = decode_image(a["image"]), decode_image(b["image"])
            if min(old.shape[:2]) <= 32:
                assert a["image"] == b["image"]
            else:
                assert min(new.shape[:2]) == 32
                aspects = (image.shape[1] / image.shape[0] for image in (old, new))
                assert next(aspects) == pytest.approx(next(aspects), rel=0.02)
                want = resize_image(old, *new.shape[:2], "area")
                assert np.abs(new.astype(int) - want).mean() < 3


def test_raw_pixels_are_the_middle_of_the_image(folder, tmp_path, said):
    pack(folder, tmp_path / "dst", "--raw=24", "--shard_size=4")
    before, after = read(f"folder:{folder}", "all"), read(f"raw:{tmp_path / 'dst'}", "all")
    for a, b in zip(before, after, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a["label"] == b["label"]
            old = decode_image(a["image"])
            height, width = old.shape[:2]
            scaled = resize_image(old, 24, round(width * 24 / height), "area")
            left = (scaled.shape[1] - 24) // 2
            np.testing.assert_array_equal(b["image"], scaled[:, left : left + 24])
    assert (tmp_path / "dst" / "train.pixels").stat().st_size == 15 * 24 * 24 * 3


def test_class_names_travel_and_the_end_says_what_is_there(folder, tmp_path, said):
    pack(folder, tmp_path / "dst", "--short_side=32")
    info = dataset_info(f"packed:{tmp_path / 'dst'}", data_dir=None)
    assert info == dataset_info(f"folder:{folder}", data_dir=None)
    assert "4.jpg: 7 bytes that are not a readable image" in said[0]
    assert said[1].startswith("packed 23 images")
    assert "1 of them can't be read" in "\n".join(said)
    assert f"--config.data.name=packed:{tmp_path / 'dst'}" in said[-1]


def test_the_cut_of_a_folder_without_splits_travels(tmp_path, said):
    pack(write_folder(tmp_path / "flat", {"a": 10, "b": 10}), tmp_path / "packed")
    names = (f"folder:{tmp_path / 'flat'}", f"packed:{tmp_path / 'packed'}")
    one, two = (find_dataset(name, data_dir=None) for name in names)
    assert one.cut
    assert two.cut
    assert two.lengths == one.lengths == {"train": 16, "validation": 2, "test": 2}
    assert read(two.name, "test")[0]["image"] == read(one.name, "test")[0]["image"]


def test_several_labels_travel(tmp_path, said):
    rows = [("a|b", 0), ("", 1), ("b|c", 2), ("c", 3)]
    for _, number in rows:
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(20, 20, number))
    lines = [f"{number}.jpg,{labels},train" for labels, number in rows]
    (tmp_path / "list.csv").write_text("\n".join(["image,labels,split", *lines]))
    name = f"manifest:{tmp_path / 'list.csv'}"
    pack(name, tmp_path / "dst", "--short_side=32", "--shard_size=3")
    packed = f"packed:{tmp_path / 'dst'}"
    assert dataset_info(packed, data_dir=None) == dataset_info(name, data_dir=None)
    for a, b in zip(read(name, "train"), read(packed, "train"), strict=True):
        np.testing.assert_array_equal(a["label"], b["label"])
        assert a["label"].dtype == b["label"].dtype


def test_a_split_without_labels_is_not_packed(tmp_path, said):
    (tmp_path / "0.jpg").write_bytes(jpeg(20, 20, 0))
    lines = ["image,label,split", "0.jpg,1,train", "0.jpg,0,train", "0.jpg,,test"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    name = f"manifest:{tmp_path / 'list.csv'}"
    pack(name, tmp_path / "dst")
    assert said[0].startswith(f"not packed: split='test' of {name}: {tmp_path}/0.jpg (row 3) has n")
    assert [r["label"] for r in read(f"packed:{tmp_path / 'dst'}", "all")] == [
        r["label"] for r in read(name, "train")
    ]
    (tmp_path / "some.csv").write_text("image,label\n0.jpg,\n0.jpg,3")
    with pytest.raises(UserError, match=r"0.jpg \(row 1\) has no label"):
        pack(f"manifest:{tmp_path / 'some.csv'}", tmp_path / "another")


def test_images_that_can_not_be_packed_are_named(folder, tmp_path, said, caplog):
    cv2.imwrite(str(folder / "train" / "cat" / "long.png"), np.zeros((300, 80_000, 3), np.uint8))
    pack(folder, tmp_path / "dst", "--short_side=280")
    assert "2 of them can't be read" in "\n".join(said)
    assert any("4.jpg: 7 bytes that are not a readable image" in line for line in said)
    assert any("long.png: a JPEG can't hold an image of 74667x280 pixels" in line for line in said)


def test_tfds_datasets_are_packed(data_dir, tmp_path, said):
    main(["digits", str(tmp_path / "dst"), "--raw=8", f"--data_dir={data_dir}"])
    plain = DatasetSpec("digits", "test", "decode", 64, data_dir, "data")
    packed = dataclasses.replace(plain, name=f"raw:{tmp_path / 'dst'}")
    assert packed.image_shape() == (8, 8, 3)
    for a, b in zip(eval_batches(plain), eval_batches(packed), strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("extension", [True, False])
def test_raw_pixels_train_like_any_images(extension, folder, tmp_path, said, monkeypatch):
    if not extension:
        monkeypatch.setattr(fused, "extension", None)
    pack(folder, tmp_path / "dst", "--raw=24")
    line = "decode|inception_crop(16)|flip_lr"
    spec = DatasetSpec(f"raw:{tmp_path / 'dst'}", "train", line, 8, None, "data")
    batches = itertools.islice(train_batches(spec, seed=1, step=0), 4)
    digest = hashlib.sha256(b"".join(b["image"].tobytes() for b in batches)).hexdigest()
    monkeypatch.setattr(pipeline, "fuse", tuple)
    batches = itertools.islice(train_batches(spec, seed=1, step=0), 4)
    assert digest == hashlib.sha256(b"".join(b["image"].tobytes() for b in batches)).hexdigest()


def test_what_was_packed_can_be_packed_and_checked(folder, tmp_path, said):
    pack(folder, tmp_path / "raw", "--raw=24")
    pack(f"raw:{tmp_path / 'raw'}", tmp_path / "dst", "--short_side=32", "--quality=100")
    name = f"packed:{tmp_path / 'dst'}"
    for a, b in zip(read(f"raw:{tmp_path / 'raw'}", "all"), read(name, "all"), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close = decode_image(b["image"]).astype(int) - a["image"]
            assert np.abs(close).mean() < 3
    for kind in (f"raw:{tmp_path / 'raw'}", name):
        assert check.main([kind]) == 1
        assert any("corrupt: 1" in line for line in said)
        said.clear()


PACK = [sys.executable, "-m", "vit_jax.data.pack"]


def test_a_pack_that_was_killed_goes_on_to_the_same_bytes(tmp_path, said):
    for number in range(240):
        path = tmp_path / "photos" / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(300, 300, number))
    flags = ["--short_side=32", "--shard_size=8", "--num_threads=1"]
    for kind in ([], ["--raw=32"]):
        whole, killed = (tmp_path / f"{name}{len(kind)}" for name in ("whole", "killed"))
        pack(tmp_path / "photos", whole, *flags, *kind)
        command = [*PACK, f"folder:{tmp_path / 'photos'}", str(killed), *flags, *kind]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while len(list(killed.glob("*.npz"))) < 3:
            time.sleep(0.001)
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(list(killed.glob("*.npz"))) < 30
        name = f"{'raw' if kind else 'packed'}:{killed}"
        with pytest.raises(UserError, match=r"of 30 shards are missing.*run the same"):
            dataset_info(name, data_dir=None)
        pack(tmp_path / "photos", killed, *flags, *kind)
        assert contents(killed) == contents(whole)
        assert dataset_info(name, data_dir=None).num_classes == 2


def test_a_pack_is_not_completed_from_other_images(tmp_path, said, monkeypatch):
    def write_images(shade):
        for number in range(8):
            path = tmp_path / "photos" / "train" / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(40, 40, shade + number))

    def killed(examples, shard, *args):
        if shard.start:
            raise RuntimeError("killed")
        return write(examples, shard, *args)

    write, flags = pack_module._write_shard, ("--short_side=32", "--shard_size=4")
    write_images(0)
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "_write_shard", killed)
        with pytest.raises(UserError, match="killed"):
            pack(tmp_path / "photos", tmp_path / "dst", *flags)
    write_images(100)
    with pytest.raises(UserError, match="the records of 'train' have changed"):
        pack(tmp_path / "photos", tmp_path / "dst", *flags)
    write_images(0)
    for name in ("dst", "whole"):
        pack(tmp_path / "photos", tmp_path / name, *flags)
    assert contents(tmp_path / "dst") == contents(tmp_path / "whole")


def test_a_finished_pack_is_not_written_again(folder, tmp_path, said):
    pack(folder, tmp_path / "dst", "--short_side=32")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()}
    pack(folder, tmp_path / "dst", "--short_side=32")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()} == times


def test_threads_do_not_change_the_bytes(folder, tmp_path, said):
    for threads in (1, 4):
        flags = ("--short_side=32", "--shard_size=4", f"--num_threads={threads}")
        pack(folder, tmp_path / f"dst{threads}", *flags)
    assert contents(tmp_path / "dst1") == contents(tmp_path / "dst4")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--short_side=0"], ["--short_side=0: expected at least 1"]),
        (["--raw=-1"], ["--raw=-1"]),
        (["--quality=101"], ["--quality=101"]),
        (["--raw=100000"], ["could not be read: raw is 100000; expected an integer, 1 to"]),
        (["--short_side=20000"], ["could not be read: short_side is 20000; expected"]),
    ],
)
def test_bad_flags_are_one_line(flags, words, folder, tmp_path):
    assert_refused(folder, tmp_path / "dst", *flags, words=words)
    assert not (tmp_path / "dst").exists()


def test_another_pack_in_the_folder_is_refused(folder, tmp_path, said):
    pack(folder, tmp_path / "dst", "--short_side=32")
    words = ["holds another pack", "short_side='32'", "'40'", "another folder"]
    assert_refused(folder, tmp_path / "dst", "--short_side=40", words=words)


def test_a_folder_that_can_not_be_written_is_refused(folder, tmp_path):
    (tmp_path / "file").touch()
    words = ["DST=", str(tmp_path / "file"), "can't be written"]
    assert_refused(folder, tmp_path / "file" / "dst", words=words)
    words = ["DST='http://bucket/dst': expected a folder, gs://BUCKET/PATH or s3://BUCKET/PATH"]
    assert_refused(folder, "http://bucket/dst", words=words)
    words = ["DST='gs://bucket': expected gs://BUCKET/PATH"]
    assert_refused(folder, "gs://bucket", words=words)
    words = ["--temporary=", "expected DST in a bucket"]
    assert_refused(folder, tmp_path / "dst", f"--temporary={tmp_path}", words=words)


@pytest.mark.parametrize("kind", [[], ["--raw=64"]])
def test_a_full_disk_is_one_line(kind, folder, tmp_path):
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from vit_jax.data.pack import main\n"
        "from vit_jax.utils.command import run_command\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "run_command(main)\n"
    )
    command = [sys.executable, "-c", program, f"folder:{folder}", str(tmp_path / "dst"), *kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "File too large" in done.stderr
    assert str(tmp_path / "dst") in done.stderr


@pytest.mark.parametrize("resumed", [False, True])
def test_a_reservation_that_fails_gives_the_disk_back(resumed, folder, tmp_path, said, monkeypatch):
    def fill(file, offset, size):
        os.truncate(file, size - 5)  # as some file systems leave it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = b""
    if resumed:
        pack(folder, tmp_path / "dst", "--raw=16", "--shard_size=8")
        (tmp_path / "dst" / "train-00001-of-00002.npz").unlink()
        os.truncate(tmp_path / "dst" / "train.pixels", 8 * 16 * 16 * 3)
        kept = (tmp_path / "dst" / "train.pixels").read_bytes()
    monkeypatch.setattr(os, "posix_fallocate", fill)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 2, 1234))
    path = tmp_path / "dst" / ("train.pixels" if resumed else "test.pixels")
    words = [f"{path} can't be written: No space left", "bytes more, and 1,234 are free"]
    words += [] if resumed else [f"it needs {8 * 16 * 16 * 3:,} bytes"]
    assert_refused(folder, tmp_path / "dst", "--raw=16", "--shard_size=8", words=words)
    assert not path.exists() if not resumed else path.read_bytes() == kept


def assert_refused(source, target, *flags, words):
    with pytest.raises(UserError) as error:
        pack(source, target, *flags)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("packed:{dst}", ["expected raw:"]),
        ("raw:{dst}/none", ["pack.json", "a folder that python -m vit_jax.data.pack wrote"]),
        ("raw:{tmp}/broken", ["can't be read"]),
    ],
)
def test_what_was_not_packed_is_refused_in_one_line(name, words, folder, tmp_path, said):
    pack(folder, tmp_path / "dst", "--raw=8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "pack.json").write_text(json.dumps({"source": "x"}))
    with pytest.raises(UserError) as error:
        dataset_info(name.format(dst=tmp_path / "dst", tmp=tmp_path), data_dir=None)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


MANIFESTS = {
    "endless": ({"splits": {"train": 10**30}}, "splits.'train' is about 2**100"),
    "no_shards": ({"shard_size": 0}, "shard_size is 0; expected an integer, 1 to"),
    "many_shards": (
        {"splits": {"train": 10**9}, "shard_size": 1},
        "number of shards is 1000000000",
    ),
    "negative": ({"splits": {"train": -5}}, "splits.'train' is -5"),
    "real": ({"splits": {"train": 5.0}}, "splits.'train' is 5.0"),
    "list": ({"splits": ["train"]}, "splits is ['train']; expected lengths by name"),
    "none": ({"splits": {}}, "splits is {}"),
    "outside": ({"splits": {"../../train": 5}}, "splits has '../../train'"),
    "root": ({"splits": {"/etc/train": 5}}, "splits has '/etc/train'"),
    "classes": ({"num_classes": 10**12}, "num_classes is 1000000000000"),
    "names": ({"class_names": ["a", "b", "c"]}, "the number of class_names is 3"),
    "one_text": ({"class_names": "ab"}, "class_names is 'ab'; expected a list of texts"),
    "no_names": ({"class_names": [1, 2]}, "class_names has other values than texts"),
    "letters": ({"multi_label": "no"}, "multi_label is 'no'"),
    "raw": ({"raw": 10**6}, "raw is 1000000"),
    "side": ({"short_side": "a"}, "short_side is 'a'"),
    "source": ({"source": ["a"]}, "source is ['a']"),
    "key": ({"other": 1}, "unexpected keyword argument 'other'"),
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """JPEGs and pixels of six images, each in two shards of one split."""
    root = tmp_path_factory.mktemp("packs")
    for number in range(6):
        path = root / "images" / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(20, 20, number))
    for kind, flags in (("packed", []), ("raw", ["--raw=8"])):
        pack(root / "images", root / kind, "--shard_size=4", *flags)
    return root


def refuse(kind, folder):
    sources.packed._dataset.cache_clear()
    with pytest.raises(UserError) as error:
        find_dataset(f"{kind}:{folder}", data_dir=None)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_claims_too_much_is_refused(name, packs, tmp_path, said):
    changes, words = MANIFESTS[name]
    values = json.loads((packs / "packed" / "pack.json").read_text())
    (tmp_path / "pack.json").write_text(json.dumps(values | changes))
    assert words in refuse("packed", tmp_path)


@pytest.mark.parametrize("class_name", ["", "a\n", "a\u2028b"])
def test_class_names_of_a_pack_are_ones_that_can_be_written(class_name, packs, tmp_path, said):
    shutil.copytree(packs / "packed", tmp_path / "packed")
    path = tmp_path / "packed" / "pack.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": [class_name, "b"]}))
    assert "is empty or has a line break" in refuse("packed", tmp_path / "packed")


def save_shard(**changes):
    """A shard of labels as it should be, but for some arrays; None leaves one out."""
    arrays = {"labels": np.array([0, 1, 0, 1], np.int32), "counts": np.ones(4, np.int32)}
    arrays |= {"good": np.ones(4, bool)} | changes
    return lambda path: np.savez_compressed(
        path, **{name: x for name, x in arrays.items() if x is not None}
    )


def put_fifo(path):
    path.unlink()
    os.mkfifo(path)


def write_records(*records, options="group_size:1,uncompressed"):
    def write(path):
        writer = ArrayRecordWriter(str(path), options)
        for record in records:
            writer.write(record)
        writer.close()

    return write


LABELS, JPEGS, PIXELS = "*0-of*.npz", "*0-of*.array_record", "train.pixels"
SHARDS = {
    "inflated_labels": (LABELS, save_shard(labels=np.zeros(2**22)), "its arrays have 33,55"),
    "labels_out_of_range": (
        LABELS,
        save_shard(labels=np.array([0, 1, 2, 1])),
        "train[2] has label 2",
    ),
    "labels_below_zero": (
        LABELS,
        save_shard(labels=np.array([0, -1, 0, 1])),
        "train[1] has label -1",
    ),
    "real_labels": (LABELS, save_shard(labels=np.zeros(4)), "of other types"),
    "few_labels": (LABELS, save_shard(labels=np.zeros(3, int)), "has 3 labels for 4 examples"),
    "few_rows": (LABELS, save_shard(good=np.ones(3, bool)), "of another length"),
    "negative_counts": (LABELS, save_shard(counts=np.array([2, -1, 2, 1])), "labels for 4 exampl"),
    "no_counts": (LABELS, save_shard(counts=None), "counts"),
    "cut_labels": (LABELS, lambda path: os.truncate(path, 300), "not a whole zip archive"),
    "empty_labels": (LABELS, lambda path: os.truncate(path, 0), "not a whole zip archive"),
    "sparse_labels": (LABELS, lambda path: os.truncate(path, 2**29), "bytes, of which"),
    "fifo_labels": (LABELS, put_fifo, "it is a FIFO, not a file"),
    "cut_images": (JPEGS, lambda path: os.truncate(path, 300), ""),
    "empty_images": (JPEGS, lambda path: os.truncate(path, 0), ""),
    "few_images": (JPEGS, write_records(b"1", b"2"), "has 2 images; expected 4"),
    "compressed_images": (
        JPEGS,
        write_records(*[bytes(2**24)] * 4, options="group_size:1"),
        "is compressed (group_size:1",
    ),
    "fifo_images": (JPEGS, put_fifo, "it is a FIFO, not a file"),
    "no_images": (JPEGS, lambda path: path.unlink(), "No such file"),
    "cut_pixels": (PIXELS, lambda path: os.truncate(path, 5), "has 5 bytes; expected 1,152"),
    "sparse_pixels": (PIXELS, lambda path: os.truncate(path, 2**40), "1,152 at most"),
    "fifo_pixels": (PIXELS, put_fifo, "it is a FIFO, not a file"),
    "no_pixels": (PIXELS, lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_damaged_shard_is_refused_before_it_takes_memory(name, packs, tmp_path, said):
    pattern, damage, words = SHARDS[name]
    kind = "raw" if pattern == PIXELS else "packed"
    shutil.copytree(packs / kind, tmp_path / "pack")
    (path,) = (tmp_path / "pack").glob(pattern)
    find_dataset(f"{kind}:{tmp_path / 'pack'}", data_dir=None)
    damage(path)
    tracemalloc.start()
    try:
        message = refuse(kind, tmp_path / "pack")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert words in message
    assert peak < 2**24


@pytest.mark.parametrize("flags", [["--short_side=32"], ["--raw=16"]], ids=["JPEGs", "pixels"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_captions_are_packed(flags, labelled, folder, tmp_path):
    images = sorted(folder.rglob("*.jpg"))
    for number, path in enumerate(images):
        text = "" if number == 3 else f"photo {number}\nnuméro {number}"
        path.with_suffix(".txt").write_text(text)
    source = f"{'folder' if labelled else 'pairs'}:{folder}"
    pack(source, tmp_path / "dst", *flags, "--shard_size=4")
    name = f"{'raw' if '--raw=16' in flags else 'packed'}:{tmp_path / 'dst'}"
    before, after = (dataset_info(n, data_dir=None) for n in (source, name))
    assert dataclasses.replace(before, image_shape=after.image_shape) == after
    assert after.captions
    for split in ("train", "test"):
        old, new = (open_source(n, split, data_dir=None, key="s") for n in (source, name))
        assert len(old) == len(new)
        for index in range(len(old)):
            assert new.captions(index) == (old.captions(index) if readable(old, index) else ())
            if readable(old, index):
                assert new[index].keys() == old[index].keys()


def test_damaged_captions_are_refused(folder, tmp_path):
    for path in folder.rglob("*.jpg"):
        path.with_suffix(".txt").write_text("a caption")
    pack(folder, tmp_path / "dst", "--short_side=32")
    path = next((tmp_path / "dst").glob("train*.npz"))
    arrays = dict(np.load(path))
    for name, value in {
        "captions": arrays["captions"][:-1],
        "caption_lengths": -arrays["caption_lengths"],
        "caption_counts": arrays["caption_counts"][:-1],
    }.items():
        np.savez(path, **(arrays | {name: value}))
        sources.packed._dataset.cache_clear()
        with pytest.raises(UserError, match="pack it again"):
            dataset_info(f"packed:{tmp_path / 'dst'}", data_dir=None)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        *(("gs", "packed"), ("s3", "raw")),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("gs", "raw"), ("s3", "packed"))),
    ],
)
def test_a_pack_in_a_bucket_reads_like_the_local_one(folder, tmp_path, server, scheme, kind):
    target = tmp_path / "pack"
    pack(folder, target, "--shard_size=6", *(["--raw=16"] if kind == "raw" else []))
    for path in target.iterdir():
        server.put(server.bucket, f"d/{path.name}", path.read_bytes())
    url = f"{scheme}://{server.bucket}/d"
    for split in ("train", "test"):
        local = open_source(f"{kind}:{target}", split, data_dir=None, key="k")
        remote = open_source(f"{kind}:{url}", split, data_dir=None, key="k")
        assert len(remote) == len(local)
        remote.ahead(range(0, len(remote), 2), captions=False)
        for i in range(len(local)):
            try:
                expected = local[i]
            except ImageError as e:
                with pytest.raises(ImageError, match=str(e)):
                    remote[i]
                continue
            assert np.array_equal(remote[i]["image"], expected["image"])
            assert remote[i]["label"] == expected["label"]
    sources.packed._dataset.cache_clear()
    server.objects[server.bucket].pop("d/train-00001-of-00003.npz")
    with pytest.raises(UserError, match=r"1 of .* shards are missing.*copy all files of the pack"):
        find_dataset(f"{kind}:{url}", data_dir=None)
    with pytest.raises(UserError, match=r"pack.json: there is no such object; expected a folder"):
        find_dataset(f"{kind}:{url}/other", data_dir=None)


def test_records_are_found_across_the_headers_of_blocks(tmp_path):
    rng = np.random.RandomState(0)
    sizes = [0, 1, 127, 128, 65_400, 65_536, 3, 200_000, *rng.randint(1, 40_000, 40)]
    records = [rng.bytes(int(size)) for size in sizes]
    path = tmp_path / "x.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    content = path.read_bytes()
    places = riegeli.find_records(lambda start, stop: content[start:stop], len(records))
    assert [riegeli.unpack(content[a:b], a) for a, b in places] == records
    for damaged in (content[5:100], content[places[3][0] : places[3][1] - 1], b""):
        with pytest.raises(ValueError, match=r"its part of the file|bytes; expected"):
            riegeli.unpack(damaged, places[3][0])
    with pytest.raises(ValueError, match="records; expected"):
        riegeli.find_records(lambda start, stop: content[start:stop], len(records) + 1)
