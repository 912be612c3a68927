# SPDX-License-Identifier: Apache-2.0
"""Processes that don't come are named, in all processes that did, within the time allowed."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vit_jax.runtime.processes import bind_address
from vit_jax.runtime.rendezvous import is_loopback, listen, rendezvous
from vit_jax.utils.errors import UserError


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def call(*processes, timeout=20.0):
    """What each (num_processes, process_id) got: None, or the error."""
    address = f"localhost:{free_port()}"

    def one(process):
        try:
            return rendezvous(address, *process, timeout=timeout)
        except UserError as e:
            return str(e)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


def test_all_go_on_once_all_are_there():
    assert call((4, 0), (4, 3), (4, 1), (4, 2)) == [None] * 4


def test_those_who_are_missing_are_named_everywhere():
    first, second = call((4, 0), (4, 2), timeout=1)
    assert first == second
    assert first.startswith("processes 1, 3 of 4 did not come within 1 s")


def test_a_missing_process_0_is_named():
    (error,) = call((2, 1), timeout=0.5)
    assert error.startswith("process 0 of 2 did not answer at localhost:")


def test_the_same_process_twice_is_refused():
    errors = call((3, 0), (3, 1), (3, 1))
    assert all(e.startswith("--process_id=1 is given twice") for e in errors)


def test_processes_that_count_differently_are_refused():
    errors = call((3, 0), (2, 1))
    assert all("--num_processes=2 in process 1" in e for e in errors)


def test_a_taken_port_is_refused():
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="can't listen on port"):
            rendezvous(address, 2, 0, timeout=1)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("node-0", False),
        ("0.0.0.0", False),
    ],
)
def test_a_local_job_listens_on_the_loopback_address_alone(host, local):
    assert is_loopback(host) is local
    place = f"[{host}]:1234" if ":" in host else f"{host}:1234"
    assert bind_address(place) == (place if local else None)
    if local and host != "::1":
        with listen(0, host) as server:
            assert is_loopback(server.getsockname()[0])


def test_other_programs_that_call_are_ignored():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(rendezvous, f"localhost:{port}", 2, 0, timeout=20)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b'{"process_id": "1"}\n', b"[" * 9999):
            with connect(port) as connection:
                connection.sendall(words + b"\n")
                connection.recv(1)
        rendezvous(f"localhost:{port}", 2, 1, timeout=20)
        assert first.result() is None


def connect(port):
    until = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("localhost", port))
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.01)
