# SPDX-License-Identifier: Apache-2.0
"""An HTTP server on loopback that serves files, well or badly as told."""

import contextlib
import dataclasses
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass
class FileServer:
    """What is served, how, and what was asked for."""

    address: str = ""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    ranges: bool = True  # whether Range requests are honoured
    cut_after: list[int] = dataclasses.field(default_factory=list)  # bytes, for coming requests
    content_type: str = "application/octet-stream"
    send_length: bool = True
    asked: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)  # path, Range
    hold: threading.Event | None = None  # bodies wait for it

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"


@contextlib.contextmanager
def serve() -> Iterator[FileServer]:
    """Serves until the end of the block, at `address`."""
    state = FileServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted))
            if self.path.strip("/") not in state.files:
                self.send_error(404)
                return
            data = state.files[self.path.strip("/")]
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and state.ranges else 0
            if start >= len(data) and start:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            if state.send_length:
                self.send_header("Content-Length", str(len(data) - start))
            self.send_header("Content-Type", state.content_type)
            self.end_headers()
            if state.hold:
                state.hold.wait(600)
            length = state.cut_after.pop(0) if state.cut_after else len(data)
            self.wfile.write(data[start : start + length])

        def log_message(self, format, *args):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass  # A client that hangs up is part of some tests.

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
