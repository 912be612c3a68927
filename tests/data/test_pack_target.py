# SPDX-License-Identifier: Apache-2.0
"""A pack in a bucket has what a folder would have, and is read only once it is complete."""

import json
import os

import pytest

from tests.buckets import server
from tests.data.test_pack_parts import (
    FLAGS,
    KINDS,
    RAW,
    assert_same_records,
    contents,
    photos,
    whole,
)
from vit_jax.data import pack
from vit_jax.data.pack import main
from vit_jax.data.sources import find_dataset, packed, ranges
from vit_jax.utils.errors import UserError

__all__ = ["photos", "server", "whole"]


@pytest.fixture
def run(photos, server, said, tmp_path, monkeypatch):
    """Runs the command with a DST in the bucket."""
    monkeypatch.setattr(ranges, "_PATIENCE_S", 0.0)

    def run(*arguments, scheme="gs", source=photos):
        packed._dataset.cache_clear()
        return main([f"folder:{source}", f"{scheme}://{server.bucket}/d", *arguments])

    return run


@pytest.fixture
def there(server):
    """The objects by name."""
    return lambda: {
        name.removeprefix("d/"): content for name, content in server.objects[server.bucket].items()
    }


def refuse(run, *arguments, words, **others):
    with pytest.raises(UserError) as error:
        run(*arguments, **others)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def find(server, flags=FLAGS, scheme="gs"):
    packed._dataset.cache_clear()
    kind = "raw" if flags is RAW else "packed"
    return find_dataset(f"{kind}:{scheme}://{server.bucket}/d", data_dir=None)


def written(server, start=0):
    return [name.removeprefix("d/") for name, content in server.history[start:] if content]


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_gets_the_files_of_a_folder_and_the_manifest_last(
    scheme, run, there, whole, server, said, tmp_path
):
    assert run(*FLAGS, scheme=scheme) == 0
    assert there() == contents(whole[str(FLAGS)])
    order = written(server)
    assert order[0] == "part-00000-of-00001.json"
    assert order[-1] == "pack.json"
    for name in order:
        if name.endswith(".npz"):  # Labels come after the images.
            assert order.index(name) == order.index(name.replace(".npz", ".array_record")) + 1
    url = f"{scheme}://{server.bucket}/d"
    assert said[-1] == f"  read it with    --config.data.name=packed:{url}"
    assert any(line.endswith(f" first, and sends them to {url}") for line in said)
    assert not os.listdir(tmp_path / "cache" / "vit_jax" / "packs")
    before = len(server.history)
    run(*FLAGS, scheme=scheme)  # All is there.
    assert len(server.history) == before


def test_pixels_in_a_bucket_are_a_file_for_each_shard(run, whole, server, there):
    run(*RAW)
    assert_same_records(f"raw:gs://{server.bucket}/d", f"raw:{whole[str(RAW)]}")
    names = [name for name in there() if name.endswith(".pixels")]
    assert len(names) == 6
    assert json.loads(there()["pack.json"])["parts"] == 6


@KINDS
def test_parts_are_joined_in_a_bucket(flags, run, server, whole, said):
    for number in (2, 0, 1):
        assert run(*flags, f"--part={number}/3") == 0
        with pytest.raises(UserError, match=r"pack\.json: there is no such object"):
            find(server, flags)
    run(*flags, "--join")
    kind = "raw" if flags is RAW else "packed"
    assert_same_records(f"{kind}:gs://{server.bucket}/d", f"{kind}:{whole[str(flags)]}")
    assert not [name for name in server.objects[server.bucket] if "/part-" in name]
    before = len(server.history)
    run(*flags, "--join")
    run(*flags, "--part=1/3")
    assert said[-1] == f"part 1/3 is complete, and DST='gs://{server.bucket}/d' has been joined"
    assert len(server.history) == before


@KINDS
def test_a_kill_at_any_write_costs_at_most_the_shard_in_work(flags, run, server, there):
    run(*flags)
    complete, history = there(), list(server.history)
    count = next(i for i, (name, _) in enumerate(history) if name == "d/pack.json")
    for writes in (1, 2, 3, count, count + 1):
        server.history[:] = history
        server.rewind(writes)
        if writes <= count:
            with pytest.raises(UserError, match="there is no such object"):
                find(server, flags)
        kept = set(there())
        before = len(server.history)
        run(*flags)
        assert there() == complete
        # Images whose labels were not sent are sent again.
        again = kept.intersection(written(server, before)) - {"part-00000-of-00001.json"}
        assert len(again) == (writes == 2)
        assert not [name for name in again if name.endswith(("npz", "json"))]


def test_incomplete_parts_and_other_packs_are_refused(run, server, photos):
    refuse(run, *FLAGS, "--join", words=["has no parts: run --part=0/N"])
    run(*FLAGS, "--part=1/3")
    words = [f"DST='gs://{server.bucket}/d': 2 of 3 parts are not complete: 0, 2; run"]
    refuse(run, *FLAGS, "--join", words=words)
    refuse(run, *FLAGS, words=["has parts of a pack, such as 1/3", "--join"])
    refuse(run, "--short_side=20", "--part=0/3", words=["not of one pack: short_side='16' there"])
    refuse(run, *FLAGS, "--part=0/2", words=["has part 1/3 of another job"])
    for number in (0, 2):
        run(*FLAGS, f"--part={number}/3")
    run(*FLAGS, "--join")
    refuse(run, "--short_side=20", words=["holds another pack: short_side='16' there, and '20'"])


@KINDS
def test_objects_that_are_missing_or_damaged_are_found_before_the_pack_is_made(
    flags, run, server, there
):
    run(*flags, "--part=0/1")
    name = next(n for n in there() if n.startswith("train") and not n.endswith(".npz"))
    content = there()[name]
    for damaged in (None, content[:40], b""):
        server.put(server.bucket, f"d/{name}", damaged)
        words = [name, "delete the files of that shard, and run its part again"]
        refuse(run, *flags, "--join", words=words)
        assert "pack.json" not in there()
    server.put(server.bucket, f"d/{name}", None)
    run(*flags, "--part=0/1")
    assert there()[name] == content
    run(*flags, "--join")


def test_an_object_that_is_not_as_it_was_sent_is_not_followed_by_its_labels(
    run, server, said, monkeypatch, there
):
    put = server.put

    def put_half(bucket, name, content):
        half = content and name.endswith(".array_record")
        return put(bucket, name, content[:100] if half else content)

    monkeypatch.setattr(server, "put", put_half)
    printed = []
    monkeypatch.setattr(pack, "print_error", printed.append)
    assert run(*FLAGS) == 1  # A job tries again.
    assert "array_record is 100 bytes with CRC-32" in str(printed[0])
    assert "were sent" in str(printed[0])
    assert not [name for name in there() if name.endswith(".npz")]
    monkeypatch.undo()


@pytest.mark.parametrize("refused", ["GET", "POST", "a listing"])
def test_what_the_credentials_do_not_permit_is_one_line_before_the_work(
    refused, run, server, photos, monkeypatch
):
    monkeypatch.setattr(pack, "_prepare", None)  # No image is prepared.
    listing = f"/b/{server.bucket}/o?"

    def fail(method, path):
        if method == refused or (refused == "a listing" and method == "GET" and listing in path):
            return 403, json.dumps({"error": {"code": 403, "message": "a-secret-token"}})
        return None

    server.fail = fail
    text = refuse(run, *FLAGS, words=["DST: gs://", "credentials", "permit"])
    assert "a-secret-token" not in text


def test_a_bucket_that_is_missing_or_a_temporary_folder_that_is_none_is_one_line(
    run, server, photos, tmp_path
):
    with pytest.raises(UserError, match=r"DST: .*the bucket does not exist"):
        main([f"folder:{photos}", "s3://nobody/d"])
    (tmp_path / "file").touch()
    words = [f"{tmp_path}/file can't be written", "--temporary"]
    refuse(run, *FLAGS, f"--temporary={tmp_path}/file", words=words)
    run(*FLAGS, f"--temporary={tmp_path}/other")
    assert os.listdir(tmp_path / "other" / "packs") == []


def test_a_shard_that_no_object_holds_is_refused_at_the_start(run, server):
    words = ["--shard_size=4096: expected at most 1,365 with --raw=1024"]
    refuse(run, "--raw=1024", words=words)
    assert not server.history
