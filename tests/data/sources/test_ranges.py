# SPDX-License-Identifier: Apache-2.0
"""Parts of files on disks and in buckets, and datasets that are read so."""

import io
import itertools
import tarfile

import numpy as np
import pytest

from tests.buckets import server
from tests.images import encode
from vit_jax.data.pipeline import DatasetSpec, eval_batches, train_batches
from vit_jax.data.sources import ranges
from vit_jax.data.sources.ranges import find_files, open_ranges
from vit_jax.data.sources.tar import tar_dataset
from vit_jax.utils import buckets
from vit_jax.utils.errors import UserError

__all__ = ["server"]

SCHEMES = pytest.mark.parametrize("scheme", ["gs", "s3"])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Retries without their waits, and no dataset of an earlier test."""
    monkeypatch.setattr(
        buckets, "RETRIES", {"max_retries": 3, "initial_delay": "1ms", "max_delay": "2ms"}
    )
    monkeypatch.setattr(ranges, "_WAITS", (0.01,))
    yield
    tar_dataset.cache_clear()


def shard(greys):
    """The bytes of a tar shard."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for grey in greys:
            for name, data in ((f"{grey:03}.png", encode(grey)), (f"{grey:03}.cls", b"%d" % grey)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def tars(server):
    """The path in the bucket of shards to train and to evaluate on."""
    server.put(server.bucket, "d/train-0.tar", shard(range(20)))
    server.put(server.bucket, "d/train-1.tar", shard(range(20, 31)))
    server.put(server.bucket, "d/val-0.tar", shard(range(40, 45)))
    server.put(server.bucket, "d/deep/train-9.tar", shard(range(50, 55)))
    return f"{server.bucket}/d"


@SCHEMES
def test_parts_of_objects(server, scheme, monkeypatch):
    monkeypatch.setattr(ranges, "_PART", 64)
    content = bytes(range(256)) * 3
    server.put(server.bucket, "x", content)
    found = open_ranges([f"{scheme}://{server.bucket}/x"])
    assert found.read(0, 100, 300) == content[100:300]
    assert found.read(0, 700, 900) == content[700:]
    assert found.read(0, 800, 900) == b""
    with found.open(0) as file:
        assert file.read(500) == content[:500]
        file.seek(10)
        assert file.read(20) == content[10:30]
        file.seek(700)
        assert file.read() == content[700:]
    before = found.stamp(0)
    assert found.stamp(0) == before
    server.put(server.bucket, "x", content[1:])
    assert found.stamp(0) != before


def test_what_is_read_ahead_is_asked_for_once(server):
    server.put(server.bucket, "x", bytes(range(100)))
    found = open_ranges([f"gs://{server.bucket}/x"])
    found.read(0, 0, 1)
    server.requests.clear()
    for _ in range(2):
        found.ahead(0, 10, 20)
    assert [found.read(0, 10, 20) for _ in range(2)] == [bytes(range(10, 20))] * 2
    assert len(server.requests) == 1
    found.read(0, 10, 20)
    assert len(server.requests) == 2


def test_what_is_read_ahead_is_bounded(server, monkeypatch):
    monkeypatch.setattr(ranges, "_AHEAD", 50)
    server.put(server.bucket, "x", bytes(200))
    found = open_ranges([f"gs://{server.bucket}/x"])
    for start in range(0, 200, 10):
        found.ahead(0, start, start + 10)
    assert len(found._started) == 5
    assert found.read(0, 0, 10) == bytes(10)


@SCHEMES
def test_files_of_a_bucket_by_pattern(server, tars, scheme):
    def names(pattern):
        found = find_files(f"{scheme}://{tars}{pattern}", ending=".tar")
        return [name.removeprefix(f"{scheme}://{tars}/") for name in found]

    assert names("/train-*.tar") == ["train-0.tar", "train-1.tar"]
    assert names("/**/train-?.tar") == ["deep/train-9.tar", "train-0.tar", "train-1.tar"]
    assert names("/[tv]*-0.tar") == ["train-0.tar", "val-0.tar"]
    assert len(names("")) == len(names("/")) == 4
    assert names("/x*.tar") == []
    assert names("/not-looked-for.tar") == ["not-looked-for.tar"]


@SCHEMES
def test_tar_shards_of_a_bucket_train_as_local_ones(server, tars, scheme, tmp_path):
    for name in ("train-0.tar", "train-1.tar"):
        (tmp_path / name).write_bytes(server.objects[server.bucket][f"d/{name}"])

    def batches(name):
        spec = DatasetSpec(name, "train", "decode|resize(8)", 8, None, "data", num_threads=2)
        loader = train_batches(spec, seed=5, step=3)
        found = [(b["image"].tolist(), b["label"].tolist()) for b in itertools.islice(loader, 4)]
        loader.close()
        return found

    remote = f"tar:{scheme}://{tars}/train-{{0..1}}.tar"
    assert batches(remote) == batches(f"tar:{tmp_path}")
    assert tar_dataset(remote[4:]).records.describe(21) == (
        f"{scheme}://{tars}/train-1.tar/021.png"
    )


def test_requests_that_fail_are_tried_again(server, tars):
    name = f"tar:gs://{tars}/val-*.tar"
    tar_dataset(name[4:])
    failed = iter([(503, "busy")] * 3 + ["reset"] * 3)
    server.fail = lambda method, path: next(failed, None) if "alt=media" in path else None
    spec = DatasetSpec(name, "validation", "decode|resize(8)", 4, None, "data")
    found = [b["image"][:, 0, 0, 0] * b["mask"].astype(np.uint8) for b in eval_batches(spec)]
    assert np.concatenate(found)[:5].tolist() == list(range(40, 45))


@pytest.mark.parametrize(
    ("path", "failure", "reason"),
    [
        ("d/none.tar", None, "d/none.tar can't be read: there is no such object"),
        ("e/*.tar", None, "there are no files gs://{}/e/*.tar"),
        ("d/val-0.tar", (403, "no"), "the credentials are missing or do not permit it"),
    ],
)
def test_what_is_missing_in_a_bucket_is_one_line(server, tars, path, failure, reason):
    server.fail = lambda method, path: failure
    with pytest.raises(UserError) as error:
        tar_dataset(f"gs://{server.bucket}/{path}")
    assert reason.replace("{}", server.bucket) in str(error.value)
    assert "\n" not in str(error.value)
