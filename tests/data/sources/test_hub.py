# SPDX-License-Identifier: Apache-2.0
"""Datasets of the Hugging Face hub, and folders that its library `datasets` writes."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub_server import forget_all, hub, make_table, parquet, push_birds
from tests.images import encode
from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.data.sources import find_dataset, open_source
from vit_jax.data.sources.hub import hub_dataset, pin_name, unpin_name
from vit_jax.data.sources.hub_layout import find_layout
from vit_jax.utils.errors import UserError

__all__ = ["hub"]

ENDS = ("png", "cls")


def make_tar(members):
    """The bytes of a shard."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def greys(name, split):
    spec = DatasetSpec(name, split, "decode|resize(8)", 4, None, "data")
    return [
        int(grey)
        for batch in eval_batches(spec)
        for grey, real in zip(batch["image"][:, 0, 0, 0], batch["mask"], strict=True)
        if real
    ]


def refusal(name):
    with pytest.raises(UserError) as error:
        find_dataset(name, data_dir=None)
    assert "\n" not in str(error.value)
    return str(error.value)


# Repositories


def test_a_repository_is_read_in_the_order_of_its_files(hub):
    push_birds(hub)
    dataset = find_dataset("hf:me/birds", data_dir=None)
    assert dataset.lengths == {"test": 2, "train": 9}
    assert (dataset.info.num_classes, dataset.info.class_names) == (2, ("auk", "bat"))
    assert greys("hf:me/birds", "train") == list(range(9))
    assert greys("hf:me/birds", "train[-40%:]") == [5, 6, 7, 8]
    assert greys("hf:me/birds", "test") == [20, 21]
    rows = open_source("hf:me/birds", "train", data_dir=None, key="k")
    assert [int(rows[i]["label"]) for i in (0, 1, 8)] == [0, 1, 1]
    assert rows.describe(5).endswith("data/train-00001-of-00002.parquet[0]")


def test_files_are_downloaded_once_and_others_never(hub, caplog):
    push_birds(hub, **{"notes.pdf": b"x", "raw/all.zip": b"y"})
    with caplog.at_level("INFO", "vit_jax"):
        find_dataset("hf:me/birds", data_dir=None)
    assert "downloads 3 files, 0.00 GB, to " in caplog.text
    gets = [request for request in hub.requests if request.startswith("GET /datasets/")]
    assert len(gets) == 3
    assert not any("zip" in request or "pdf" in request for request in hub.requests)
    forget_all()
    hub.requests.clear()
    find_dataset("hf:me/birds", data_dir=None)
    assert hub.requests == ["GET /api/datasets/me/birds"]


def test_a_revision_is_a_branch_or_a_commit(hub):
    old = push_birds(hub)
    hub.push("me/birds", {"data/train-00000-of-00001.parquet": parquet([7], [0])})
    hub.push("me/birds", {"train.parquet": parquet([3, 4], [0, 1])}, branch="refs/pr/1")
    assert greys("hf:me/birds", "train") == [7]
    assert greys(f"hf:me/birds@{old}", "test") == [20, 21]
    assert greys("hf:me/birds@refs/pr/1", "train") == [3, 4]


def test_a_name_is_pinned_to_the_commit_of_its_revision(hub):
    first = push_birds(hub)
    name = "hf:me/birds#image=image,label=label"
    pinned = pin_name(name)
    assert pinned == f"hf:me/birds@{first}#image=image,label=label"
    hub.push("me/birds", {"data/train-00000-of-00001.parquet": parquet([7], [0])})
    assert greys(pinned, "test") == [20, 21]
    assert pin_name(pinned) == pinned
    assert unpin_name(pinned) == name
    for other in ("hf:/data/x@y", "hf:./x", "cifar10", "folder:a@b", "hf:me/birds@v1"):
        assert unpin_name(other) == other
    assert pin_name("hf:./x") == "hf:./x"


def test_without_a_network_the_cache_is_read(hub, monkeypatch):
    commit = push_birds(hub)
    find_dataset("hf:me/birds", data_dir=None)
    forget_all()
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert greys("hf:me/birds", "test") == [20, 21]
    assert greys(f"hf:me/birds@{commit}", "test") == [20, 21]
    assert hub.requests == []
    text = refusal("hf:me/others")
    assert "HF_HUB_OFFLINE is set, and there is no copy in the cache" in text


def test_a_revision_that_is_gone_is_read_from_the_cache_by_its_commit_alone(hub):
    commit = push_birds(hub)
    hub.branches["me/birds"]["v2"] = commit
    assert greys("hf:me/birds@v2", "test") == [20, 21]
    del hub.branches["me/birds"]["v2"], hub.commits["me/birds"][commit]
    forget_all()
    assert "has no revision v2" in refusal("hf:me/birds@v2")
    assert greys(f"hf:me/birds@{commit}", "test") == [20, 21]


def test_a_repository_without_images_is_one_line(hub):
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), table)
    hub.push("me/text", {"data/train-00000-of-00001.parquet": table.getvalue()})
    hub.push("me/sound", {"train/a.wav": b"RIFF", "README.md": b"# Sound"})
    assert "has the columns text, label; expected image for the image" in refusal("hf:me/text")
    assert "holds 1 .wav: expected Parquet, Arrow or tar files" in refusal("hf:me/sound")


def test_a_part_of_a_repository_in_the_cache_is_no_smaller_dataset(hub, monkeypatch, tmp_path):
    commit = push_birds(hub)
    find_dataset("hf:me/birds", data_dir=None)
    forget_all()
    folder = tmp_path / "hub" / "datasets--me--birds"
    (folder / "snapshots" / commit / "data" / "train-00001-of-00002.parquet").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and 1 of 3 files are not in the cache" in refusal("hf:me/birds")
    forget_all()
    (folder / "trees" / f"{commit}.json").unlink()  # As another program leaves it.
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    assert "data/train-00001-of-00002.parquet is missing" in refusal("hf:me/birds")


def test_a_repository_that_can_not_be_read_is_one_line(hub, monkeypatch):
    push_birds(hub)
    hub.push("me/secret", {"data/train-00000-of-00001.parquet": parquet([7], [0])})
    hub.gated.add("me/secret")
    url = hub.url
    assert refusal("hf:me/none") == (
        f"data.name='hf:me/none': there is no dataset {url}/datasets/me/none, or it is private: "
        "log in with `hf auth login`, or set HF_TOKEN if it is"
    )
    assert f"ask for access at {url}/datasets/me/secret" in refusal("hf:me/secret")
    assert "has no revision v9: expected a branch" in refusal("hf:me/birds@v9")
    hub.push("me/old", {"data/train-00000-of-00001.parquet": b""}, branch="master")
    assert "has no revision main: expected a branch" in refusal("hf:me/old")
    gone = "0123456789" * 4
    assert f"has no revision {gone}" in refusal(f"hf:me/birds@{gone}")
    assert "expected hf:OWNER/NAME, with @REVISION" in refusal("hf:me/birds/small")
    assert "expected hf:OWNER/NAME" in refusal("hf:me--x/-b")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    text = refusal("hf:me/more")
    assert "http://127.0.0.1:9 can't be reached, and there is no copy in the cache" in text
    assert "data.prepare" in text


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert "pip install 'vit_jax[hub,parquet]'" in refusal("hf:me/birds")


def test_subsets_of_a_card(hub):
    card = """---
license: mit
configs:
- config_name: small
  data_files:
  - split: train
    path: small/a-*
  - split: val
    path: [small/b.parquet]
- config_name: large
  data_dir: large
dataset_info:
- config_name: large
  features:
  - name: picture
    dtype: image
  - name: kind
    dtype:
      class_label:
        names:
          '0': x
          '1': y
  splits:
  - name: train
    num_examples: 99
---
# Birds
"""
    plain = io.BytesIO()
    table = make_table([9], [1], image="picture", name="kind").replace_schema_metadata(None)
    pq.write_table(table, plain)
    files = {
        "README.md": card.encode(),
        "small/a-1.parquet": parquet([1], [0]),
        "small/a-2.parquet": parquet([2], [1]),
        "small/b.parquet": parquet([3], [1]),
        "large/train.parquet": plain.getvalue(),
    }
    hub.push("me/birds", files)
    assert greys("hf:me/birds#subset=small", "train") == [1, 2]
    assert greys("hf:me/birds#subset=small", "validation") == [3]
    large = find_dataset("hf:me/birds#subset=large", data_dir=None)
    assert large.info.class_names == ("x", "y")
    assert large.lengths == {"train": 1}
    assert refusal("hf:me/birds").endswith(
        "has the subsets small, large: expected one of them, as in hf:NAME#subset=small"
    )
    text = refusal("hf:me/birds#subset=smal")
    assert "there is no subset 'smal'; did you mean 'small'?" in text
    files["README.md"] = card.replace("data_dir: large", "data_dir: none").encode()
    hub.push("me/birds", files)
    forget_all()
    text = refusal("hf:me/birds#subset=large")
    assert text.endswith("README.md: there are no files of the subset large")
    with pytest.raises(UserError, match="there is no such split; hf:me/birds#subset=small has tr"):
        open_source("hf:me/birds#subset=small", "test", data_dir=None, key="data.split")


def test_the_copy_in_parquet_that_the_hub_makes(hub):
    files = {
        "plain/train/0000.parquet": parquet([1], [0]),
        "plain/train/0001.parquet": parquet([2], [1]),
        "plain/partial-test/0000.parquet": parquet([3], [0]),
        "other/train/0000.parquet": parquet([4], [0]),
    }
    hub.push("me/old", {"old.py": b"", "data.zip": b""})
    hub.push("me/old", files, branch="refs/convert/parquet")
    assert "hf:OWNER/NAME@refs/convert/parquet" in refusal("hf:me/old")
    name = "hf:me/old@refs/convert/parquet"
    assert "has the subsets other, plain" in refusal(name)
    assert greys(f"{name}#subset=plain", "train") == [1, 2]
    assert greys(pin_name(f"{name}#subset=plain"), "test") == [3]


def test_images_and_tar_files_of_a_repository(hub):
    images = {
        f"data/{split}/{kind}/{grey}.png": encode(grey)
        for grey, (split, kind) in enumerate(
            [("train", "auk"), ("train", "bat"), ("train", "bat"), ("test", "auk")]
        )
    }
    hub.push("me/images", images | {"README.md": b"none"})
    assert sorted(greys("hf:me/images", "train")) == [0, 1, 2]
    assert find_dataset("hf:me/images", data_dir=None).info.class_names == ("auk", "bat")
    lines = b"file_name,species\n0.png,auk\n1.png,bat\n"
    files = {f"train/{grey}.png": encode(grey) for grey in range(2)}
    hub.push("me/rows", files | {"train/metadata.csv": lines})
    assert sorted(greys("hf:me/rows#label=species", "train")) == [0, 1]
    assert "data.name='hf:me/rows#label=kind'" in refusal("hf:me/rows#label=kind")
    shard = make_tar({"7.png": encode(7), "7.cls": b"1"})
    hub.push("me/tars", {"train-000.tar": shard, "classes.txt": b"auk\nbat\n"})
    assert greys("hf:me/tars", "train") == [7]
    assert find_dataset("hf:me/tars", data_dir=None).info.class_names == ("auk", "bat")


def test_a_card_names_the_splits_of_images_and_shards(hub):
    def push(pattern, files):
        card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
        for split, path in pattern.items():
            card += f"  - split: {split}\n    path: '{path}'\n"
        hub.push("me/listed", files | {"README.md": f"{card}---\n".encode()})
        forget_all()
        return hub_dataset("me/listed")

    images = {f"imgs/{kind}/{n}.png": encode(n) for kind in ("auk", "bat") for n in range(5)}
    dataset = push({"train": "imgs/**"}, images)
    assert (dataset.lengths, dataset.cut) == ({"train": 10}, False)
    folders = {f"imgs/{part}/auk/{n}.png": encode(n) for part in "ab" for n in range(5)}
    dataset = push({"train": "imgs/a/**", "test": "imgs/b/**"}, folders)
    assert (dataset.lengths, dataset.info.class_names) == ({"test": 5, "train": 5}, ("auk",))
    shards = {f"{n}.tar": make_tar({f"{n}.png": encode(n), f"{n}.cls": b"0"}) for n in range(3)}
    dataset = push({"train": "[01].tar", "test": "2.tar"}, shards)
    assert dataset.lengths == {"test": 1, "train": 2}
    assert greys("hf:me/listed", "train") == [0, 1]


def write_folder(folder, files, configs):
    """A folder with these files, numbers become images of that grey, and the configs of a card."""
    listed = []
    for name, data_files in configs.items():
        entries = [{"split": split, "path": path} for split, path in data_files]
        listed.append({"config_name": name, "data_files": entries})
    card = f"---\nconfigs: {json.dumps(listed)}\n---\n"
    for path, content in {**files, "README.md": card.encode()}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(encode(content) if isinstance(content, int) else content)
    forget_all()
    return f"hf:{folder}"


def shard(*greys):
    return make_tar({f"{n}.{e}": encode(n) if e == "png" else b"0" for n in greys for e in ENDS})


def contents(name):
    """The greys of each split, sorted."""
    lengths = find_dataset(name, data_dir=None).lengths
    return {split: sorted(greys(name, split)) for split in lengths}


def test_shards_are_those_of_the_subset_and_its_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = {"data/a-train-0.tar": shard(0, 1), "data/b-train-0.tar": shard(2)}
    configs = {"a": [("train", "data/a-*.tar")], "b": [("train", "data/b-*.tar")]}
    name = write_folder(tmp_path / "two", files, configs)
    assert contents(f"{name}#subset=a") == {"train": [0, 1]}
    assert contents(f"{name}#subset=b") == {"train": [2]}
    files = {
        "data/train-0.tar": shard(0),
        "data/train-1.tar": shard(1),
        "data/test-0.tar": shard(2),
    }
    configs = {"default": [("train", "data/train-1.tar"), ("validation", "data/test-0.tar")]}
    assert contents(write_folder(tmp_path / "one", files, configs)) == {
        "train": [1],
        "validation": [2],
    }
    with pytest.raises(UserError, match="split=x can't be given for tar files: expected image, la"):
        hub_dataset(f"{tmp_path / 'one'}#split=x")


def test_shards_of_other_subsets_are_not_downloaded(hub):
    card = """---
configs:
- config_name: a
  data_files: data/a-*.tar
- config_name: b
  data_files: b/*/x.png
---
"""
    files = {f"data/{n}.tar": shard(1) for n in ("a-train-0", "b-train-0")}
    files |= {"b/auk/x.png": encode(1), "b/bat/x.png": encode(2), "b/bat/y.png": encode(3)}
    hub.push("me/tars", files | {"README.md": card.encode(), "data/classes.txt": b"auk\n"})
    assert contents("hf:me/tars#subset=a") == {"train": [1]}
    assert contents("hf:me/tars#subset=b") == {"train": [1, 2]}
    read = [request.rpartition("/")[2] for request in hub.requests if request.startswith("GET")]
    assert "a-train-0.tar" in read
    assert {"b-train-0.tar", "y.png"}.isdisjoint(read)


@pytest.mark.parametrize(
    ("files", "listed", "expected", "classes"),
    [
        (
            ["train/auk/0", "train/bat/1", "test/auk/2", "test/bat/3"],
            [("train", "test/**")],
            {"train": [2, 3]},
            "auk bat",
        ),
        (
            ["train/auk/0", "train/bat/1", "test/auk/2"],
            [("train", "train/**")],
            {"train": [0, 1]},
            "auk bat",
        ),
        (
            ["a/auk/young/0", "a/bat/1", "b/auk/2", "a/cover"],
            [("train", ["a/**", "b"])],
            {"train": [0, 1, 2]},
            "auk bat",
        ),
        (
            ["data/auk/0", "data/bat/1", "data/bat/2", "data/crow/3"],
            [("train", ["data/auk/*", "data/bat/1.png"]), ("val", "data/bat/2.*")],
            {"train": [0, 1], "validation": [2]},
            "auk bat",
        ),
        (
            ["train/auk/0", "train/bat/1", "test/2"],
            [("train", "train/**"), ("test", "test/**")],
            {"train": [0, 1]},
            "auk bat",
        ),
    ],
)
def test_images_are_those_of_the_splits_of_a_card(tmp_path, files, listed, expected, classes):
    images = {f"{path}.png": int(path[-1]) if path[-1].isdigit() else 9 for path in files}
    name = write_folder(tmp_path, images, {"default": listed})
    assert contents(name) == expected
    assert find_dataset(name, data_dir=None).info.class_names == tuple(classes.split())


def test_metadata_of_the_images_of_a_card(tmp_path):
    rows = b"file_name,text,split\n0.png,zero,x\n1.png,one,y\nc/2.png,two,z\n"
    files = {"train/0.png": 0, "train/1.png": 1, "train/c/2.png": 2, "train/metadata.csv": rows}
    listed = {"default": [("train", "train/0.png"), ("test", "train/c/**")]}
    name = write_folder(tmp_path, files, listed)
    assert contents(name) == {"train": [0], "test": [2]}
    source = open_source(name, "test", data_dir=None, key="data.split")
    assert source.captions(0) == ("two",)
    assert find_dataset(name, data_dir=None).info.num_classes == 0


@pytest.mark.parametrize(
    ("files", "listed", "reason"),
    [
        (["0", "1"], [("train", "*.png")], "0.png is in no folder; expected patterns such as"),
        (
            ["train/auk/0", "test/auk/1"],
            [("train", "**")],
            r"\*\* has the folders test/auk and train/auk; expected",
        ),
        (
            ["x/auk/old/0", "x/bat/1"],
            [("train", ["x/auk/**", "x/bat/**"])],
            "folders x/bat and x/auk/old are not of one depth",
        ),
        (["data/train_a/0", "data/train_b/1"], [("train", "data/**")], "train_a, train_b of train"),
        (["x/0", "y/1"], [("train", "x/*"), ("test", "y/*")], "folders x, y are those of the spl"),
    ],
)
def test_folders_that_may_be_no_classes_are_refused(tmp_path, files, listed, reason):
    images = {f"{path}.png": int(path[-1]) for path in files}
    name = write_folder(tmp_path, images, {"default": listed})
    with pytest.raises(UserError, match=f"the classes of its images are not known: .*{reason}"):
        hub_dataset(name[3:])


def test_a_subset_in_a_folder_that_is_called_as_a_split_is(tmp_path):
    images = {f"train/{part}/{kind}/{n}.png": n for part in "ab" for n, kind in enumerate("xy")}
    card = "---\nconfigs: [{config_name: a, data_dir: train/a}, {config_name: b}]\n---\n"
    write_folder(tmp_path, images, {})
    (tmp_path / "README.md").write_text(card)
    dataset = hub_dataset(f"{tmp_path}#subset=a")
    assert len(dataset.labels) == 2
    assert dataset.info.class_names == ("x", "y")


def test_class_names_of_a_card_are_the_texts_that_are_written():
    label = "{name: label, dtype: {class_label: {names: %s}}}"
    for names in ("{0: no, 1: yes, 2: 010, 3: ~}", "[no, yes, 010, ~]"):
        card = f"---\ndataset_info:\n  features: [{label % names}]\n---\n"
        layout = find_layout(["a.parquet"], card, subset=None, key="data.name")
        assert layout.features["label"].names == ["no", "yes", "010", "~"]


# Columns


def test_columns_are_found_by_their_features(tmp_path, caplog):
    def write(**more):
        species = ([0, 1], {"names": ["auk", "bat"], "_type": "ClassLabel"})
        file = parquet([1, 2], image="img", species=species, **more)
        (tmp_path / "train.parquet").write_bytes(file)
        forget_all()
        return f"hf:{tmp_path}"

    name = write()
    assert find_dataset(name, data_dir=None).info.class_names == ("auk", "bat")
    assert greys(name, "train") == [1, 2]
    family = ([0, 0], {"names": ["z"], "_type": "ClassLabel"})
    name = write(family=family)
    assert refusal(name) == (
        f"data.name='{name}' has several columns that may hold the label: species, family; "
        f"expected one of them by name, as in {name}#label=species"
    )
    assert find_dataset(f"{name}#label=family", data_dir=None).info.class_names == ("z",)
    thumb = ([{"bytes": b"", "path": ""}] * 2, {"_type": "Image"})
    assert "may hold the image: img, thumb" in refusal(write(thumb=thumb))
    caplog.set_level("INFO", "vit_jax")
    name = write(label=family)
    assert find_dataset(name, data_dir=None).info.class_names == ("z",)
    assert "the label is the column label; columns that are not read: species" in caplog.text
    table = pa.table({"text": ["a"], "label": [0]})
    pq.write_table(table, tmp_path / "train.parquet")
    forget_all()
    assert "train.parquet has the columns text, label; expected image for the image" in refusal(
        f"hf:{tmp_path}"
    )


def test_lists_of_labels(tmp_path):
    feature = {"feature": {"names": list("abc"), "_type": "ClassLabel"}, "_type": "List"}
    more = {"tags": ([[0, 2], [], [1]], feature)}
    (tmp_path / "train.parquet").write_bytes(parquet([1, 2, 3], **more))
    dataset = find_dataset(f"hf:{tmp_path}", data_dir=None)
    assert (dataset.info.multi_label, dataset.info.class_names) == (True, ("a", "b", "c"))
    rows = dataset.open("train", key="k")
    assert [rows[i]["label"].tolist() for i in range(3)] == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


# Folders of save_to_disk


def save(folder, tables, split=None):
    """Writes a folder as `Dataset.save_to_disk` does."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"data-{n:05}-of-{len(tables):05}.arrow" for n in range(len(tables))]
    for file, table in zip(files, tables, strict=True):
        with pa.ipc.new_stream(str(folder / file), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": file} for file in files], "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    features = {"label": {"names": ["auk", "bat"], "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


@pytest.fixture
def saved(tmp_path):
    """A folder as `DatasetDict.save_to_disk` writes it."""
    save(tmp_path / "train", [make_table(range(5), [0] * 5), make_table([5, 6], [1, 1])])
    save(tmp_path / "test", [make_table([9], [0])])
    (tmp_path / "train" / "cache-1234.arrow").write_bytes(b"of another program")
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return tmp_path


def test_a_folder_of_save_to_disk(saved):
    name = f"hf:{saved}"
    assert find_dataset(name, data_dir=None).lengths == {"test": 1, "train": 7}
    assert greys(name, "train") == list(range(7))
    rows = open_source(name, "train", data_dir=None, key="k")
    assert [int(rows[i]["label"]) for i in (0, 6)] == [0, 1]
    assert rows.describe(6).endswith("train/data-00001-of-00002.arrow[1]")
    single = f"hf:{saved / 'test'}"
    assert find_dataset(single, data_dir=None).lengths == {"train": 1}
    state = json.loads((saved / "test" / "state.json").read_text())
    (saved / "test" / "state.json").write_text(json.dumps(state | {"_split": "test"}))
    forget_all()
    assert greys(single, "test") == [9]
    with pytest.raises(UserError, match="there is no such split"):
        open_source(name, "validation", data_dir=None, key="data.split")


@pytest.mark.parametrize("kind", ["saved", "hub"])
def test_what_the_library_wrote_is_read_in_its_order(kind):
    folder = Path(__file__).parents[2] / "testdata" / "datasets"
    for split, expected in json.loads((folder / "order.json").read_text())[kind].items():
        name = f"hf:{folder / kind}"
        rows = open_source(name, split, data_dir=None, key="k")
        read = [(int(rows[i]["label"]), *rows.captions(i)) for i in range(len(rows))]
        assert read == [(label, text) for _, label, text in expected]
        assert greys(name, split) == [grey for grey, *_ in expected]
        assert find_dataset(name, data_dir=None).info.class_names == ("auk", "bat", "crow")


def test_arrow_files_with_an_index(tmp_path):
    table = make_table([1, 2, 3], [0, 1, 0])
    with pa.ipc.new_file(str(tmp_path / "birds-train.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert greys(f"hf:{tmp_path}", "train") == [1, 2, 3]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, "end"])
def test_an_arrow_file_that_was_cut_is_refused(saved, share):
    path = saved / "train" / "data-00000-of-00002.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:-8] if share == "end" else content[: int(len(content) * share)])
    text = refusal(f"hf:{saved}")
    assert "can't be read: " in text
    assert "data-00000-of-00002.arrow: it was cut" in text


def test_what_is_wrong_with_a_saved_folder(saved, tmp_path):
    name = f"hf:{saved}"
    state = saved / "train" / "state.json"
    good = json.loads(state.read_text())
    for content, words in [
        ("{", "state.json can't be read"),
        (json.dumps({}), "state.json lists no files"),
        (json.dumps({"_data_files": 3}), "state.json lists no files"),
        (json.dumps({"_data_files": [{"filename": "../../x.arrow"}]}), "lists no files"),
        (json.dumps(good | {"_indices_data_files": [{"filename": "i"}]}), "flatten_indices()"),
        (json.dumps({"_data_files": [{"filename": "none.arrow"}]}), "No such file"),
    ]:
        state.write_text(content)
        assert words in refusal(name)
        forget_all()
    state.unlink()
    assert "state.json can't be read" in refusal(name)
    assert "there is no folder" in refusal(f"hf:{tmp_path}/none")
    assert "has no subsets" in refusal(f"{name}#subset=x")


def test_a_damaged_file_and_files_of_another_kind_are_named(hub, caplog):
    files = {"train.parquet": parquet([1], [0]), "auk/1.png": b"", "README.txt": b""}
    hub.push("me/birds", files)
    caplog.set_level("INFO")
    assert greys("hf:me/birds", "train") == [1]
    assert "left out files of another kind: auk/1.png" in caplog.text
    for name, content in [("test.parquet", b"PAR1xxPAR1"), ("test.arrow", b"ARROW1")]:
        hub.push("me/birds", files | {name: content})
        forget_all()
        assert f"/{name}: " in refusal("hf:me/birds")
