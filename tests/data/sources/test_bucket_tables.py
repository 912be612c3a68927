# SPDX-License-Identifier: Apache-2.0
"""Parquet files in buckets."""

import itertools

import pyarrow as pa
import pytest

from tests.buckets import server
from tests.hub_server import parquet
from tests.images import encode
from vit_jax.data.pipeline import DatasetSpec, eval_batches, train_batches
from vit_jax.data.sources import find_dataset, ranges, tables
from vit_jax.data.sources.parquet import parquet_dataset
from vit_jax.utils import buckets
from vit_jax.utils.errors import UserError

__all__ = ["server"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Retries without their waits, and no dataset of an earlier test."""
    monkeypatch.setattr(
        buckets, "RETRIES", {"max_retries": 3, "initial_delay": "1ms", "max_delay": "2ms"}
    )
    monkeypatch.setattr(ranges, "_WAITS", (0.01,))
    yield
    parquet_dataset.cache_clear()


@pytest.fixture
def files(server):
    """The path in the bucket of files to train and to evaluate on, in groups of three rows."""
    found = {
        "train-0.parquet": parquet(range(20), [0, 1] * 10),
        "train-1.parquet": parquet(range(20, 31), [1] * 11),
        "val-0.parquet": parquet(range(40, 45), [0] * 5),
    }
    for name, content in found.items():
        server.put(server.bucket, f"d/{name}", content)
    return f"{server.bucket}/d"


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_files_of_a_bucket_train_as_local_ones(server, files, scheme, tmp_path):
    for name in ("train-0.parquet", "train-1.parquet"):
        (tmp_path / name).write_bytes(server.objects[server.bucket][f"d/{name}"])

    def batches(name):
        spec = DatasetSpec(name, "train", "decode|resize(8)", 8, None, "data", num_threads=2)
        loader = train_batches(spec, seed=5, step=3)
        found = [(b["image"].tolist(), b["label"].tolist()) for b in itertools.islice(loader, 4)]
        loader.close()
        return found

    remote = f"parquet:{scheme}://{files}"
    assert batches(f"{remote}/train-*.parquet") == batches(f"parquet:{tmp_path}")
    assert find_dataset(remote, data_dir=None).info.class_names == ("auk", "bat")
    assert find_dataset(remote, data_dir=None).lengths == {"train": 31, "validation": 5}
    one = parquet_dataset(f"{scheme}://{files}/val-0.parquet#image=image")
    assert one.records.read(1) == encode(41)
    assert one.records.describe(1) == f"{scheme}://{files}/val-0.parquet[1]"


def test_row_groups_are_asked_for_ahead_and_once(server, files):
    records = parquet_dataset(f"gs://{files}/train-0.parquet").records
    assert records.reads_ahead
    server.requests.clear()
    records.ahead([7, 0, 1, 8], captions=False)
    records.ahead([2, 6], captions=False)
    assert [records.read(row) for row in (0, 1, 2, 6, 7, 8)] == [
        encode(row) for row in (0, 1, 2, 6, 7, 8)
    ]
    assert len(server.requests) == 2
    assert records.read(19) == encode(19)
    assert len(server.requests) == 3


def test_labels_are_asked_for_once(server, files):
    dataset = parquet_dataset(f"gs://{files}/train-0.parquet")
    assert dataset.lengths == {"train": 20}
    # Two for the description of a small file, and the labels of seven groups: none is in vain.
    assert len([path for _, path in server.requests if "train-0" in path]) == 9


def test_a_long_description_is_read_in_a_second_request(server, files, monkeypatch):
    monkeypatch.setattr(tables, "_TAIL", 64)
    assert parquet_dataset(f"gs://{files}/val-0.parquet").lengths == {"validation": 5}


def test_requests_that_fail_are_tried_again(server, files):
    name = f"parquet:gs://{files}/val-*.parquet"
    failed = iter([(503, "busy")] * 3 + ["reset"] * 3)
    server.fail = lambda method, path: next(failed, None) if "alt=media" in path else None
    spec = DatasetSpec(name, "validation", "decode|resize(8)", 4, None, "data")
    found = [int(g) for b in eval_batches(spec) for g in b["image"][:, 0, 0, 0][b["mask"] > 0]]
    assert found == list(range(40, 45))


@pytest.mark.parametrize(
    ("path", "failure", "reason"),
    [
        ("d/none.parquet", None, "can't be read: "),
        ("e/*.parquet", None, "there are no files gs://{}/e/*.parquet"),
        ("d", (403, "no"), ""),
        ("d/val-0.parquet", (403, "no"), "the credentials are missing or do not permit it"),
        ("d/cut.parquet", None, "cut.parquet: it does not end as a Parquet file does"),
        ("d/empty.parquet", None, "empty.parquet: it does not end as a Parquet file does"),
    ],
)
def test_what_is_missing_in_a_bucket_is_one_line(server, files, path, failure, reason):
    server.put(server.bucket, "d/cut.parquet", parquet([1], [0])[:-9])
    server.put(server.bucket, "d/empty.parquet", b"")
    server.fail = lambda method, path: failure
    with pytest.raises(UserError) as error:
        parquet_dataset(f"gs://{server.bucket}/{path}")
    assert reason.replace("{}", server.bucket) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_url_without_a_bucket_is_named_as_it_is_given():
    with pytest.raises(UserError, match=r"^data.name='parquet:gs://': 'gs://': expected gs"):
        parquet_dataset("gs://")


def test_captions_and_groups_that_are_damaged(server):
    content = parquet([1, 2], text=(["a", "b"], {"_type": "Value"}))
    server.put(server.bucket, "train.parquet", content)
    dataset = parquet_dataset(f"gs://{server.bucket}/train.parquet")
    assert dataset.open("train", key="k").captions(1) == ("b",)
    place = content.index(encode(2)) - 60
    server.put(server.bucket, "train.parquet", content[:4] + bytes(place) + content[place + 4 :])
    other = parquet_dataset.__wrapped__(f"gs://{server.bucket}/train.parquet")
    allocated = pa.total_allocated_bytes()
    with pytest.raises(Exception, match="its row group can't be read"):
        other.records.read(0)
    assert pa.total_allocated_bytes() - allocated < 10**7
