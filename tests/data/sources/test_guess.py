# SPDX-License-Identifier: Apache-2.0
"""A path in the place of a dataset's name."""

import pytest

from tests.images import write_folder
from vit_jax.data.sources import dataset_info
from vit_jax.utils.errors import UserError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with sources of each kind, in which the process works."""
    write_folder(tmp_path, {"birds/heron": 1, "birds/robin": 1, "cifar10/heron": 1})
    for path in ("table.csv", "table.JSONL", "shards/a.parquet", "birds.tar.gz", "notes", "x.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "pack.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("{place}/birds", "did you mean 'folder:{place}/birds'?"),
        ("./birds", "did you mean 'folder:./birds'?"),
        ("~/birds", "did you mean 'folder:~/birds'?"),
        ("birds", "is no TFDS dataset; did you mean 'folder:birds'?"),
        ("birds/", "did you mean 'folder:birds/'?"),
        ("file://{place}/birds", "did you mean 'folder:{place}/birds'?"),
        ("Folder:birds", "did you mean 'folder:birds'?"),
        ("folders:{place}/birds", "did you mean 'folder:{place}/birds'?"),
        ("dir:{place}/birds", "did you mean 'folder:{place}/birds'?"),
        ("table.csv", "did you mean 'manifest:table.csv'?"),
        ("csv:./table.csv", "did you mean 'manifest:./table.csv'?"),
        ("folder:table.JSONL", "did you mean 'manifest:table.JSONL'?"),
        ("manifest:birds", "did you mean 'folder:birds'?"),
        ("parquet:birds", "did you mean 'folder:birds'?"),
        ("./shards", "did you mean 'parquet:./shards'?"),
        ("folder:shards", "did you mean 'parquet:shards'?"),
        ("shards/a.parquet", "did you mean 'parquet:shards/a.parquet'?"),
        ("./fast", "did you mean 'packed:./fast'?"),
        ("folder:fast", "did you mean 'packed:fast'?"),
        ("birds.tar.gz", "an archive is not read as it is: unpack it"),
        ("folder:{place}/birds.tar.gz", "an archive is not read as it is: unpack it"),
        ("./x.png", "it is a file: expected folder:FOLDER"),
        ("/no/such/birds", "there is no such file or folder"),
        ("/no/such/birds", "written as 'folder:/no/such/birds'"),
        ("./saved", "did you mean 'hf:./saved'?"),
        ("folder:saved", "did you mean 'hf:./saved'?"),
        ("https://huggingface.co/datasets/me/birds/tree/main", "did you mean 'hf:me/birds'?"),
        ("hf://datasets/me/birds/data/a.parquet", "did you mean 'hf:me/birds'?"),
        ("hf:https://huggingface.co/datasets/me/birds", "did you mean 'hf:me/birds'?"),
        ("some-one/some-birds", "of the Hugging Face hub is written as 'hf:some-one/some-birds'"),
        ("hfds/some-one/some-birds", "hub is written as 'hf:some-one/some-birds'"),
        ("gs://bucket/a.parquet", "did you mean 'parquet:gs://bucket/a.parquet'?"),
        ("parquet:http://a.org/x.parquet", "http:// is not read: download the files, and give"),
        ("parquet:http://a.org/x.parquet", "here, or gs://BUCKET/PATH or s3://BUCKET/PATH"),
        ("tar:https://a.org/{{0..9}}.tar", "https:// is not read"),
        ("packed:ftp://a.org/x", "ftp:// is not read"),
        ("folder:https://a.org/birds.zip", "https:// is not read"),
        ("pairs:hdfs://a/birds", "hdfs:// is not read"),
        ("https://a.org/x.parquet", "https:// is not read"),
        ("parquet:file://{place}/shards", "did you mean 'parquet:{place}/shards'?"),
        ("tar:https://huggingface.co/datasets/me/birds/x.tar", "did you mean 'hf:me/birds'?"),
        ("gs://bucket/birds", "or images listed in a table: manifest:TABLE.csv"),
    ],
)
def test_a_path_alone_is_answered_with_the_name_that_is_meant(name, hint, place):
    name, hint = (text.format(place=place) for text in (name, hint))
    with pytest.raises(UserError) as error:
        dataset_info(name, data_dir=str(place / "tfds"))
    assert str(error.value).startswith("data.name=")
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_of_the_name_of_a_dataset_of_tfds_is_not_meant(place):
    assert dataset_info("cifar10", data_dir=str(place / "tfds")).num_classes == 10
