# SPDX-License-Identifier: Apache-2.0
"""Tar shards as datasets, in the layout of WebDataset."""

import io
import json
import logging
import os
import tarfile

import pytest

from tests.images import encode
from vit_jax.data.ops.decode import ImageError
from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.data.sources import open_source, tar, tar_index
from vit_jax.data.sources.tar import expand_braces, tar_dataset
from vit_jax.utils.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of indexes of one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "vit_jax" / "tar"
    tar_dataset.cache_clear()
    tar_index.member_names.cache_clear()


def write(path, members, *, format=tarfile.PAX_FORMAT):
    """A shard of (name, content) in this order; numbers become images of that grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            if isinstance(content, int):
                content = encode(content)
            elif isinstance(content, dict):
                content = json.dumps(content).encode()
            elif isinstance(content, str):
                content = content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(start, stop):
    """Samples of greys in a range, with `n % 3` as `.cls`."""
    return [
        pair
        for n in range(start, stop)
        for pair in ((f"{n:06}.cls", str(n % 3)), (f"{n:06}.png", n))
    ]


@pytest.fixture
def shards(tmp_path):
    """Two shards to train on, and one to test on."""
    write(tmp_path / "s" / "train-000.tar", samples(0, 10))
    write(tmp_path / "s" / "train-001.tar", samples(10, 17))
    write(tmp_path / "s" / "val-000.tar", samples(20, 23))
    return tmp_path / "s"


def open_all(text, split="all"):
    tar_dataset.cache_clear()
    return open_source(f"tar:{text}", split, data_dir=None, key="data.split")


def test_records_are_those_of_tarfile_in_their_order(shards):
    dataset = tar_dataset(str(shards / "{train-{000..001},val-000}.tar"))
    expected, labels = [], []
    for name in ("train-000", "train-001", "val-000"):
        with tarfile.open(shards / f"{name}.tar") as tar:
            content = {m.name: tar.extractfile(m).read() for m in tar}
        expected += [content[n] for n in sorted(content) if n.endswith(".png")]
        labels += [int(content[n]) for n in sorted(content) if n.endswith(".cls")]
    assert [dataset.records.read(row) for row in range(20)] == expected
    assert dataset.labels.tolist() == labels
    assert dataset.lengths == {"train": 17, "validation": 3}
    assert dataset.records.describe(12) == f"{shards}/train-001.tar/000012.png"
    assert not dataset.cut


def test_the_pipeline_reads_a_folder_of_shards(shards):
    spec = DatasetSpec(f"tar:{shards}", "train[5:]", "decode|resize(8)", 4, None, "data")
    batches = list(eval_batches(spec))
    pairs = [
        (int(v), int(label))
        for b in batches
        for v, label, m in zip(b["image"][:, 0, 0, 0], b["label"], b["mask"], strict=True)
        if m
    ]
    assert [v for v, _ in pairs] == list(range(5, 17))


def test_the_index_is_made_once(shards, cache, caplog):
    caplog.set_level(logging.INFO)
    assert len(open_all(shards, "train")) == 17
    assert "made the index of 3 shards, 20 samples" in caplog.text
    files = sorted(cache.iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 3
    caplog.clear()
    source = open_all(shards, "train")
    assert "made the index" not in caplog.text
    assert [file.stat().st_mtime_ns for file in files] == times
    assert [source.label(i) for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_hosts_that_share_the_folder_start_at_different_shards(shards, cache, monkeypatch):
    begun = {}
    make = tar_index._make
    monkeypatch.setattr(tar, "_READERS", 1)
    for host in ("a", "b", "c", "d"):
        order = begun.setdefault(host, [])
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        monkeypatch.setattr(
            tar_index,
            "_make",
            lambda content, path, choice, order=order: (
                order.append(path) or make(content, path, choice)
            ),
        )
        labels = [open_all(shards, "train").label(i) for i in range(17)]
        assert labels == [n % 3 for n in range(17)]
        assert sorted(order) == sorted(map(str, shards.iterdir()))
        if host == "d":
            break
        for file in cache.iterdir():
            file.unlink()
    assert len({order[0] for order in begun.values()}) > 1
    # What another host has stored is read, and no temporary files are left.
    monkeypatch.setattr("socket.gethostname", lambda: "e")
    begun["d"].clear()
    open_all(shards, "train")
    assert begun["d"] == []
    assert len(list(cache.iterdir())) == 3


def test_an_interrupted_index_resumes_with_what_is_missing(shards, cache, caplog):
    caplog.set_level(logging.INFO)
    open_all(shards)
    sorted(cache.iterdir())[0].unlink()
    caplog.clear()
    assert len(open_all(shards)) == 20
    assert "made the index of 1 shards" in caplog.text


def test_an_index_older_than_its_shard_is_made_again(shards):
    open_all(shards)
    write(shards / "train-001.tar", samples(30, 32))
    source = open_all(shards, "train")
    assert len(source) == 12
    assert source[10]["image"] == encode(30)


def test_a_shard_that_changes_later_is_noticed(shards):
    source = open_all(shards, "train")
    before = os.stat(shards / "train-000.tar")
    write(shards / "train-000.tar", [("x.txt", "text" * 200), *samples(0, 10)])
    os.utime(shards / "train-000.tar", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ImageError, match="its shard has changed since its index was made"):
        source[3]


def test_a_damaged_index_is_made_again(shards, cache, caplog):
    open_all(shards)
    file = sorted(cache.iterdir())[0]
    file.write_bytes(file.read_bytes()[:300])
    assert len(open_all(shards)) == 20
    assert f"{file} is damaged" in caplog.text


def test_a_folder_of_caches_that_cannot_be_written(shards, cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in its place")
    source = open_all(shards, "train")
    assert len(source) == 17
    assert "can't be stored" in caplog.text
    assert source.describe(11) == f"{shards}/train-001.tar[1]"


def test_labels_are_values_of_json_and_may_be_several(tmp_path):
    members = [
        ("a.jpg", 1),
        ("a.json", {"tags": ["x", "y"], "meta": {"id": 5}, "label": "cat"}),
        ("b.jpg", 2),
        ("b.json", {"tags": [], "meta": {"id": 0}, "label": "ant"}),
    ]
    path = write(tmp_path / "x.tar", members)
    plain = tar_dataset(str(path))
    assert plain.info.class_names == ("ant", "cat")
    assert plain.labels.tolist() == [1, 0]
    nested = tar_dataset(f"{path}#label=json.meta.id")
    assert nested.labels.tolist() == [5, 0]
    assert nested.info.num_classes == 6
    several = tar_dataset(f"{path}#label=json.tags")
    assert several.info.multi_label
    assert [labels.tolist() for labels in several.labels] == [[0, 1], []]


def test_captions_are_the_lines_of_txt_or_a_value_of_json(tmp_path):
    members = [
        ("d/a.png", 1),
        ("d/a.txt", "a heron\n two herons \n"),
        ("d/b.png", 2),
        ("d/b.json", {"caption": "a robin", "others": ["one", "two"]}),
        ("d/c.png", 3),
    ]
    path = write(tmp_path / "train.tar", members)
    source = open_all(path, "train")
    found = [source.captions(i) for i in range(3)]
    assert found == [("a heron", "two herons"), ("a robin",), ()]
    assert "label" not in source[0]
    source = open_all(f"{path}#caption=json.others", "train")
    assert [source.captions(i) for i in range(3)] == [(), ("one", "two"), ()]


def test_class_names_are_those_beside_the_shards(shards):
    (shards / "classes.txt").write_text("auk\nbat\ncrow\ndove\n")
    assert tar_dataset(str(shards)).info.class_names == ("auk", "bat", "crow", "dove")


def test_shards_without_a_word_of_a_split_are_cut(tmp_path):
    write(tmp_path / "part-0.tar", samples(0, 30))
    dataset = tar_dataset(str(tmp_path / "part-*.tar"))
    assert dataset.cut
    assert dataset.lengths == {"train": 24, "validation": 3, "test": 3}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_other_forms_of_tar(tmp_path, format):
    name = f"{'d' * 90}/{'ü' if format != tarfile.USTAR_FORMAT else 'u'}{'n' * 90}"
    path = write(tmp_path / "x.tar", [(f"{name}.png", 7), (f"{name}.cls", "3")], format=format)
    dataset = tar_dataset(str(path))
    assert dataset.records.read(0) == encode(7)
    assert dataset.records.describe(0) == f"{path}/{name}.png"


def test_members_out_of_order_are_joined(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    images = [(f"{n}.png", n) for n in range(4)]
    path = write(tmp_path / "x.tar", [*images, *((f"{n}.cls", str(n)) for n in (3, 1, 0, 2))])
    assert tar_dataset(str(path)).labels.tolist() == [0, 1, 2, 3]
    assert "3 members are not beside the others of their key" in caplog.text


def test_what_is_left_out_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    members = [("._a.png", "mac"), ("README", "x"), ("q.json", {"label": 0}), *samples(0, 3)]
    path = write(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("z.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert len(tar_dataset(str(path)).labels) == 3
    assert f"left out 1 keys without an image, the first of them q in {path}" in caplog.text
    assert "left out 3 members that are no files KEY.ENDING, the first of them ._a" in caplog.text


def test_hard_links_are_the_member_that_they_name(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "x.tar", [("./a.png", 1), ("./a.cls", "0"), ("notes", "1")])
    with tarfile.open(path, "a") as tar:
        pairs = [("b.png", "a.png"), ("b.cls", "notes"), ("c.cls", "./a.cls"), ("c.png", "b.png")]
        for name, target in [*pairs, ("a.png", "./a.png"), ("d.png", "e.png")]:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            tar.addfile(link)
    dataset = tar_dataset(str(path))
    assert [dataset.records.read(row) for row in range(3)] == [encode(1)] * 3
    assert dataset.labels.tolist() == [0, 1, 0]
    assert dataset.records.describe(1) == f"{path}/b.png"
    expected = "left out 1 hard links to what is no file before them, the first of them d.png to e"
    assert expected in caplog.text


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def test_a_shard_without_its_end_is_reported(tmp_path, caplog):
    path = write(tmp_path / "x.tar", samples(0, 3))
    with tarfile.open(path) as tar:
        last = max(m.offset_data + 512 * -(-m.size // 512) for m in tar)
    path.write_bytes(path.read_bytes()[:last])
    assert len(tar_dataset(str(path)).labels) == 3
    assert "lack the mark of their end: they may have been cut" in caplog.text


def refused(folder):
    """Cases of shards that are refused, and what the one line has."""
    good = samples(0, 40)
    zipped = io.BytesIO()
    with tarfile.open(fileobj=zipped, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    write(folder / "cut.tar", good)
    cut(folder / "cut.tar", 0.507)
    write(folder / "cutheader.tar", [("a.png", b"1" * 512), ("b.png", b"2")])
    (folder / "cutheader.tar").write_bytes((folder / "cutheader.tar").read_bytes()[:1100])
    write(folder / "hole.tar", [("a.png", b"1" * 512), ("b.png", b"2" * 512)])
    content = bytearray((folder / "hole.tar").read_bytes())
    content[1024:1100] = b"\xff" * 76
    (folder / "hole.tar").write_bytes(content)
    write(folder / "one.tar", good)
    (folder / "two.tar").write_bytes((folder / "one.tar").read_bytes() * 2)
    (folder / "zip.tar").write_bytes(zipped.getvalue())
    (folder / "empty.tar").write_bytes(b"")
    (folder / "noise.tar").write_bytes(b"no tar file at all" * 100)
    write(folder / "twice.tar", [*good, good[1]])
    write(folder / "images.tar", [("a.png", 1), ("a.jpg", 2), ("a.cls", "0")])
    write(folder / "json.tar", [("a.png", 1), ("a.json", "{")])
    write(folder / "list.tar", [("a.png", 1), ("a.json", {"label": 0.5})])
    write(folder / "alone.tar", [("a.png", 1), ("a.npy", "0")])
    write(folder / "none.tar", [("a.cls", "1"), ("a.npy", "0")])
    write(folder / "latin.tar", [("a.png", 1), ("a.cls", b"caf\xe9")])
    write(folder / "in_list.tar", [("a.png", 1), ("a.json", {"label": [3, -1]})])
    write(folder / "lines.tar", [("a.png", 1), ("a.cls", "0\n1")])
    os.mkfifo(folder / "fifo.tar")
    (folder / "train-0.tar").write_bytes((folder / "one.tar").read_bytes())
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return refused(tmp_path_factory.mktemp("broken"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cut.tar", "cut.tar is damaged or was cut after 0000"),
        ("cutheader.tar", "is damaged or was cut after a.png"),
        ("hole.tar", "is damaged or was cut after a.png"),
        ("empty.tar", "empty.tar is damaged or was cut"),
        ("noise.tar", "noise.tar is damaged or was cut"),
        ("two.tar", "two.tar has data after its end"),
        ("zip.tar", "zip.tar is compressed by gzip: expected a plain tar file"),
        ("twice.tar", "twice.tar has 000000.png twice"),
        ("images.tar", "a has 2 images, .jpg and .png: expected one; tar:PATTERN#image=jpg"),
        ("json.tar", "json.tar: a.json is no JSON"),
        ("list.tar", "list.tar: a.json: label is 0.5; expected a class name"),
        ("alone.tar", "neither labels nor captions: its members end in .npy (1), .png (1)"),
        ("none.tar", "no samples with images: its members end in .cls (1), .npy (1)"),
        ("one.tar#label=json.id", "no sample has 'json.id' for its label; its members end in"),
        ("one.tar#image=webp", "no samples with .webp"),
        ("latin.tar", "latin.tar: a.cls has b'caf\\xe9', which is not UTF-8; expected a class"),
        (
            "in_list.tar",
            "in_list.tar/a.png (row 1) has a label that is -1 or empty in its list of 2",
        ),
        ("lines.tar", "a.cls has '0\\n1'; expected a class name"),
        ("fifo.tar", "fifo.tar can't be read: it is a FIFO"),
        ("{000..003}.tar", "there are no files {}/000.tar and 3 more"),
        ("nothing-*.tar", "there are no files {}/nothing-*.tar"),
        ("{one,train-0}.tar", "one.tar is not named for a split, and others are"),
    ],
)
def test_what_is_refused(broken, text, reason):
    with pytest.raises(UserError) as error:
        open_all(broken / text)
    assert reason.replace("{}", str(broken)) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gs://", "data.name='tar:gs://': 'gs://': expected gs://BUCKET/PATH or s3://BUCKET/PATH"),
        ("s3://B_/{0..1}", "data.name='tar:s3://B_/{0..1}': 's3://B_/0': expected gs://BUCKET/P"),
        ("{http,https}://x/y.tar", "'{http,https}://x/y.tar': expected a path, or a URL of gs://"),
        ("http://x/y.tar", "'http://x/y.tar': expected a path, or a URL of gs:// or s3://"),
    ],
)
def test_urls_that_are_refused(text, reason):
    with pytest.raises(UserError) as error:
        tar_dataset(text)
    assert str(error.value).startswith(f"data.name='tar:{text}': ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a{000..002}.tar", ["a000.tar", "a001.tar", "a002.tar"]),
        ("a{8..11}", ["a8", "a9", "a10", "a11"]),
        ("a{08..11}", ["a08", "a09", "a10", "a11"]),
        ("a{2..0}", ["a2", "a1", "a0"]),
        ("{train,val}-{0,1}", ["train-0", "train-1", "val-0", "val-1"]),
        ("{a{0..1},b}", ["a0", "a1", "b"]),
        ("a{0..10}", [f"a{n}" for n in range(11)]),
        ("a{1..03}", ["a01", "a02", "a03"]),
        ("{0..10..5}-{a..c}", [f"{n}-{c}" for n in (0, 5, 10) for c in "abc"]),
        ("{04..0..-3}{C..A..0}", [f"{n}{c}" for n in ("04", "01") for c in "CBA"]),
        ("{x}/{}/{a..1}/{a..B}/{aa..b}{", ["{x}/{}/{a..1}/{a..B}/{aa..b}{"]),
        ("{x}{0..1}", ["{x}0", "{x}1"]),
        ("plain", ["plain"]),
    ],
)
def test_braces_are_those_of_a_shell(pattern, expected):
    assert list(expand_braces(pattern)) == expected
