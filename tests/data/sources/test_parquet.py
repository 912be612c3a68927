# SPDX-License-Identifier: Apache-2.0
"""Parquet files as datasets."""

import concurrent.futures
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.images import encode
from vit_jax.data.ops.decode import ImageError
from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.data.sources import dataset_info, find_dataset, open_source, parquet, tables
from vit_jax.data.sources.tables import ParquetTable, RowGroups
from vit_jax.utils.errors import UserError


def write(path, greys, labels, *, binary=False, names=None, group=4, **columns):
    """A file in the form of the `datasets` library, images of these greys in it."""
    images = [None if grey is None else encode(grey) for grey in greys]
    image = (
        pa.array(images, pa.binary())
        if binary
        else pa.array(
            [{"bytes": image, "path": None} for image in images],
            pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        )
    )
    table = pa.table({"image": image, "label": labels, **columns})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(meta)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


@pytest.fixture
def birds(tmp_path):
    """Two files to train on and one to test on, with names of classes."""
    names = ["auk", "bat", "crow"]
    write(tmp_path / "train-00000-of-00002.parquet", range(10), [0, 1] * 5, names=names)
    write(tmp_path / "train-00001-of-00002.parquet", range(10, 17), [1] * 7, names=names)
    write(tmp_path / "test-00000-of-00001.parquet", range(20, 23), [0, 1, 0], names=names)
    return f"parquet:{tmp_path}"


def greys(name, split):
    spec = DatasetSpec(name, split, "decode|resize(8)", 4, None, "data")
    batches = list(eval_batches(spec))
    return [
        int(v) for b in batches for v, m in zip(b["image"][:, 0, 0, 0], b["mask"], strict=True) if m
    ]


def test_files_of_a_folder_are_read_in_order(birds):
    info = dataset_info(birds, data_dir=None)
    assert (info.num_classes, info.class_names) == (3, ("auk", "bat", "crow"))
    assert greys(birds, "train") == list(range(17))
    assert greys(birds, "train[-3:]") == [14, 15, 16]
    assert greys(birds, "test") == [20, 21, 22]
    source = open_source(birds, "train", data_dir=None, key="k")
    assert [int(source[i]["label"]) for i in (0, 1, 12)] == [0, 1, 1]
    assert source.describe(12).endswith("train-00001-of-00002.parquet[2]")


def test_a_pattern_names_files(birds):
    name = birds + "/train-*1-of-*.parquet"
    assert greys(name, "train") == list(range(10, 17))


def test_binary_images_and_names_as_labels(tmp_path):
    split = ["train", "val", "train"]
    write(tmp_path / "x.parquet", [1, 2, 3], ["b", "a", "b"], binary=True, split=split)
    name = f"parquet:{tmp_path / 'x.parquet'}"
    assert dataset_info(name, data_dir=None).class_names == ("a", "b")
    assert greys(name, "train") == [1, 3]
    assert greys(name, "validation") == [2]


def test_files_without_a_split_are_cut_by_a_seed(tmp_path):
    write(tmp_path / "x.parquet", range(50), [0] * 20 + [1] * 30)
    names = ("train", "validation", "test")
    train, held, test = (greys(f"parquet:{tmp_path}", split) for split in names)
    assert (len(train), len(held), len(test)) == (40, 5, 5)
    assert sum(grey < 20 for grey in held) == sum(grey < 20 for grey in test) == 2
    assert sorted(train + held + test) == list(range(50))


def test_a_row_without_bytes_is_corrupt(tmp_path):
    write(tmp_path / "train.parquet", [1, None], [0, 1])
    source = open_source(f"parquet:{tmp_path}", "train", data_dir=None, key="k")
    with pytest.raises(ImageError, match="no bytes"):
        source[1]


@pytest.mark.parametrize("cache_bytes", [0, 700, 2**30])
def test_any_order_and_many_threads_read_the_same_in_bounded_memory(cache_bytes, tmp_path):
    path = tmp_path / "train.parquet"
    write(path, range(40), [0] * 40)
    records = RowGroups([ParquetTable(str(path))], cache_bytes=cache_bytes)
    rows = [row * 7 % 40 for row in range(200)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        images = list(pool.map(records.read, rows))
    assert images == [encode(row) for row in rows]
    held = sum(images.nbytes for images in records._cache.values())
    assert held == records._held
    assert held <= cache_bytes or len(records._cache) == 1


def test_a_row_group_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    write(path, range(40), [0] * 40)
    table, calls = ParquetTable(str(path)), []
    read_group = table.read_group

    def counted(group, column):
        calls.append(group)
        return read_group(group, column)

    monkeypatch.setattr(table, "read_group", counted)
    records = RowGroups([table])
    for row in range(40):
        records.read(row)
    assert calls == list(range(10))


def refuse(name, *words):
    with pytest.raises(UserError) as error:
        dataset_info(name, data_dir=None)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_will_not_do_are_refused(tmp_path):
    refuse(f"parquet:{tmp_path}", "there are no files", str(tmp_path))
    (tmp_path / "a.parquet").write_text("no parquet")
    refuse(f"parquet:{tmp_path}", "can't be read", "a.parquet: ")
    for number, (columns, words) in enumerate(
        [
            ({"image": [b"x"]}, ["columns image", "expected label for the label", "#image=img,"]),
            ({"img": [b"x"], "label": [0]}, ["columns img, label", "expected image", "#image=img"]),
            ({"image": ["x"], "label": [0]}, ["column image is string", "bytes"]),
            ({"image": [b"x"], "label": [-2]}, ["parquet[0] (row 1): label -2 is out of range"]),
            ({"image": [b"x"], "label": [2**40]}, ["label 1099511627776 is out of range"]),
            ({"image": [b"x"], "label": [0.5]}, ["label 0.5: expected a class name or an int"]),
            ({"image": [b"x"], "label": [-1]}, ["has no labels"]),
            ({"image": [b"x"], "label": [None]}, ["has no labels"]),
        ]
    ):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table(columns), path)
        refuse(f"parquet:{path}", *words)


def test_columns_of_one_name_are_refused(tmp_path):
    columns = [pa.array([b"x"]), pa.array([0]), pa.array([1])]
    pq.write_table(pa.table(columns, names=["image", "label", "label"]), tmp_path / "x.parquet")
    refuse(f"parquet:{tmp_path}", "x.parquet has several columns label; expected one")


def test_labels_outside_of_the_names_are_refused(tmp_path):
    write(tmp_path / "x.parquet", [1, 2], [0, 3], names=["a", "b"])
    refuse(f"parquet:{tmp_path}", "x.parquet[1] (row 2)", "label 3 is out of range", "0 to 1")
    write(tmp_path / "y.parquet", [1, 2], ["a", "bb"], names=["a", "b"])
    refuse(f"parquet:{tmp_path / 'y.parquet'}", "row 2", "unknown label 'bb'")


@pytest.mark.parametrize("names", [["2", "1", "0"], ["10", "cat"]])
def test_a_text_that_is_the_name_of_a_class_is_that_class(names, tmp_path):
    write(tmp_path / "train-0.parquet", range(len(names)), names, names=names)
    dataset = find_dataset(f"parquet:{tmp_path}", data_dir=None)
    assert dataset.info.class_names == tuple(names)
    assert dataset.labels.tolist() == list(range(len(names)))
    write(tmp_path / "b" / "train-0.parquet", [1, 2], ["1", "3"], names=["5", "4", "1", "0"])
    refuse(f"parquet:{tmp_path / 'b'}", "row 2", "unknown label '3'")


def test_numbers_and_texts_of_numbers_are_positions_among_other_names(tmp_path):
    write(tmp_path / "a.parquet", [1, 2], [1, 0], names=["1", "0"])
    write(tmp_path / "b.parquet", [1, 2], ["1", "0"], names=["auk", "bat"])
    for name in "ab":
        dataset = find_dataset(f"parquet:{tmp_path / name}.parquet", data_dir=None)
        assert dataset.labels.tolist() == [1, 0]


def test_spaces_and_nulls_of_the_column_split_make_no_splits(tmp_path, caplog):
    splits = ["train ", None, "train", "", " test"]
    write(tmp_path / "x.parquet", range(5), [" a", "a", "b", "b ", "a"], split=splits)
    with caplog.at_level("INFO", "vit_jax"):
        dataset = find_dataset(f"parquet:{tmp_path}", data_dir=None)
    assert dataset.lengths == {"test": 1, "train": 2}
    assert dataset.info.class_names == ("a", "b")
    assert any("left out 2 rows that have no split" in r.message for r in caplog.records)


UNLABELLED = {
    "minus one": {"labels": [-1, -1], "names": ["a", "b"]},
    "null": {"labels": [None, None], "names": ["a", "b"]},
    "some": {"labels": [0, -1], "names": ["a", "b"]},
    "names": {"labels": ["", ""]},
    "no column": {"labels": None},
}


@pytest.mark.parametrize("name", UNLABELLED)
def test_a_split_without_labels_is_refused_only_where_it_is_used(name, tmp_path):
    given = dict(UNLABELLED[name])
    labels = given.pop("labels")
    texts = name in ("names", "no column")
    write(tmp_path / "train-0.parquet", [5, 6], ["a", "b"] if texts else [0, 1], **given)
    test = tmp_path / "test-0.parquet"
    if labels is None:
        pq.write_table(pa.table({"image": [encode(1), encode(2)]}), test)
    else:
        write(test, [1, 2], labels, **given)
    dataset = f"parquet:{tmp_path}"
    assert dataset_info(dataset, data_dir=None).class_names == ("a", "b")
    assert greys(dataset, "train") == [5, 6]
    row = 1 if name == "some" else 0
    for split in ("test", "all"):
        with pytest.raises(UserError) as error:
            open_source(dataset, split, data_dir=None, key="evals.test.split")
        # Files are in the order of their names.
        assert str(error.value) == (
            f"evals.test.split={split!r} of {dataset}: {test}[{row}] (row {row + 1}) has no label; "
            "expected integers from 0 to 1"
        )


def test_other_names_of_columns_stand_in_the_name_of_the_dataset(tmp_path):
    features = {"fine": {"names": ["a", "b"], "_type": "ClassLabel"}}
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {
        "img": [encode(grey) for grey in (1, 2, 3)],
        "fine": [0, 1, 1],
        "coarse": [5, 6, 7],
        "part": ["train", "train", "test"],
    }
    table = pa.table(columns).replace_schema_metadata(meta)
    pq.write_table(table, tmp_path / "x.parquet")
    name = f"parquet:{tmp_path}#image=img,label=fine,split=part"
    info = dataset_info(name, data_dir=None)
    assert (info.num_classes, info.class_names) == (2, ("a", "b"))
    assert greys(name, "test") == [3]
    other = f"parquet:{tmp_path / '*.parquet'}#label=coarse,image=img"
    assert dataset_info(other, data_dir=None).num_classes == 8
    refuse(f"parquet:{tmp_path}#image=img,label=fin", "columns img, fine, ", "expected fin for")
    refuse(f"parquet:{tmp_path}#image=img,label=fine,split=x", "expected x for the split")
    refuse(f"parquet:{tmp_path}#picture=img", "there are no files", "#picture=img")


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    folder = tmp_path / "run [1] * ?"
    write(folder / "train-[0].parquet", [1, 2], [0, 1])
    for path in ("", "/train-[0].parquet", "/train-*.parquet", "/train-[[]0].parquet"):
        assert greys(f"parquet:{folder}{path}", "train") == [1, 2]


def test_files_that_contradict_each_other_are_refused(tmp_path):
    write(tmp_path / "train-0.parquet", [1, 2], [0, 1], names=["a", "b"])
    write(tmp_path / "train-1.parquet", [1, 2], [0, 1], names=["b", "a"])
    refuse(f"parquet:{tmp_path}", "train-1.parquet has other class names", "train-0.parquet")
    write(tmp_path / "some" / "train-0.parquet", [1, 2], [0, 1])
    write(tmp_path / "some" / "more.parquet", [1, 2], [0, 1])
    refuse(f"parquet:{tmp_path / 'some'}", "only some of its files are named for a split")


def test_slow_reading_is_announced(birds, caplog, monkeypatch):
    caplog.set_level("INFO", "vit_jax")
    dataset_info(birds, data_dir=None)
    assert not any("stay in memory" in r.message for r in caplog.records)
    monkeypatch.setattr(tables, "CACHE_BYTES", 100)
    parquet.parquet_dataset.cache_clear()
    dataset_info(birds, data_dir=None)
    assert any("a row group, here of 3 rows" in r.message for r in caplog.records)


def test_without_pyarrow_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refuse(f"parquet:{tmp_path}/none", "pip install 'vit_jax[parquet]'")


def table(rows, *, image=b"", label=0):
    return pa.table({"image": pa.array([image] * rows, pa.binary()), "label": [label] * rows})


@pytest.mark.parametrize("image", [b"", None], ids=["empty", "null"])
def test_rows_that_take_no_bytes_are_refused(image, tmp_path):
    pq.write_table(table(10**5, image=image), tmp_path / "train.parquet", row_group_size=10**5)
    assert (tmp_path / "train.parquet").stat().st_size < 10_000
    refuse(f"parquet:{tmp_path}", "100,000 rows in")


def test_labels_that_grow_when_they_are_read_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_jax.utils.bounds._MIN_BOUND", 1 << 16)
    names = pa.array(["a" * 10**6, "b" * 10**6])
    pq.write_table(pa.table({"image": [b"", b""], "label": names}), tmp_path / "a.parquet")
    refuse(f"parquet:{tmp_path}", "a.parquet: ", "bytes that would become 2,000,")


def test_images_that_grow_when_they_are_read_are_refused_or_corrupt(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_jax.utils.bounds._MIN_BOUND", 1 << 16)
    path, images = tmp_path / "a.parquet", table(500, image=bytes(10**5))
    pq.write_table(images, path, use_dictionary=False)
    refuse(f"parquet:{path}", "bytes that would become 50,0")
    pq.write_table(images, tmp_path / "b.parquet")  # All rows share one image.
    source = open_source(f"parquet:{tmp_path}/b.parquet", "train", data_dir=None, key="data.split")
    allocated = pa.total_allocated_bytes()
    with pytest.raises(ImageError, match="bytes that would become"):
        source[0]
    assert pa.total_allocated_bytes() - allocated < 10**7


def test_what_is_no_file_or_empty_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    refuse(f"parquet:{tmp_path}/a.parquet", "it is a FIFO, not a file")
    (tmp_path / "b.parquet").write_bytes(b"")
    refuse(f"parquet:{tmp_path}/b.parquet", "can't be read")
    os.truncate(tmp_path / "b.parquet", 2**39)
    refuse(f"parquet:{tmp_path}/b.parquet", "are stored")


# Captions


def write_captions(folder, name="train-0.parquet", **columns):
    table = pa.table({"image": [encode(n) for n in range(6)], **columns})
    pq.write_table(table, folder / name, row_group_size=2)


def captions_of(name):
    source = open_source(name, "train", data_dir=None, key="split")
    return [source.captions(index) for index in range(len(source))]


@pytest.mark.parametrize("column", ["caption", "captions", "text"])
def test_a_column_of_texts_is_the_captions(column, tmp_path):
    texts = ["one", None, "", " three ", "four", "five"]
    write_captions(tmp_path, **{column: texts})
    info = dataset_info(f"parquet:{tmp_path}", data_dir=None)
    assert (info.num_classes, info.captions) == (0, True)
    want = [("one",), (), (), ("three",), ("four",), ("five",)]
    assert captions_of(f"parquet:{tmp_path}") == want


def test_captions_may_be_in_several_columns_and_in_lists(tmp_path):
    lists = pa.array([["a", "b"], [], None, ["c"], ["d", None], ["e"]])
    names = pa.array(list("vwxyzv")).dictionary_encode()
    write_captions(tmp_path, "train-0.parquet", short=names, long=lists, label=[0, 1] * 3)
    write_captions(tmp_path, "train-1.parquet", short=names, long=lists, label=[1, 0] * 3)
    name = f"parquet:{tmp_path}#caption=long+short"
    info = dataset_info(name, data_dir=None)
    assert (info.num_classes, info.captions) == (2, True)
    want = [("a", "b", "v"), ("w",), ("x",), ("c", "y"), ("d", "z"), ("e", "v")]
    assert captions_of(name) == want * 2
    assert not dataset_info(f"parquet:{tmp_path}", data_dir=None).captions


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("caption=nothing", ["expected nothing for the caption"]),
        ("caption=number", ["column number is int64", "a text or a list of texts"]),
        ("caption=title,label=nothing", ["expected nothing for the label"]),
    ],
)
def test_columns_that_hold_no_captions_are_refused(columns, words, tmp_path):
    write_captions(tmp_path, title=list("abcdef"), number=list(range(6)))
    with pytest.raises(UserError) as error:
        dataset_info(f"parquet:{tmp_path}#{columns}", data_dir=None)
    for word in words:
        assert word in str(error.value)
