# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face hub for tests, on loopback, as far as datasets are read from it."""

import functools
import hashlib
import io
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.images import encode
from vit_jax.data.sources import hub as source


class HubServer:
    """Repositories of datasets by name: the files of each commit, and the commit of each branch."""

    def __init__(self):
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()  # without a token, files are not given
        self.requests: list[str] = []
        self.status: int | None = None  # of all answers
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.requests.append(f"{self.command} {self.path}")
                self.answer(*server.answer(self.path))

            do_HEAD = do_GET

            def answer(self, status, content, headers):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def log_message(self, format, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def push(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Makes a commit of these files the newest of a branch, and returns it."""
        files = {".gitattributes": b"", **files}
        content = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in files.items()})
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = dict(files)
        self.branches.setdefault(repository, {})[branch] = commit
        return commit

    def answer(self, url: str) -> tuple[int, bytes, dict[str, str]]:
        """The status, content and headers of an answer."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(url).path).strip("/")
        if self.status is not None:
            return self.status, b"", {}
        for repository, commits in self.commits.items():
            api, files = f"api/datasets/{repository}", f"datasets/{repository}/resolve/"
            if path == api or path.startswith(f"{api}/"):
                return self._describe(repository, path[len(api) :].strip("/"))
            if path.startswith(files):
                commit, _, name = path[len(files) :].partition("/")
                if repository in self.gated:
                    return _refuse(403, "GatedRepo")
                if name not in commits.get(commit, {}):
                    return _refuse(404, "EntryNotFound")
                content = commits[commit][name]
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                return 200, content, {"ETag": etag, "X-Repo-Commit": commit}
        return _refuse(401, "RepoNotFound")

    def _describe(self, repository: str, rest: str) -> tuple[int, bytes, dict[str, str]]:
        kind, _, revision = rest.partition("/")
        commit = self.branches[repository].get(revision or "main", revision)
        if commit not in self.commits[repository]:
            return _refuse(404, "RevisionNotFound")
        files = self.commits[repository][commit]
        if kind == "tree":
            value: object = [
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for path, content in files.items()
            ]
        else:
            siblings = [{"rfilename": path} for path in files]
            value = {"id": repository, "sha": commit, "siblings": siblings}
        return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _refuse(status: int, code: str) -> tuple[int, bytes, dict[str, str]]:
    return status, b"", {"X-Error-Code": code, "X-Error-Message": f"{code} of the stand-in"}


@functools.cache
def _serve() -> HubServer:
    return HubServer()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubServer:
    """The hub without repositories, as that of huggingface_hub, and an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = _serve()
    server.commits, server.branches, server.gated = {}, {}, set()
    server.status = None
    server.requests.clear()
    forget_all()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # for indices of shards
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    return server


def forget_all() -> None:
    """Forgets what this process knows of the hub."""
    source.hub_dataset.cache_clear()
    source._find_repository.cache_clear()


def make_table(greys, labels=None, *, image="image", name="label", **more):
    """A table as `datasets` makes it, with images of these greys."""
    images = [{"bytes": encode(grey), "path": None} for grey in greys]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {image: pa.array(images, kind)}
    features: dict[str, object] = {image: {"_type": "Image"}}
    if labels is not None:
        columns[name] = labels
        features[name] = {"names": ["auk", "bat"], "_type": "ClassLabel"}
    for column, (values, feature) in more.items():
        columns[column] = values
        features[column] = feature
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(meta)


def parquet(greys, labels=None, **options):
    """The bytes of a Parquet file."""
    file = io.BytesIO()
    pq.write_table(make_table(greys, labels, **options), file, row_group_size=3)
    return file.getvalue()


def push_birds(hub, **more):
    """A repository of three files, in the layout that `push_to_hub` makes."""
    files = {
        "data/train-00000-of-00002.parquet": parquet(range(5), [0, 1, 0, 1, 0]),
        "data/train-00001-of-00002.parquet": parquet(range(5, 9), [1] * 4),
        "data/test-00000-of-00001.parquet": parquet([20, 21], [0, 1]),
    }
    return hub.push("me/birds", files | more)
