# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server of both storage protocols: the JSON API of Google Cloud Storage, and S3.

Emulators of Google's that can be installed ignore conditional writes, which the lock of a workdir
needs. This one has them, and pages of listings; objects are in memory, and signatures are not
checked. `fail` makes requests fail as real ones do.

  PORT=8990 python -m tools.bucket_server
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 50  # names of one page of a listing


class BucketServer:
    """Serves buckets at `url`.

    Attributes:
      bucket: the name of the one that `rewind` is about.
      objects: contents by bucket and name.
      requests: the method and path of each request.
      history: the names and contents of all writes since it was last cleared; None for removals.
      fail: called with the method and path of a request; returns None to answer it, a status and
        body to fail it, or "reset" to close the connection.
      delay: seconds before each answer.
    """

    def __init__(self, *buckets: str, port: int = 0) -> None:
        self.objects: dict[str, dict[str, bytes]] = {bucket: {} for bucket in buckets}
        self.generations: dict[tuple[str, str], int] = {}
        self.requests: list[tuple[str, str]] = []
        self.history: list[tuple[str, bytes | None]] = []
        self.fail: Callable[[str, str], tuple[int, str] | str | None] = lambda method, path: None
        self.delay = 0.0
        self.bucket = ""
        self.lock = threading.Lock()
        self._count = 0
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = _Server(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()

    def variables(self) -> dict[str, str]:
        """The environment in which clients of both stores use this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "a-secret-token",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "a-key-id",
            "AWS_SECRET_ACCESS_KEY": "a-secret-access-key",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def put(self, bucket: str, name: str, content: bytes | None) -> int:
        """Writes or removes an object, and returns its generation."""
        self._count += 1
        self.history.append((name, content))
        if content is None:
            self.objects[bucket].pop(name, None)
            self.generations.pop((bucket, name), None)
        else:
            self.objects[bucket][name] = content
            self.generations[bucket, name] = self._count
        return self._count

    def rewind(self, writes: int) -> None:
        """Brings the present bucket to its state after so many writes of `history`."""
        history = self.history[:writes]
        self.history.clear()
        self.objects[self.bucket].clear()
        for name, content in history:
            self.put(self.bucket, name, content)

    def list(self, bucket: str, query: Mapping[str, str]) -> tuple[list[str], str | None]:
        """The names of one page, and the token of the next."""
        after = query.get("pageToken") or query.get("continuation-token") or ""
        start = query.get("startOffset", "")
        end = query.get("endOffset", "\U0010ffff")
        names = [
            name
            for name in sorted(self.objects[bucket])
            if name.startswith(query.get("prefix", "")) and name > after and start <= name < end
        ]
        return names[:PAGE], names[PAGE - 1] if len(names) > PAGE else None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass  # A client was killed.


class _Handler(BaseHTTPRequestHandler):
    store: BucketServer
    protocol_version = "HTTP/1.1"
    # Else the body of an answer waits 40 ms for the client to confirm the headers.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.store.requests.append((self.command, self.path))
        if self.store.delay:
            time.sleep(self.store.delay)
        failure = self.store.fail(self.command, unquote(self.path))
        if failure == "reset":
            self.close_connection = True
            self.connection.close()
            return
        if isinstance(failure, tuple):
            self._answer(failure[0], failure[1].encode())
            return
        with self.store.lock:
            if url.path.startswith(("/storage/v1/", "/upload/storage/v1/")):
                self._serve_gcs(url.path, query, body)
            else:
                self._serve_s3(unquote(url.path), query, body)

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def _serve_gcs(self, path: str, query: dict[str, str], body: bytes) -> None:
        upload = path.startswith("/upload")
        bucket, _, name = (
            path.removeprefix("/upload").removeprefix("/storage/v1/b/").partition("/o")
        )
        name = query.get("name", "") if upload else unquote(name.removeprefix("/"))
        store, objects = self.store, self.store.objects.get(bucket)
        if objects is None:
            return self._answer(404, b'{"error": {"message": "The bucket does not exist."}}')
        generation = store.generations.get((bucket, name), 0)
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != generation:
            return self._answer(412, b'{"error": {"message": "precondition"}}')
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if upload:
            now = store.put(bucket, name, body)
            return self._answer(200, json.dumps({"name": name, "generation": str(now)}).encode())
        if not name:
            names, token = store.list(bucket, query)
            listed = {"items": [{"name": n} for n in names]}
            more = {"nextPageToken": token} if token else {}
            return self._answer(200, json.dumps(listed | more).encode())
        if name not in objects:
            return self._answer(404, b"{}")
        if self.command == "DELETE":
            store.put(bucket, name, None)
            return self._answer(204)
        return self._send(objects[name], x_goog_generation=str(generation))

    def _send(self, content: bytes, **headers: str) -> None:
        if (span := self.headers.get("Range", "")).startswith("bytes="):
            first, _, last = span.removeprefix("bytes=").partition("-")
            begin = int(first) if first else max(len(content) - int(last), 0)
            end = min(int(last or len(content) - 1) if first else len(content), len(content) - 1)
            if begin > end:
                return self._answer(416, Content_Range=f"bytes */{len(content)}")
            headers["Content_Range"] = f"bytes {begin}-{end}/{len(content)}"
            return self._answer(206, content[begin : end + 1], **headers)
        return self._answer(200, content, **headers)

    def _serve_s3(self, path: str, query: dict[str, str], body: bytes) -> None:
        bucket, _, name = path.removeprefix("/").partition("/")
        store, objects = self.store, self.store.objects.get(bucket)
        if objects is None:
            return self._fail_s3(404, "NoSuchBucket", "The specified bucket does not exist")
        if not name:
            names, token = store.list(bucket, query)
            rows = "".join(f"<Contents><Key>{escape(n)}</Key></Contents>" for n in names)
            more = f"<NextContinuationToken>{escape(token or '')}</NextContinuationToken>"
            text = (
                f"<ListBucketResult><KeyCount>{len(names)}</KeyCount>"
                f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated>{more}{rows}"
                "</ListBucketResult>"
            )
            return self._answer(200, text.encode())
        content = objects.get(name)
        tag = content and f'"{hashlib.md5(content).hexdigest()}"'
        tag = f'"{hashlib.md5(b"").hexdigest()}"' if content == b"" else tag
        if content is None and (self.command in ("GET", "HEAD") or self.headers.get("If-Match")):
            return self._fail_s3(404, "NoSuchKey", "The specified key does not exist.")
        if (wanted := self.headers.get("If-Match")) and wanted != tag:
            return self._fail_s3(412, "PreconditionFailed", "condition")
        if (other := self.headers.get("If-None-Match")) and tag and other in ("*", tag):
            if self.command in ("GET", "HEAD"):
                return self._answer(304)
            return self._fail_s3(412, "PreconditionFailed", "condition")
        if self.command == "PUT":
            store.put(bucket, name, body)
            return self._answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        if self.command == "DELETE":
            store.put(bucket, name, None)
            return self._answer(204)
        return self._send(content or b"", ETag=tag or "")

    def _fail_s3(self, status: int, code: str, message: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self._answer(status, text.encode())


def main() -> None:
    """Serves a bucket until the process is ended, for commands by hand."""
    server = BucketServer("bucket", port=int(os.environ.get("PORT", "0")))
    print("\n".join(f"export {k}={v}" for k, v in server.variables().items()), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
