# SPDX-License-Identifier: Apache-2.0
"""Clients that are slow, silent or send too much."""

import contextlib
import logging
import socket
import threading
import time

import pytest
import uvicorn

from tests.trained import write_images, write_model
from vit_jax.inference.model import load_model
from vit_jax.serve import protocol
from vit_jax.serve.app import Limits, make_app
from vit_jax.serve.protocol import Protocol

REQUESTS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    write_images(folder / "images", 1)
    return folder


@pytest.fixture(scope="module")
def app(place):
    limits = Limits(bytes=2**20, requests=REQUESTS, upload_s=1.5)
    return make_app(load_model(write_model(place / "vit.npz")), limits=limits)


@contextlib.contextmanager
def serving(app):
    """Yields the server and how to connect to it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, http=Protocol, log_level="error", server_header=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        address = listening.getsockname()
        try:
            yield server, thread, lambda: socket.create_connection(address, timeout=20)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def connect(app):
    with serving(app) as (_, _, connect):
        yield connect


def post(length, *, query="", more=""):
    head = f"POST /v1/predict{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n"
    return f"{head}{more}\r\n".encode()


def read(connection):
    """All bytes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(2**16):
            found += part
    return found


def ask(connect, content):
    with connect() as connection:
        connection.sendall(post(len(content), more="Connection: close\r\n") + content)
        return read(connection)


def test_stalled_uploads_make_room_for_others(connect, place):
    photo = (place / "images" / "00.png").read_bytes()
    assert ask(connect, photo).startswith(b"HTTP/1.1 200")
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(connect()) for _ in range(REQUESTS)]
        for connection in stalled:
            connection.sendall(post(5000) + b"x")
        until = time.monotonic() + 20
        while not (reply := ask(connect, photo)).startswith(b"HTTP/1.1 200"):
            assert reply.startswith(b"HTTP/1.1 503")
            assert time.monotonic() < until
            time.sleep(0.1)
        for connection in stalled:
            reply = read(connection)
            assert reply.startswith(b"HTTP/1.1 408")
            assert b"connection: close" in reply.lower()
            assert b"the upload takes too long: 1 bytes arrived" in reply


def test_headers_that_do_not_end_are_not_waited_for(app, monkeypatch):
    monkeypatch.setattr(protocol, "HEADERS_S", 0.3)
    with serving(app) as (_, _, connect):
        for start in (b"", b"GET /healthz HTTP/1.1\r\nHost: 127.0"):
            with connect() as connection:
                connection.sendall(start)
                assert read(connection) == b""
        # The second request of a connection too.
        with connect() as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /he")
            assert read(connection).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (post(2**40), b"413"),
        (post("9" * 19), b"413"),
        (post("9" * 30), b"400"),
        (post("9" * 5000), b"400"),
        (post(2**40, query="?top_k=0"), b"400"),
        (post(2**40, query="?top_k=" + "9" * 4301), b"400"),
        (post(2**40, query="?top_k=" + "9" * 20_000), b"400"),
        (post(2**40, query="?top_k=-" + "0" * 20_000 + "1"), b"400"),
        (post(2**40, query="?top_k=1&top_k=2&overlay=%ff%00"), b"400"),
        (post(2**40).replace(b"/v1/predict", b"/none"), b"404"),
    ],
)
def test_the_rest_of_what_is_refused_is_not_read(connect, head, status):
    with connect() as connection:
        connection.sendall(head)
        sent = 0
        with contextlib.suppress(ConnectionResetError, BrokenPipeError, TimeoutError):
            connection.settimeout(2)
            while sent < 2**27:
                sent += connection.send(bytes(2**16))
        assert sent < 2**26
        connection.settimeout(20)
        assert read(connection).startswith(b"HTTP/1.1 " + status)


def test_an_upload_without_a_length_is_read_up_to_the_limit(connect):
    with connect() as connection:
        head = b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
        connection.sendall(head + 20 * chunk)
        reply = read(connection)
    assert reply.startswith(b"HTTP/1.1 413")
    assert b"the image has more than 1,048,576 bytes" in reply


def test_stalled_connections_do_not_delay_the_end(app):
    with contextlib.ExitStack() as stack, serving(app) as (server, thread, connect):
        starts = (b"", b"GET /he", post(5000) + b"x", post(2**40) + b"x")
        for start in starts:
            stack.enter_context(connect()).sendall(start)
        deadline = time.monotonic() + 20
        while len(server.server_state.connections) < len(starts):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        begun = time.monotonic()
        server.should_exit = True
        thread.join()
        assert time.monotonic() - begun < 1


CHUNKED = "POST {} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("path", ["/", "/none", "/healthz", "/v1/predict", "/v1/predict?top_k=x"])
@pytest.mark.parametrize("wait", [0.0, 0.1])
def test_a_chunk_without_a_size_is_no_bug_of_the_server(path, wait, connect, caplog, monkeypatch):
    for name in ("uvicorn.error", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [caplog.handler])
    with connect() as connection:
        connection.sendall(CHUNKED.format(path).encode())
        time.sleep(wait)
        with contextlib.suppress(OSError):
            connection.sendall(b"zz\r\n" + b"x" * 100)
        reply = read(connection)
    assert reply.startswith(b"HTTP/1.1 4")
    assert reply.count(b"HTTP/1.1 ") == 1
    assert not [r for r in caplog.records if r.exc_info or "Traceback" in r.getMessage()]


def test_headers_that_are_too_long_get_an_answer(connect):
    with connect() as connection:
        with contextlib.suppress(OSError):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 2**20)
        reply = read(connection)
    assert reply.startswith(b"HTTP/1.1 431 ")
    assert b'{"error":' in reply


@pytest.mark.parametrize(
    "query", ["top_k=1&top_k=2", "overlay=true&overlay=true", "top_k=1&top_k=1"]
)
def test_an_option_that_is_given_twice_is_refused(query, connect, place):
    photo = (place / "images" / "00.png").read_bytes()
    with connect() as connection:
        head = post(len(photo), query=f"?{query}", more="Connection: close\r\n")
        connection.sendall(head + photo)
        reply = read(connection)
    assert reply.startswith(b"HTTP/1.1 400")
    assert f"{query.partition('=')[0]} is given 2 times; expected once" in reply.decode()


def test_many_stalled_uploads_do_not_delay_the_end(app):
    with contextlib.ExitStack() as stack, serving(app) as (server, thread, connect):
        for _ in range(80):
            stack.enter_context(connect()).sendall(post(5000) + b"x")
        deadline = time.monotonic() + 20
        while len(server.server_state.connections) < REQUESTS:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        begun = time.monotonic()
        server.should_exit = True
        thread.join()
        assert time.monotonic() - begun < 1.5
