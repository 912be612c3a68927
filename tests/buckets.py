# SPDX-License-Identifier: Apache-2.0
"""A server of buckets for tests."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.bucket_server import BucketServer


@functools.cache
def _serve() -> BucketServer:
    # One for the whole process, since clients remember addresses.
    return BucketServer()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[BucketServer]:
    """The server, with an empty `bucket`, in the environment of a test."""
    server = _serve()
    server.bucket = f"bucket-{len(server.objects)}"
    server.objects[server.bucket] = {}
    server.requests.clear()
    server.history.clear()
    for key, value in server.variables().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield server
    server.fail, server.delay = lambda method, path: None, 0.0
