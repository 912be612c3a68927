# SPDX-License-Identifier: Apache-2.0
"""Objects in buckets, by both protocols over HTTP."""

import re

import pytest

from tests.buckets import server
from tools.bucket_server import PAGE, BucketServer
from vit_jax.utils import buckets
from vit_jax.utils.buckets import Bucket, is_url, split_url
from vit_jax.utils.errors import UserError

__all__ = ["server"]

SCHEMES = pytest.mark.parametrize("scheme", ["gs", "s3"])


@pytest.fixture
def bucket(request: pytest.FixtureRequest, server: BucketServer, monkeypatch) -> Bucket:
    quick = {"max_retries": 3, "initial_delay": "1ms", "max_delay": "2ms"}
    monkeypatch.setattr(buckets, "RETRIES", quick)
    return Bucket(f"{request.node.callspec.params['scheme']}://{server.bucket}/run")


@SCHEMES
def test_what_is_written_is_read_and_listed_below_the_path(server, bucket, scheme):
    assert bucket.list() == []
    assert bucket.read("a")[0] is None
    for name in ("a", "b/1", "b/2", "bc", "c"):
        bucket.write(name, name.encode())
    server.put(server.bucket, "run2/x", b"of another workdir")
    assert bucket.list() == ["a", "b/1", "b/2", "bc", "c"]
    assert bucket.list("b/") == ["b/1", "b/2"]
    assert bucket.read("b/1")[0] == b"b/1"
    assert server.objects[server.bucket]["run/b/1"] == b"b/1"
    bucket.delete(["b/1", "b/2", "never written"])
    assert bucket.list("b") == ["bc"]


@SCHEMES
def test_a_listing_has_all_pages(server, bucket, scheme):
    names = [f"n{i:03}" for i in range(2 * PAGE + 5)]
    for name in names:
        server.put(server.bucket, f"run/{name}", b"")
    assert bucket.list() == names


@SCHEMES
def test_only_one_of_two_conditional_writes_succeeds(bucket, scheme):
    _, none = bucket.read("lock")
    first = bucket.write("lock", b"1", if_generation=none)
    assert first is not None
    assert bucket.write("lock", b"2", if_generation=none) is None
    assert bucket.read("lock") == (b"1", first)
    second = bucket.write("lock", b"3", if_generation=first)
    assert bucket.write("lock", None, if_generation=first) is None
    assert bucket.write("lock", None, if_generation=second) is not None
    assert bucket.list() == []


@SCHEMES
def test_all_objects_that_are_there_are_downloaded_beside_one_that_is_not(bucket, scheme, tmp_path):
    names = [f"{i:02}" for i in range(4 * buckets._THREADS)]
    for name in names:
        bucket.write(name, name.encode())
    wanted = [("missing", tmp_path / "missing", 0)]
    wanted += [(name, tmp_path / name, 0) for name in names[:-1]]
    wanted += [(names[-1], tmp_path / names[-1], buckets._LARGE)]
    with pytest.raises(FileNotFoundError) as caught:
        bucket.download(wanted)
    assert caught.value.filename == f"{bucket.url}/missing"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {n: n for n in names}


@SCHEMES
def test_an_unchanged_object_is_not_read_again(bucket, scheme):
    bucket.write("a", b"1")
    content, known = bucket.read_if_new("a", None)
    assert content == b"1"
    assert bucket.read_if_new("a", known) == (None, known)
    bucket.write("a", b"2")
    assert bucket.read_if_new("a", known)[0] == b"2"


@SCHEMES
@pytest.mark.parametrize("failure", [(503, "slow down"), (429, "throttled"), (500, ""), "reset"])
def test_requests_that_fail_for_a_moment_are_sent_again(server, bucket, scheme, failure):
    bucket.write("a", b"1")
    left = [failure, failure]
    server.fail = lambda method, path: left.pop() if left and "/a" in path else None
    assert bucket.read("a")[0] == b"1"
    assert not left


@SCHEMES
@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ((503, "slow down"), "503|retry attempts failed"),
        ("reset", "retry attempts failed"),
        ((403, '{"error": "a-secret-token a-secret-access-key"}'), "do not permit"),
        ((401, '{"error": "a-secret-token a-secret-access-key"}'), "credentials are missing"),
    ],
)
def test_what_keeps_failing_is_one_line_without_credentials(
    server,
    bucket,
    scheme,
    failure,
    expected,
    capfd,
):
    bucket.write("b", b"")
    server.fail = lambda method, path: failure
    calls = [
        lambda: bucket.read("a"),
        lambda: bucket.write("a", b""),
        lambda: bucket.delete(["a"]),
        lambda: bucket.list(),
    ]
    # TensorStore takes an answer that refuses a listing of Google's for an empty one.
    silent = scheme == "gs" and failure[0] in (401, 403)
    for call in calls[: len(calls) - silent]:
        with pytest.raises(OSError, match=expected) as error:
            call()
        text = error.value.strerror or ""
        assert bucket.url in text
        assert "\n" not in text
        assert len(text) < 600
        printed = text + "".join(capfd.readouterr())
        assert not re.search("a-secret|a-key-id", printed)


@SCHEMES
def test_a_bucket_that_does_not_exist_is_named(server, scheme):
    with pytest.raises(OSError, match="the bucket does not exist"):
        Bucket(f"{scheme}://no-such-bucket/run").write("a", b"")


@pytest.mark.parametrize(
    "url", ["gs://bucket", "gs://", "s3://bucket/", "gs://b/x/../y", "gs://b/x//y", "s3://B_/x"]
)
def test_other_urls_are_refused(url):
    with pytest.raises(UserError, match="expected gs://BUCKET/PATH or s3://BUCKET/PATH"):
        split_url(url)


def test_urls_are_told_from_paths():
    assert all(map(is_url, ("gs://b/x", "s3://b/x", "az://b/x", "gs:/b/x", "HTTP://x")))
    assert not any(map(is_url, ("runs/a", "/gs/b", "a:b", "gs", "./gs:/x", "runs/gs://x")))


def test_a_key_file_that_does_not_exist_is_named(server, monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    with pytest.raises(OSError, match=r"key\.json: there is no such file"):
        Bucket(f"gs://{server.bucket}/other").list()
