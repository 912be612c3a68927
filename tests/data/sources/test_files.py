# SPDX-License-Identifier: Apache-2.0
"""Folders and manifests as datasets."""

import csv
import dataclasses
import itertools
import json
import os
import random
import unicodedata

import numpy as np
import pytest

from tests.buckets import server
from tests.images import encode, write_folder
from vit_jax.data import sources
from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.pipeline import DatasetSpec, eval_batches, train_batches
from vit_jax.data.sources import dataset_info, files, open_source
from vit_jax.utils.errors import UserError

__all__ = ["server"]


def info(name):
    return dataset_info(name, data_dir=None)


def open_split(name, split="train"):
    return open_source(name, split, data_dir=None, key="data.split")


def read(source):
    """(path, label) of each record, in order."""
    return [(source.describe(i), int(source[i]["label"])) for i in range(len(source))]


def spec(name, split="train", batch_size=8, **options):
    return DatasetSpec(
        name, split, "decode|resize(8)|random_shift(1)", batch_size, None, "data", **options
    )


def refuse(call, *words):
    with pytest.raises(UserError) as error:
        call()
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


# Folders


@pytest.fixture
def animals(tmp_path):
    """Split folders; `cat` is missing in test, `eel` in train."""
    counts = {"train/cat": 5, "train/dog": 6, "train/fox": 7, "test/dog": 2, "test/eel": 3}
    return f"folder:{write_folder(tmp_path / 'animals', counts)}"


@pytest.fixture
def plain(tmp_path):
    """Folders of classes alone: 20, 30 and 50 images."""
    return f"folder:{write_folder(tmp_path / 'plain', {'a': 20, 'b': 30, 'c/deep/er': 50})}"


def test_labels_count_the_classes_of_all_splits(animals):
    assert info(animals).class_names == ("cat", "dog", "eel", "fox")
    assert info(animals).num_classes == 4
    assert info(animals).image_shape == (None, None, 3)
    train, test = read(open_split(animals)), read(open_split(animals, "test"))
    assert (len(train), len(test)) == (18, 5)
    for path, label in train + test:
        assert path.split("/")[-2] == ("cat", "dog", "eel", "fox")[label]


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_a_validation_folder_has_several_names(name, tmp_path):
    root = write_folder(tmp_path, {"train/a": 3, f"{name}/a": 2})
    assert len(open_split(f"folder:{root}", "validation")) == 2


def test_without_split_folders_a_tenth_of_each_class_is_for_validation_and_for_test(plain, caplog):
    caplog.set_level("INFO", "vit_jax")
    assert info(plain).class_names == ("a", "b", "c")
    parts = {split: read(open_split(plain, split)) for split in ("train", "validation", "test")}
    counts = {k: np.bincount([label for _, label in rows]).tolist() for k, rows in parts.items()}
    assert counts == {"train": [16, 24, 40], "validation": [2, 3, 5], "test": [2, 3, 5]}
    assert len({path for rows in parts.values() for path, _ in rows}) == 100
    (record,) = caplog.records
    assert record.message == (
        f"{plain}: it has no splits of its own, so a fixed seed cuts each class into "
        "80 % train, 10 % validation and 10 % test, at least one image each: train 80, validation "
        "10, test 10"
    )


def test_the_cut_is_the_same_on_any_machine(tmp_path):
    root = write_folder(tmp_path, {"a": 12, "b": 10})
    found = {
        split: [
            os.path.relpath(path, root) for path, _ in read(open_split(f"folder:{root}", split))
        ]
        for split in ("validation", "test")
    }
    assert found == {"validation": ["a/010.png", "b/007.png"], "test": ["b/004.png", "a/004.png"]}


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (5, (3, 1, 1)), (14, (12, 1, 1))],
)
def test_a_tenth_of_a_small_class_is_an_image(count, sizes, tmp_path, caplog):
    caplog.set_level("INFO", "vit_jax")
    name = f"folder:{write_folder(tmp_path, {'large': 40, 'small': count})}"
    dataset = sources.find_dataset(name, data_dir=None)
    splits = [dataset.splits[split] for split in ("train", "validation", "test")]
    assert tuple(int(sum(dataset.labels[rows])) for rows in splits) == sizes
    lines = [r.message for r in caplog.records if "fewer than 3 images" in r.message]
    assert [line.endswith("if there is a single one: small") for line in lines] == [True] * (
        count < 3
    )


def test_order_does_not_depend_on_the_file_system(tmp_path):
    counts = {"a": 20, "b": 30}
    there = write_folder(tmp_path / "there", counts)
    shuffled = list(there.rglob("*.png"))
    random.Random(0).shuffle(shuffled)
    for path in shuffled:
        copy = tmp_path / "here" / path.relative_to(there)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    for split in ("train", "validation", "test"):
        one, two = (read(open_split(f"folder:{tmp_path / p}", split)) for p in ("there", "here"))
        assert [(p.replace("/there/", "/here/"), label) for p, label in one] == two


def test_slices_are_those_of_tfds_and_fair_samples(plain):
    whole = read(open_split(plain))
    assert read(open_split(plain, "train[:98%]")) == whole[:78]
    assert read(open_split(plain, "train[98%:]")) == whole[78:]
    assert read(open_split(plain, "train[10:20]")) == whole[10:20]
    assert read(open_split(plain, "train[-5:]")) == whole[-5:]
    both = read(open_split(plain, "train[:3]+validation[:2]"))
    assert both == whole[:3] + read(open_split(plain, "validation"))[:2]
    assert {label for _, label in whole[:20]} == {0, 1, 2}


def test_endings_of_any_case_and_wrong_ones_are_read_by_content(tmp_path):
    (tmp_path / "a").mkdir()
    names = ["x.JPG", "y.Png", "z.jpeg", "w.bmp"]
    for value, name in enumerate(names):
        (tmp_path / "a" / name).write_bytes(encode(40 * value))
    source = open_split(f"folder:{tmp_path}", "all")
    assert sorted(os.path.basename(path) for path, _ in read(source)) == sorted(names)
    batch = next(eval_batches(spec(f"folder:{tmp_path}", "all", 4)))
    assert sorted(batch["image"][:, 0, 0, 0]) == [0, 40, 80, 120]
    assert batch["mask"].all()


def test_what_is_no_image_is_ignored_and_counted(tmp_path, caplog):
    caplog.set_level("INFO", "vit_jax")
    root = write_folder(tmp_path, {"a": 3, "b": 2, ".git/objects": 1, "a/.thumbs": 1})
    for name in ("a/.DS_Store", "a/notes.txt", "b/more.txt", "b/Makefile"):
        (root / name).write_text("no image")
    os.mkfifo(root / "a" / "pipe.png")  # would never end
    (root / "b" / "loop").symlink_to(root)
    for one, other in ("xy", "yx", ("x.png", "y.png"), ("y.png", "x.png")):
        (root / one).symlink_to(other)
    assert len(read(open_split(f"folder:{root}", "all"))) == 5
    (line,) = [r.message for r in caplog.records if "ignored" in r.message]
    for words in ("2 .txt", "2 hidden", "1 .png", "1 without an ending"):
        assert words in line
    open_split(f"folder:{root}", "all")
    assert sum("ignored" in r.message for r in caplog.records) == 1


def test_slow_listing_says_how_long_it_took(plain, caplog, monkeypatch):
    clock = itertools.count(0, 3)
    monkeypatch.setattr(files.time, "monotonic", lambda: next(clock))
    with caplog.at_level("INFO", "vit_jax"):
        info(plain)
    assert any("listed 100 images in 3.0 s" in r.message for r in caplog.records)


def splits_of(root):
    """The class names of each split's examples, and all class names."""
    dataset = files.folder_dataset(str(root))
    names = dataset.info.class_names
    labels = np.asarray(dataset.labels)
    return {
        split: sorted({names[i] for i in labels[rows]}) for split, rows in dataset.splits.items()
    }


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("Train", "Test", "test"),
        ("TRAIN", "TEST", "test"),
        ("Training", "Testing", "test"),
        ("training", "VALIDATION", "validation"),
        ("train", "eval", "validation"),
        ("train", "dev", "validation"),
        ("Train", "Evaluation", "validation"),
    ],
)
def test_splits_are_known_by_other_names_in_any_case(train, other, split, tmp_path):
    root = write_folder(
        tmp_path, {f"{top}/{c}": 2 for top in (train, other) for c in ("cat", "dog")}
    )
    assert splits_of(root) == {"train": ["cat", "dog"], split: ["cat", "dog"]}


def logged(caplog, root):
    caplog.clear()
    with caplog.at_level("INFO", "vit_jax"):
        splits = splits_of(root)
    lines = [r.message for r in caplog.records if "so a fixed seed cuts" not in r.message]
    assert all(line.count("\n") == 0 and str(root) in line for line in lines)
    return splits, lines


def test_a_split_that_is_not_sorted_by_class_is_left_out(tmp_path, caplog):
    counts = {"train/n01/images": 3, "train/n02/images": 3, "val/images": 4, "test/images": 2}
    root = write_folder(tmp_path, counts)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\n")
    splits, lines = logged(caplog, root)
    assert splits == {"train": ["n01", "n02"]}
    assert any("left out val/images with 4 images" in line for line in lines)
    assert any("left out test/images with 2 images" in line for line in lines)
    refuse(lambda: open_split(f"folder:{root}", "validation"), "validation", "train (6)")


def test_a_name_is_one_class_in_any_unicode_form(tmp_path, caplog):
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    counts = {f"train/{nfc}": 2, f"train/{nfd}": 1, f"val/{nfd}": 3, "train/z": 1, "val/z": 1}
    splits, lines = logged(caplog, write_folder(tmp_path, counts))
    assert splits == {"train": [nfc, "z"], "validation": [nfc, "z"]}
    assert lines == []
    assert len(open_split(f"folder:{tmp_path}", "validation")) == 4
    assert len(read(open_split(f"folder:{tmp_path}", "train"))) == 4


def test_names_that_differ_in_case_are_reported_or_refused(tmp_path, caplog):
    root = write_folder(tmp_path / "one", {"Cat": 10, "cat": 10, "big dog": 10, "big_dog": 10})
    _, lines = logged(caplog, root)
    assert any("'Cat' and 'cat' differ only in case" in line for line in lines)
    assert any("'big dog' and 'big_dog' differ only in" in line for line in lines)
    root = write_folder(tmp_path / "two", {"train/Cat": 2, "train/dog": 2, "val/cat": 2})
    refuse(lambda: splits_of(root), "'Cat' and 'cat' are in different splits", "one name for each")


def test_folders_of_systems_are_left_out_and_named(tmp_path, caplog):
    others = (
        "@eaDir",
        "__MACOSX",
        ".ipynb_checkpoints",
        "lost+found",
        "$RECYCLE.BIN",
        "cat/@eaDir",
    )
    root = write_folder(tmp_path, {"cat": 10, "dog": 10} | dict.fromkeys(others, 1))
    splits, lines = logged(caplog, root)
    assert splits == {split: ["cat", "dog"] for split in ("train", "validation", "test")}
    (line,) = [line for line in lines if "left out" in line]
    for word in (
        "$RECYCLE.BIN",
        ".ipynb_checkpoints",
        "@eaDir",
        "__MACOSX",
        "cat/@eaDir",
        "1 more",
    ):
        assert word in line


def test_images_and_folders_that_are_no_class_are_reported(tmp_path, caplog):
    counts = {
        "train/cat": 2,
        "train/dog": 2,
        "train/eel": 0,
        "val/cat": 2,
        "val/fox": 1,
        "val": 3,
        "": 1,
    }
    splits, lines = logged(caplog, write_folder(tmp_path, counts))
    assert splits == {"train": ["cat", "dog"], "validation": ["cat", "fox"]}
    assert any(
        "left out 4 images that are not in a class folder: 000.png, val/0" in x for x in lines
    )
    assert any("left out the folders train/eel, which have no images" in line for line in lines)
    assert any(
        "1 of 3 classes have no images in train, and are never predicted: fox" in x for x in lines
    )
    assert len(lines) == 3


def test_folders_without_images_beside_splits_are_left_out(tmp_path):
    root = write_folder(tmp_path, {"train/a": 2, "train/b": 1, "test/a": 1})
    (root / "annotations").mkdir()
    (root / "annotations" / "boxes.xml").write_text("none")
    assert splits_of(root) == {"train": ["a", "b"], "test": ["a"]}


def test_a_single_class_is_reported_with_where_the_classes_may_be(tmp_path, caplog):
    _, lines = logged(caplog, write_folder(tmp_path / "flat", {"birds": 20}))
    (line,) = lines
    assert line.endswith("a single class, 'birds', so that every prediction is right")
    root = write_folder(tmp_path / "high", {"data/images/heron": 20, "data/images/robin": 20})
    (root / "annotations").mkdir()
    _, lines = logged(caplog, root)
    (line,) = [line for line in lines if "single class" in line]
    assert line.endswith(f"heron, robin: are these the classes of folder:{root}/data/images?")
    folders = [f"{split}/images/{name}" for split in ("train", "val") for name in "ab"]
    _, lines = logged(caplog, write_folder(tmp_path / "deep", dict.fromkeys(folders, 2)))
    assert lines[-1].endswith("its images are in a, b: expected them in the folder of the split")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"train_images/a": 1, "val_images/a": 1}, ["train_images, val_images", "suggests splits"]),
        ({"train2017/a": 1, "val2017/a": 1}, ["train2017, val2017", "expected train, validation"]),
        ({"seg_train/a": 1, "seg_test/a": 1, "seg_pred": 1}, ["seg_test, seg_train"]),
        ({"fold1/a": 1, "fold2/a": 1}, ["fold1, fold2", "suggests splits"]),
        ({"train/a": 1, "train/b": 1, "unlabeled": 2}, ["holds train", "suggests splits"]),
        ({"train/a": 1, "extra/a": 1}, ["holds train", "suggests splits"]),
        ({"trainset": 1, "testset": 1}, ["testset, trainset"]),
        ({"Train/a": 1, "train/a": 1}, ["Train and train both mean the split 'train'"]),
        ({"train/a": 1, "val/a": 1, "dev/a": 1}, ["dev and val both mean the split 'validation'"]),
        ({"set/train/a": 1, "set/val/a": 1}, ["train, val are in set", "set"]),
        ({"x/y/train/a": 1, "x/y/test/a": 1}, ["test, train are in x/y", "/x/y"]),
        (
            {"cat/train": 1, "cat/test": 1, "dog/train": 1, "dog/test": 1},
            ["cat, dog", "train/CLASS"],
        ),
        (
            {"train/train/a": 1, "train/train/b": 1, "test/test": 1},
            ["test holds test", "train/CLASS"],
        ),
        ({"Training/a": 1, "Testing/a": 1, "docs": 1}, ["Testing, Training", "docs", "not both"]),
    ],
)
def test_what_looks_like_splits_is_never_taken_for_classes(counts, words, tmp_path):
    root = write_folder(tmp_path, counts)
    refuse(lambda: splits_of(root), "data.name='folder:", *words)


def test_a_class_may_have_a_word_of_a_split_in_its_name(tmp_path, caplog):
    root = write_folder(tmp_path, {"test tube": 10, "bullet train/red": 10, "cat/left": 10})
    splits, lines = logged(caplog, root)
    assert splits["train"] == ["bullet train", "cat", "test tube"]
    assert lines == []


def test_a_class_may_be_called_train(tmp_path, caplog):
    write_folder(tmp_path, {"train": 10, "car": 10})
    with caplog.at_level("INFO", "vit_jax"):
        assert info(f"folder:{tmp_path}").class_names == ("car", "train")
    assert "'train' is taken as a class, beside car" in caplog.records[0].message


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, ["holds no images in folders of classes", "CLASS/IMAGE"]),
        ({"a": 0, "b": 0}, ["holds no images in folders of classes"]),
        ({"": 3}, ["holds 3 images, none in folders of classes", "CLASS/IMAGE"]),
        ({"train": 3, "test": 1}, ["holds 4 images, none in folders of classes"]),
        ({"train/a": 1, "test/a": 1, "docs": 1}, ["train", "docs", "not both"]),
        ({"a\nb": 1}, ["'a\\nb'", "line break"]),
    ],
    ids=[
        *("empty", "empty classes", "images alone", "splits of images"),
        *("splits and classes", "line break"),
    ],
)
def test_folders_that_will_not_do_are_refused(counts, words, tmp_path):
    write_folder(tmp_path, counts)
    refuse(lambda: info(f"folder:{tmp_path}"), "data.name='folder:", *words)


def test_a_missing_folder_and_a_bucket_are_refused(tmp_path):
    refuse(lambda: info(f"folder:{tmp_path / 'no'}"), str(tmp_path / "no"), "No such file")
    refuse(lambda: info("folder:gs://bucket/x"), "folder:gs://bucket/x", "manifest")
    refuse(lambda: info("folder:"), "expected folder:PATH")


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("tests", ["tests", "train (80), validation (10), test (10)"]),
        ("train[80:]", ["holds no examples", "train (80)"]),
        ("train[:5%", ["train (80)"]),
        ("train[1000:2000]", ["train (80)"]),
    ],
)
def test_a_split_that_will_not_do_is_refused(split, words, plain):
    refuse(lambda: open_split(plain, split), f"data.split={split!r}", *words)


def take(batches, count):
    return list(itertools.islice(batches, count))


def join(parts):
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize(("hosts", "threads"), [(1, 0), (1, 3), (2, 2), (4, 0), (8, 3)])
@pytest.mark.parametrize("step", [0, 5])
def test_batches_are_the_same_on_any_hosts_threads_and_first_step(hosts, threads, step, plain):
    want = take(train_batches(spec(plain), seed=3, step=0), 15)[step:]  # beyond an epoch of 80
    parts = [
        take(
            train_batches(
                spec(plain, num_threads=threads),
                seed=3,
                step=step,
                shards=(host,),
                num_shards=hosts,
            ),
            15 - step,
        )
        for host in range(hosts)
    ]
    assert_same([join(part) for part in zip(*parts, strict=True)], want)


def test_each_epoch_holds_every_image_once(plain):
    batches = take(train_batches(spec(plain, batch_size=8), seed=0, step=0), 20)
    values = np.concatenate([b["image"][:, 4, 4, 0] for b in batches])
    for epoch in (values[:80], values[80:]):
        assert len(set(epoch)) == 80
    assert values[:80].tolist() != values[80:].tolist()


# Metadata files


def write_metadata(folder, rows, ending=".csv"):
    """`metadata.csv` or `metadata.jsonl` with the rows, which have the same keys for a CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"metadata{ending}", "w", encoding="utf-8", newline="") as file:
        if ending == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return f"folder:{folder}"


def numbered(count, **columns):
    """Rows of `000.png` and so on, with a value of each column in turn."""
    return [
        {"file_name": f"{i:03}.png"} | {c: values[i % len(values)] for c, values in columns.items()}
        for i in range(count)
    ]


def by_name(source):
    """The labels by the path in the last two folders."""
    return {"/".join(path.split("/")[-2:]): label for path, label in read(source)}


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_metadata_in_folders_of_splits_has_the_labels(ending, tmp_path):
    write_folder(tmp_path, {"train": 3, "test": 2})
    write_metadata(tmp_path / "train", numbered(3, label=["robin", "heron"]), ending)
    write_metadata(tmp_path / "test", numbered(2, label=["heron", "owl"]), ending)
    name = f"folder:{tmp_path}"
    assert info(name).class_names == ("heron", "owl", "robin")
    train, test = by_name(open_split(name)), by_name(open_split(name, "test"))
    assert train == {"train/000.png": 2, "train/001.png": 0, "train/002.png": 2}
    assert test == {"test/000.png": 0, "test/001.png": 1}
    assert open_split(name)[0]["image"].startswith(b"\x89PNG")


@pytest.mark.parametrize("above", ["", "data/"])
def test_metadata_at_the_top_names_images_in_folders_of_splits(above, tmp_path):
    write_folder(tmp_path, {f"{above}train": 2, f"{above}val": 1})
    paths = [f"{above}train/000.png", f"{above}train/001.png", f"{above}val/000.png"]
    rows = [
        {"file_name": path, "label": label} for path, label in zip(paths, [4, 0, 2], strict=True)
    ]
    name = write_metadata(tmp_path, rows, ".jsonl")
    assert (info(name).num_classes, info(name).class_names) == (5, None)
    assert by_name(open_split(name)) == {"train/000.png": 4, "train/001.png": 0}
    assert by_name(open_split(name, "validation")) == {"val/000.png": 2}


@pytest.mark.parametrize("where", ["", "images/"])
def test_metadata_without_folders_of_splits_is_cut(where, tmp_path, caplog):
    caplog.set_level("INFO", "vit_jax")
    write_folder(tmp_path, {where: 40})
    rows = [r | {"file_name": where + r["file_name"]} for r in numbered(40, label=["0", "1"])]
    name = write_metadata(tmp_path, rows)
    counts = [len(open_split(name, split)) for split in ("train", "validation", "test")]
    assert counts == [32, 4, 4]
    for path, label in read(open_split(name, "all")):
        assert label == int(os.path.basename(path)[:3]) % 2
    (record,) = caplog.records
    assert "it has no splits of its own" in record.message


def test_a_column_of_metadata_may_have_the_splits(tmp_path):
    write_folder(tmp_path, {"images": 4})
    rows = numbered(4, label=["a", "b"], split=["train", "train", "train", "dev"])
    name = write_metadata(tmp_path / "images", rows)
    assert len(open_split(name)) == 3
    assert by_name(open_split(f"folder:{tmp_path}", "validation")) == {"images/003.png": 1}


def test_metadata_may_have_captions_alone_or_with_labels(tmp_path):
    write_folder(tmp_path, {"train": 2, "val": 2})
    texts = ['a robin, "red"', "a heron"]
    write_metadata(tmp_path / "train", numbered(2, text=texts))
    write_metadata(tmp_path / "val", numbered(2, text=texts))
    name = f"folder:{tmp_path}"
    assert info(name).captions
    assert info(name).num_classes == 0
    source = open_split(name)
    found = {source.file_name(i): source.captions(i) for i in range(2)}
    assert found == {"000.png": (texts[0],), "001.png": (texts[1],)}
    other = write_folder(tmp_path / "both", {"train": 2})
    rows = numbered(2, title=[["one", "two"], []], kind=[1, 0], text=["no", "no"])
    write_metadata(other / "train", rows, ".jsonl")
    source = open_split(f"folder:{other}#caption=title,label=kind")
    found = {source.file_name(i): (source.captions(i), source[i]["label"]) for i in range(2)}
    assert found == {"000.png": (("one", "two"), 1), "001.png": ((), 0)}


def test_folders_of_classes_are_labels_where_metadata_has_none(tmp_path, caplog):
    caplog.set_level("INFO", "vit_jax")
    write_folder(tmp_path, {"train/10": 1, "train/9": 1})
    rows = [{"file_name": f"{c}/000.png", "text": f"number {c}", "id": 7} for c in (9, 10)]
    write_metadata(tmp_path / "train", rows)
    name = f"folder:{tmp_path}"
    assert info(name).class_names == ("10", "9")
    source = open_split(name)
    assert by_name(source) == {"10/000.png": 0, "9/000.png": 1}
    assert {source.captions(i) for i in range(2)} == {("number 9",), ("number 10",)}
    assert [record.message for record in caplog.records] == [
        f"{name}: train/metadata.csv: columns that are not read: id",
        f"{name}: the metadata has no column label, so labels are the names of 2 folders: 10, 9",
    ]


def test_paths_in_metadata_are_found_in_other_spellings(tmp_path):
    accent = "caf\u00e9"
    write_folder(tmp_path, {f"train/{unicodedata.normalize('NFD', accent)}": 2, "train/b": 1})
    paths = [f"{accent}/000.png", f"./{accent}/001.png", "b\\000.png"]
    write_metadata(tmp_path / "train", [{"file_name": p, "label": "x"} for p in paths])
    assert len(open_split(f"folder:{tmp_path}")) == 3


def test_images_that_no_row_names_are_left_out_and_reported(tmp_path, caplog):
    caplog.set_level("INFO", "vit_jax")
    write_folder(tmp_path, {"train": 3, "test": 1})
    write_metadata(tmp_path / "train", numbered(2, label=["a", "b"]))
    name = f"folder:{tmp_path}"
    assert len(open_split(name, "all")) == 2
    (record,) = caplog.records
    assert record.message == (
        f"{name}: left out 2 images that are in no row of the metadata: test/000.png, train/002.png"
    )


@pytest.mark.parametrize("label", [None, -1, ""])
def test_rows_of_metadata_without_a_label_are_refused_only_where_they_are_used(label, tmp_path):
    write_folder(tmp_path, {"train": 2, "test": 1})
    write_metadata(tmp_path / "train", numbered(2, label=["a", "b"]), ".jsonl")
    write_metadata(tmp_path / "test", numbered(1, label=[label]), ".jsonl")
    name = f"folder:{tmp_path}"
    assert len(open_split(name)) == 2
    refuse(lambda: open_split(name, "test"), "test/000.png", "has no label")


def test_metadata_of_another_kind_beside_classes_is_not_read(tmp_path, caplog):
    caplog.set_level("INFO", "vit_jax")
    write_folder(tmp_path, {"train/a": 2, "train/b": 2})
    (tmp_path / "metadata.csv").write_text("image_id,dx\n1,2\n")
    assert info(f"folder:{tmp_path}").class_names == ("a", "b")
    assert caplog.records[0].message.endswith(
        ": metadata.csv has the columns image_id, dx and no file_name, so it is not read"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "filename,label\n000.png,a\n",
            ["metadata.csv has the columns filename, label", "file_name"],
        ),
        ("file_name,label\n", ["train/metadata.csv lists no images"]),
        (
            "file_name,label\n000.png,a\n9.png,b\n8.png,b\n",
            ["row 2", "'9.png'", "no file", "2 of 3"],
        ),
        ("file_name,label\n000.PNG,a\n", ["row 1", "'000.PNG'", "there is train/000.png"]),
        ("file_name,label\n000,a\n", ["row 1", "'000'", "there is train/000.png"]),
        ("file_name,label\n../../x.png,a\n", ["row 1", "outside"]),
        ("file_name,label\n/x.png,a\n", ["row 1", "manifest"]),
        ("file_name,label\ngs://b/x.png,a\n", ["row 1", "manifest"]),
        ("file_name,label\nnote.heic,a\n", ["row 1", "no image that is read", ".jpg"]),
        ("file_name,label\n,a\n", ["row 1", "''"]),
        (
            "file_name,label\n000.png,a\n./000.png,a\n",
            ["row 2 names train/000.png", "train/metadata.csv: row 1", "one row for each image"],
        ),
        ("file_name,label\n000.png,a,b\n", ["row 1", "expected a value"]),
        ("file_name,label\n000.png\n", ["row 1", "expected a value"]),
        ("file_name,text\n000.png,a, b\n", ["row 1", "a caption with a comma is quoted"]),
        ('file_name,text\n000.png,"a\n001.png,b\n', ["can't be read", "quotation"]),
        ("file_name,bbox\n000.png,3\n", ["no column label or text", "#label=species"]),
        ("file_name,label\n000.png,1\n001.png,-2\n", ["row 2", "-2 is out of range"]),
        ("file_name,label,labels\n000.png,a,b\n", ["label and labels"]),
        (
            "file_name,label\n000.png,a\n../other/000.png,b\n",
            ["train", "other", "folders of splits"],
        ),
    ],
)
def test_metadata_that_will_not_do_is_refused(text, words, tmp_path):
    write_folder(tmp_path, {"train": 3} | ({"other": 1} if "other" in text else {}))
    (tmp_path / "train" / "note.heic").write_bytes(b"")
    (tmp_path / "train" / "metadata.csv").write_text(text)
    refuse(lambda: open_split(f"folder:{tmp_path}"), *words)


def test_files_of_metadata_that_will_not_do_together_are_refused(tmp_path):
    rows, name = numbered(2, label=["a", "b"]), f"folder:{tmp_path}"
    write_folder(tmp_path, {"train": 2, "train2017": 2})
    refuse(lambda: info(f"{name}#label=kind"), "there is no file metadata.csv or metadata.jsonl")
    write_metadata(tmp_path / "train2017", rows)
    write_metadata(tmp_path / "train2017", rows, ".jsonl")
    refuse(
        lambda: info(f"{name}"), f"{tmp_path}/train2017 holds both metadata.csv and metadata.jsonl"
    )
    os.remove(tmp_path / "train2017" / "metadata.jsonl")
    write_metadata(tmp_path, [{"file_name": "train2017/001.png", "label": "a"}])
    refuse(
        lambda: info(f"{name}/."),
        "train2017/metadata.csv: row 2 names train2017/001.png, and so does metadata.csv: row 1",
    )
    write_metadata(tmp_path, [{"path": "train/001.png", "label": "a"}])
    refuse(lambda: info(f"{name}/./"), "metadata.csv has the columns path, label", "file_name")
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "train2017" / "metadata.csv").rename(tmp_path / "train2017" / "metadata.jsonl")
    refuse(lambda: info(f"{name}/././"), "train2017/metadata.jsonl can't be read")
    (tmp_path / "train2017" / "metadata.jsonl").write_text('[{"file_name": "000.png"}]')
    refuse(lambda: info(f"{name}/./././"), "metadata.jsonl: row 1 is [{", "an object a line")
    (tmp_path / "train2017" / "metadata.jsonl").write_text('{"file_name": ["0.png"], "label": 1}')
    refuse(lambda: info(f"{name}/././././"), "row 1: file_name=['0.png']: expected a text, the pa")


# Manifests


def write_manifest(path, rows, ending=".csv"):
    """Rows as dicts; the images are in the folder beside, and know their row."""
    for number, row in enumerate(rows):
        (path / f"{number}.png").write_bytes(encode(number))
        row.setdefault("image", f"{number}.png")
    file = path / f"list{ending}"
    if ending == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        comma = "\t" if ending == ".tsv" else ","
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        file.write_text("\n".join(comma.join(map(str, line)) for line in lines), "utf-8-sig")
    return f"manifest:{file}"


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_a_manifest_names_images_labels_and_splits(ending, tmp_path):
    rows = [
        {"label": name, "split": split}
        for name, split in [("b", "train"), ("a", "train"), ("c", "val"), ("a", "test")]
    ]
    name = write_manifest(tmp_path, rows, ending)
    assert info(name).class_names == ("a", "b", "c")
    assert sorted(read(open_split(name))) == [
        (str(tmp_path / "0.png"), 1),
        (str(tmp_path / "1.png"), 0),
    ]
    assert read(open_split(name, "validation")) == [(str(tmp_path / "2.png"), 2)]
    assert read(open_split(name, "test")) == [(str(tmp_path / "3.png"), 0)]


def test_integers_are_labels_and_have_no_names(tmp_path):
    name = write_manifest(tmp_path, [{"label": label} for label in (4, 0, 2)])
    assert (info(name).num_classes, info(name).class_names) == (5, None)
    assert sorted(label for _, label in read(open_split(name))) == [0, 2, 4]


def test_without_a_split_column_a_tenth_of_each_class_is_held_out(tmp_path):
    name = write_manifest(tmp_path, [{"label": "ab"[n % 4 == 0]} for n in range(40)])
    for split in ("validation", "test"):
        labels = [label for _, label in read(open_split(name, split))]
        assert sorted(labels) == [0, 0, 0, 1]


def test_paths_may_be_absolute_or_urls(tmp_path, server):
    server.put(server.bucket, "7.png", encode(70))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "x.png").write_bytes(encode(50))
    rows = [
        {"image": str(tmp_path / "else" / "x.png"), "label": "a"},
        {"image": f"gs://{server.bucket}/7.png", "label": "b"},
    ]
    name = write_manifest(tmp_path, rows)
    batch = next(eval_batches(dataclasses.replace(spec(name), preprocess="decode|resize(8)")))
    seen = {
        int(v): int(n) for v, n in zip(batch["image"][:2, 0, 0, 0], batch["label"], strict=False)
    }
    assert seen == {50: 0, 70: 1}


def test_labels_of_a_manifest_are_one_class_in_any_unicode_form(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    name = write_manifest(tmp_path, [{"label": label} for label in (nfd, "b", nfc)])
    assert info(name).class_names == ("b", nfc)


def test_splits_of_a_manifest_are_known_in_any_case(tmp_path, caplog):
    rows = [
        {"label": f"c{i % 2}", "split": split} for i, split in enumerate(["Train", "TRAIN"] * 2)
    ]
    rows += [{"label": "c1", "split": "Dev"}, {"label": "c2", "split": "Dev"}]
    with caplog.at_level("INFO", "vit_jax"):
        name = write_manifest(tmp_path, [*rows, {"label": "c1", "split": "extra"}])
        assert len(open_split(name, "train")) == 4
    assert len(open_split(name, "validation")) == 2
    assert len(open_split(name, "extra")) == 1
    assert any("1 of 3 classes have no images in train" in r.message for r in caplog.records)
    (tmp_path / "two").mkdir()
    two = [{"label": "a", "split": split} for split in ("train", "val", "dev")]
    name = write_manifest(tmp_path / "two", two)
    refuse(lambda: info(name), "column split", "dev and val both mean the split 'validation'")


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_several_labels_are_a_vector_of_zeros_and_ones(ending, tmp_path):
    labels = [["cat", "dog"], ["eel"], [], ["dog", "eel"]]
    rows = [{"labels": "|".join(x) if ending == ".csv" else x} for x in labels]
    name = write_manifest(tmp_path, rows, ending)
    assert info(name).multi_label
    assert info(name).class_names == ("cat", "dog", "eel")
    batch = next(
        eval_batches(dataclasses.replace(spec(name, "all"), preprocess="decode|resize(8)"))
    )
    assert (batch["label"].dtype, batch["label"].shape) == (np.float32, (8, 3))
    order = np.argsort(batch["image"][:4, 0, 0, 0])
    assert batch["label"][:4][order].tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 1, 1]]
    assert next(train_batches(spec(name, batch_size=2), seed=0, step=0))["label"].shape == (2, 3)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_spaces_around_labels_and_splits_do_not_count(ending, tmp_path, caplog):
    labels = [" cat", "cat", "cat ", "Cat", " -1", " "]
    splits = ["train ", "train", " TRAIN", "train", "test", "test "]
    rows = [{"label": x, "split": y} for x, y in zip(labels, splits, strict=True)]
    with caplog.at_level("INFO", "vit_jax"):
        name = write_manifest(tmp_path, rows, ending)
        assert info(name).class_names == ("Cat", "cat")
    assert sorted(label for _, label in read(open_split(name, "train"))) == [0, 1, 1, 1]
    refuse(lambda: open_split(name, "test"), "has no label")
    assert any("'Cat' and 'cat' differ only in case" in r.message for r in caplog.records)
    (tmp_path / "n").mkdir()
    numbers = write_manifest(tmp_path / "n", [{"label": x} for x in (" 1", "0 ", "1")], ending)
    assert (info(numbers).num_classes, info(numbers).class_names) == (2, None)


def test_spaces_around_several_labels_do_not_count(tmp_path):
    labels = ["a | b", "b|a ", "  ", "a"]
    name = write_manifest(tmp_path, [{"labels": text} for text in labels])
    assert info(name).class_names == ("a", "b")
    rows = sources.find_dataset(name, data_dir=None).labels
    assert [row.tolist() for row in rows] == [[0, 1], [1, 0], [], [0]]


def test_spaces_around_the_names_of_folders_count_and_are_reported(tmp_path, caplog):
    counts = {f"train/{folder}": 2 for folder in (" owl", "dog", "cat", "cat ")}
    splits, lines = logged(caplog, write_folder(tmp_path, counts))
    assert splits == {"train": [" owl", "cat", "cat ", "dog"]}
    assert any("' owl', 'cat ' have leading or trailing spaces" in line for line in lines)
    assert any("'cat' and 'cat ' differ only in case, spaces" in line for line in lines)


def test_rows_without_a_split_are_left_out_and_counted(tmp_path, caplog):
    rows = [{"label": "ab"[i % 2], "split": "train" if i < 3 else " " * i} for i in range(5)]
    with caplog.at_level("INFO", "vit_jax"):
        name = write_manifest(tmp_path, rows)
        dataset = sources.find_dataset(name, data_dir=None)
    assert dataset.lengths == {"train": 3}
    assert len(open_split(name, "all")) == 3
    assert any("left out 2 rows that have no split" in r.message for r in caplog.records)
    assert any("the first of them row 4" in r.message for r in caplog.records)
    for split, words in {
        "": "no row has a split",
        "a b": "'a b' can't be the name of a split",
        "train[0]": "'train[0]' can't",
        "x+y": "'x+y' can't",
    }.items():
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        bad = write_manifest(folder, [{"label": "a", "split": split}])
        refuse(lambda bad=bad: info(bad), "column split", words)


def test_a_folder_of_other_files_says_which(tmp_path):
    for number in range(3):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "a" / f"{number}.HEIC").write_text("not read")
    refuse(lambda: info(f"folder:{tmp_path}"), "holds no images", "left out: 3 .heic")


def test_labels_that_are_almost_numbers_are_names(tmp_path):
    (tmp_path / "0.png").write_bytes(encode(0))
    labels = ["--3", "-0", "+7", "007", "1e3", "3-", "9" * 5000, "-" + "9" * 5000, "\u0663", "-"]
    (tmp_path / "list.csv").write_text("\n".join(["image,label", *(f"0.png,{x}" for x in labels)]))
    assert info(f"manifest:{tmp_path}/list.csv").class_names == tuple(sorted(labels))


def test_a_number_and_its_text_are_one_class_among_names(tmp_path):
    (tmp_path / "0.png").write_bytes(encode(0))
    rows = [json.dumps({"image": "0.png", "label": label}) for label in (1, "1", "b")]
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    assert info(f"manifest:{tmp_path}/list.jsonl").class_names == ("1", "b")


@pytest.mark.parametrize("none", ["", "-1"])
def test_rows_without_a_label_are_refused_only_where_they_are_used(none, tmp_path):
    (tmp_path / "0.png").write_bytes(encode(0))
    rows = [f"0.png,{none},test", "0.png,1,train", f"0.png,{none},test"]
    (tmp_path / "list.csv").write_text("\n".join(["image,label,split", *rows]))
    name = f"manifest:{tmp_path}/list.csv"
    assert info(name).num_classes == 2
    assert len(open_source(name, "train", data_dir=None, key="k")) == 1
    image = f"{tmp_path}/0.png"
    refuse(
        lambda: open_source(name, "test", data_dir=None, key="evals.test.split"),
        f"evals.test.split='test' of {name}: {image} (row ",
        "has no label; expected integers from 0 to 1",
    )
    (tmp_path / "all.csv").write_text(f"image,label\n0.png,{none}\n0.png,1\n")
    name = f"manifest:{tmp_path}/all.csv"
    refuse(lambda: open_source(name, "train", data_dir=None, key="k"), f"{image} (row 1) has no l")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["lists no images"]),
        ("image,label\n", ["lists no images"]),
        ("image,lable\n0.png,a\n", ["unknown column 'lable'", "did you mean 'label'?"]),
        ("image,label,labels\n0.png,a,b\n", ["either label or labels"]),
        ("label\na\n", ["expected image"]),
        ("image,label,label\n0.png,a,b\n", ["two columns of one name among image, label, label"]),
        ("image,label\n0.png,a\n0.png\n", ["row 2", "expected a value for each"]),
        ("image,label\n0.png,a,b\n", ["row 1", "expected a value for each"]),
        ("image,label\n0.png,\n", ["has no labels"]),
        ("image,label\n0.png,3\n0.png,-2\n", ["row 2", "label -2 is out of range"]),
        ("image,labels\n0.png,3\n0.png,3|-1\n", ["row 2", "label -1 is out of range"]),
        ("image,label\n0.png,123456789\n", ["label 123456789 is out of range"]),
        ("image,label\nno.png,a\n", ["none of its first images", "no.png", "manifest's folder"]),
        ("image,label\ngs://no-bucket/x.png,a\n", ["gs://no-bucket/x.png", "credentials"]),
        ("image,label\nhttps://x.org/x.png,a\n", ["row 1", "https://x.org/x.png", "gs:// or s3"]),
    ],
)
def test_manifests_that_will_not_do_are_refused(text, words, tmp_path, server):
    server.fail = lambda method, path: (403, "no") if "no-bucket" in path else None
    (tmp_path / "0.png").write_bytes(encode(0))
    (tmp_path / "list.csv").write_text(text)
    refuse(lambda: info(f"manifest:{tmp_path}/list.csv"), f"'manifest:{tmp_path}/list.csv'", *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{\n", ["can't be read"]),
        ("[1]\n", ["expected an object a line"]),
        ('{"image": "0.png", "labels": 3}\n', ["row 1", "expected a list"]),
        ('{"image": ["0.png"], "label": 1}\n', ["row 1: image=['0.png']: expected a text"]),
        ('{"image": "0.png", "label": 0.5}\n', ["row 1", "label 0.5"]),
        ('{"image": "0.png", "label": true}\n', ["row 1", "label True"]),
    ],
)
def test_json_that_will_not_do_is_refused(text, words, tmp_path):
    (tmp_path / "list.jsonl").write_text(text)
    refuse(lambda: info(f"manifest:{tmp_path}/list.jsonl"), *words)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_manifest_may_be_in_a_bucket_beside_its_images(server, scheme):
    url = f"{scheme}://{server.bucket}"
    server.put(server.bucket, "a/list.csv", b"image,label\nx/0.png,a\nx/1.png,b\nx/2.png,b\n")
    for n in range(3):
        server.put(server.bucket, f"a/x/{n}.png", encode(9 + n))
    source = open_split(f"manifest:{url}/a/list.csv", "all")
    assert source.describe(0) == f"{url}/a/x/0.png"
    server.requests.clear()
    source.ahead(range(3), captions=False)
    assert sorted(source[i]["image"] for i in range(3)) == sorted(encode(9 + n) for n in range(3))
    assert len(server.requests) == 3
    refuse(lambda: info(f"manifest:{url}/no.csv"), f"{url}/no.csv", "there is no such object")


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_rows_are_the_same_however_many_are_read_at_a_time(ending, tmp_path, monkeypatch):
    values = [
        {"label": label, "split": split, "caption": f"photo {i}, " * i}
        for i, (label, split) in enumerate(
            [("cat", "train"), ("dog", "val"), ("cat", "train"), ("eel", "train"), ("dog", "train")]
        )
    ]
    if ending == ".csv":
        values = [row | {"caption": f'"{row["caption"]}"'} for row in values]
    name = write_manifest(tmp_path, values, ending)
    found = []
    for chunk in (1, 2, 3, 2**16):
        monkeypatch.setattr(files, "_CHUNK", chunk)
        files.manifest_dataset.cache_clear()
        dataset = sources.find_dataset(name, data_dir=None)
        rows = {split: rows.tolist() for split, rows in dataset.splits.items()}
        texts = [list(dataset.captions[row]) for row in range(5)]
        content = [dataset.records.read(row) for row in range(5)]
        found.append((dataset.info, dataset.labels.tolist(), rows, texts, content))
    assert found[0][1] == [0, 1, 0, 2, 1]
    assert found[0][3] == [[f"photo {i}, " * i] for i in range(5)]
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("chunk", [1, 2, 2**16])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("3.png", "row 4 is {'image': '3.png', 'label': None}; expected a value for each of"),
        ("3.png,a,b", "row 4 is {'image': '3.png', 'label': 'a', None: ['b']}"),
        ("https://a/b.png,a", "row 4: image 'https://a/b.png': expected a path, or a URL of"),
        ("gs://b/../c.png,a", "row 4: image 'gs://b/../c.png': expected"),
    ],
)
def test_a_bad_row_is_named_wherever_it_is(chunk, line, words, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    write_manifest(tmp_path, [{"label": "a"} for _ in range(4)])
    path = tmp_path / "rows.csv"
    path.write_text("image,label\n0.png,a\n\n1.png,a\n2.png,b\n" + line + "\n4.png,a\n")
    with pytest.raises(UserError) as error:
        sources.find_dataset(f"manifest:{path}", data_dir=None)
    assert words in str(error.value)


@pytest.mark.parametrize("chunk", [1, 2, 2**16])
def test_lists_of_labels_are_the_same_however_many_are_read(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    name = write_manifest(tmp_path, [{"labels": v} for v in ("a|b", "", "c", "b|a|c", "")])
    dataset = sources.find_dataset(name, data_dir=None)
    assert [labels.tolist() for labels in dataset.labels] == [[0, 1], [], [2], [1, 0, 2], []]
    (tmp_path / "bad.csv").write_text("image,labels\n0.png,a\n1.png,b\n2.png,c||a\n")
    with pytest.raises(UserError, match=r"row 3: label '': expected a class name or an integer"):
        sources.find_dataset(f"manifest:{tmp_path / 'bad.csv'}", data_dir=None)


def test_other_files_are_no_manifests(tmp_path):
    refuse(lambda: info(f"manifest:{tmp_path}/list.txt"), "ends in .csv, .tsv, .jsonl")
    refuse(
        lambda: info("manifest:https://x.org/a.csv"), "'https://x.org/a.csv': expected a path, or"
    )
    refuse(lambda: info(f"manifest:{tmp_path}/list.csv"), "can't be read", "FileNotFoundError")


# Captions


def captions(name, split="train+validation+test"):
    """The captions of each record by the name of its file."""
    source = open_split(name, split)
    return {os.path.basename(source.describe(i)): source.captions(i) for i in range(len(source))}


@pytest.fixture
def pairs(tmp_path):
    """Twelve images at two depths with texts beside them, but for 11.png, and other files."""
    root = tmp_path / "pairs"
    for number in range(12):
        path = root / ("", "deeper")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number))
        if number < 11:
            path.with_suffix(".txt").write_text(f"image {number}\n  the same, again \n\n")
    (root / "README.txt").write_text("not a caption")
    (root / "00.json").write_text("{}")
    return root


def test_texts_beside_images_are_captions(pairs, caplog):
    caplog.set_level("INFO")
    name = f"pairs:{pairs}"
    assert (info(name).num_classes, info(name).captions) == (0, True)
    want = {f"{n:02}.png": (f"image {n}", "the same, again") for n in range(11)}
    assert captions(name) == want
    assert open_split(name)[0].keys() == {"image"}
    assert "left out 1 images without a text: deeper/11.png" in caplog.text
    assert "cuts the images into 80 % train" in caplog.text


def test_pairs_make_batches_without_labels(pairs):
    data = spec(f"pairs:{pairs}", tokenizer="bytes(length=32)")
    batch = next(train_batches(data, seed=0, step=0))
    assert batch.keys() == {"image", "tokens"}
    assert next(eval_batches(data)).keys() == {"image", "tokens", "mask"}


def test_folders_of_splits_divide_pairs(pairs):
    (pairs.parent / "split").mkdir()
    (pairs / "deeper").rename(pairs.parent / "split" / "val")
    pairs.rename(pairs.parent / "split" / "train")
    name = f"pairs:{pairs.parent / 'split'}"
    assert sorted(captions(name, "validation")) == [
        "01.png",
        "03.png",
        "05.png",
        "07.png",
        "09.png",
    ]
    assert len(captions(name, "train")) == 6
    (pairs.parent / "split" / "val").rename(pairs.parent / "split" / "more")
    files.pairs_dataset.cache_clear()
    refuse(lambda: info(name), "holds train and more", "folders of splits alone")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b" \n\t\n", "it has no caption"),
        (b"\xff\xfea\x00", "its text can't be read: UnicodeDecodeError"),
        (b"a" * 2**17, "a caption has 131,072 characters; expected at most 65,536"),
        (b"a\n" * 2**20, "expected 1,048,576 at most"),
    ],
    ids=["empty", "not UTF-8", "long", "huge"],
)
def test_a_pair_with_a_bad_text_is_replaced_and_counted(content, words, pairs, caplog):
    (pairs / "04.txt").write_bytes(content)
    name = f"pairs:{pairs}"
    data = dataclasses.replace(
        spec(name, "train+validation+test", batch_size=11, tokenizer="bytes(length=8)"),
        preprocess="decode|resize(8)",
        num_threads=0,
    )
    counter = CorruptCounter()
    batch = next(train_batches(data, seed=0, step=0, corrupt=counter))
    assert (counter.counts.corrupt, counter.counts.lost) == (1, 0)
    assert "04.png" in caplog.text
    assert words in caplog.text
    assert (batch["tokens"] > 0).any(axis=1).all()
    assert next(eval_batches(data))["mask"].sum() == 10
    # Where no captions are asked for, nothing is wrong with the image.
    without = dataclasses.replace(data, tokenizer=None)
    assert next(eval_batches(without))["mask"].sum() == 11


def test_texts_beside_images_of_classes_are_captions_too(tmp_path):
    root = write_folder(tmp_path / "animals", {"cat": 6, "dog": 6})
    assert not info(f"folder:{root}").captions
    for path in root.rglob("cat/*"):
        path.with_suffix(".txt").write_text(f"a cat called {path.stem}")
    files.folder_dataset.cache_clear()
    found = info(f"folder:{root}")
    assert (found.num_classes, found.captions) == (2, True)
    source = open_split(f"folder:{root}", "train+validation+test")
    texts = [source.captions(index) for index in range(12)]
    assert sum(text[0].startswith("a cat called") for text in texts if text) == 6
    assert sum(not text for text in texts) == 6


def test_loose_pairs_are_no_folder_of_classes(tmp_path):
    (tmp_path / "0.png").write_bytes(encode(0))
    (tmp_path / "0.txt").write_text("nothing")
    refuse(lambda: info(f"folder:{tmp_path}"), f"did you mean 'pairs:{tmp_path}'?")
    refuse(lambda: info(str(tmp_path)), f"did you mean 'pairs:{tmp_path}'?")


@pytest.mark.parametrize("there", ["nothing", "images"])
def test_a_folder_without_pairs_is_refused(there, tmp_path):
    if there == "images":
        write_folder(tmp_path, {"cat": 2})
    hint = [f"did you mean 'folder:{tmp_path}'?"] if there == "images" else []
    refuse(lambda: info(f"pairs:{tmp_path}"), "none has its text beside it", *hint)
    refuse(lambda: info("pairs:gs://bucket/x"), "list its images in a manifest")


def write_captions(tmp_path, name, text):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encode(number))
    (tmp_path / name).write_text(text)
    return f"manifest:{tmp_path / name}"


def test_a_manifest_may_have_captions_alone_or_with_labels(tmp_path):
    rows = ['0.png,"a cat, asleep",', "1.png,,one", "2.png", '3.png,"""quoted""",three']
    name = write_captions(tmp_path, "a.csv", "\n".join(["image,caption,caption_2", *rows]))
    assert (info(name).num_classes, info(name).captions) == (0, True)
    assert captions(name) == {
        "0.png": ("a cat, asleep",),
        "1.png": ("one",),
        "2.png": (),
        "3.png": ('"quoted"', "three"),
    }
    rows = [f"{n}.png\ta caption\t{'ab'[n % 2]}\ttrain" for n in range(4)]
    name = write_captions(tmp_path, "b.tsv", "\n".join(["image\tcaption\tlabel\tsplit", *rows]))
    assert (info(name).class_names, info(name).captions) == (("a", "b"), True)
    record = open_split(name)[0]
    assert record.keys() == {"image", "label"}


def test_columns_of_a_manifest_may_have_other_names(tmp_path):
    rows = [f'{n}.png\tlong {n}\t"short, {n}"' for n in range(4)]
    written = write_captions(tmp_path, "a.tsv", "\n".join(["filepath\ttitle\talt", *rows]))
    both = captions(f"{written}#image=filepath,caption=alt+title")
    assert both["2.png"] == ("short, 2", "long 2")
    rows = [{"file": f"{n}.png", "title": ["one", f"two {n}"]} for n in range(4)]
    written = write_captions(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert captions(f"{written}#image=file,caption=title")["3.png"] == ("one", "two 3")
    (tmp_path / "a#b").mkdir()
    written = write_captions(tmp_path / "a#b", "c.csv", "image,kind\n0.png,a\n1.png,b\n")
    assert info(f"{written}#label=kind").class_names == ("a", "b")


def test_a_column_that_is_named_must_be_there(tmp_path):
    written = write_captions(tmp_path, "a.csv", "image,caption,title\n0.png,a,b\n")
    refuse(lambda: info(f"{written}#caption=text"), "caption, image, title; expected 'text'")
    refuse(lambda: info(f"{written}#caption=title"), "two columns of one name")
    rows = '{"image": "0.png", "caption": "a"}\n'
    renamed = write_captions(tmp_path, "a.jsonl", rows) + "#caption=text"
    refuse(lambda: info(renamed), "caption, image; expected 'text'")
    refuse(lambda: info(written), "unknown column 'title'", "manifest:PATH#image=filepath")


def test_rows_of_json_may_lack_captions(tmp_path):
    rows = [{"image": "0.png"}, {"image": "1.png", "captions": ["one", "uno"]}]
    rows += [{"image": "2.png", "captions": None}, {"image": "3.png", "caption": "three"}]
    name = write_captions(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert captions(name) == {
        "0.png": (),
        "1.png": ("one", "uno"),
        "2.png": (),
        "3.png": ("three",),
    }


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "image,caption\n0.png,a cat, asleep\n", ["row 1", "a comma is quoted"]),
        ("a.csv", 'image,caption\n0.png,"open\n1.png,b\n', ["can't be read", "quotation marks"]),
        ("a.csv", 'image,caption\n0.png,"a"b\n1.png,b\n', ["line 2", "quotation marks"]),
        ("a.csv", 'image,caption\n0.png,a\n1.png,"a"b\n', ["line 3", "quotation marks"]),
        ("a.csv", f"image,caption\n0.png,{'a' * 2**18}\n", ["can't be read", "field limit"]),
        ("a.jsonl", '{"image": "0.png", "caption": 3}\n', ["row 1: caption", "a text or a list"]),
        ("a.jsonl", '{"image": "0.png", "captions": ["a", 3]}\n', ["row 1: captions", "a text"]),
        ("a.csv", "image,captoin\n0.png,b\n", ["unknown column 'captoin'", "did you mean"]),
    ],
)
def test_captions_of_a_manifest_that_will_not_do_are_refused(name, text, words, tmp_path):
    written = write_captions(tmp_path, name, text)
    refuse(lambda: info(written), *words)
