# SPDX-License-Identifier: Apache-2.0
"""Heartbeats between the processes of a job, by which one that dies or hangs is found and named.

Each process exchanges a sign of life with process 0 every second. A process whose connection breaks
has died; one that is silent hangs.
"""

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable

import jax

from vit_jax.runtime.preemption import end_to_run_again, report
from vit_jax.runtime.processes import broadcast_from_process_0, host_names, share_machine
from vit_jax.runtime.rendezvous import listen
from vit_jax.utils.signals import RUN_AGAIN

LOOPBACK = "127.0.0.1"
_CONNECT_S = 5.0
# Seconds for `on_exit` before the process ends: the workdir may hang too.
_ON_EXIT_S = 5.0
# Seconds in which the others end by themselves if all have met the same error.
_FAILED_S = 20.0
_MAX_WAITING = 1 << 12
_BYE = "bye"


class _Peer:
    """The connection to another process."""

    def __init__(self, connection: socket.socket, index: int | None):
        self.connection, self.index, self.heard = connection, index, time.monotonic()
        self.is_gone = self.has_left = False
        self._text = b""

    def send(self, word: str) -> None:
        # A broken connection is detected by reading.
        with contextlib.suppress(OSError):
            self.connection.send(word.encode() + b"\n", socket.MSG_DONTWAIT)

    def read(self) -> list[str]:
        """Reads the words that have arrived."""
        try:
            got = self.connection.recv(_MAX_WAITING)
        except OSError:
            got = b""
        self.is_gone = not got or len(self._text) > _MAX_WAITING
        self.heard = time.monotonic()
        *lines, self._text = (self._text + got).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


class Heartbeat:
    """Watches the other processes of the job within its context, which all have to enter.

    Args:
      limit: seconds of silence after which a process counts as hung; 0 for no heartbeat.
      shared: errors that all processes raise alike; any other is sent to them.
      on_exit: called with what has happened before this process ends.
    """

    def __init__(
        self,
        limit: float,
        *,
        shared: tuple[type[BaseException], ...] = (),
        on_exit: Callable[[str], None] = lambda _: None,
    ):
        self._limit, self._shared, self._on_exit = limit, shared, on_exit
        self._pace = min(1.0, limit / 4)
        self._peers: list[_Peer] = []
        self._server: socket.socket | None = None
        self._stop, self._thread = threading.Event(), None

    def __enter__(self) -> "Heartbeat":
        if not self._limit or jax.process_count() == 1:
            return self
        self._hosts, self._me = host_names(), jax.process_index()
        address = LOOPBACK if len(set(self._hosts)) == 1 and share_machine() else ""
        if self._me == 0:
            self._server = listen(0, address)
        place = self._server and [address or _own_address(), self._server.getsockname()[1]]
        (address, port), self._token = broadcast_from_process_0([place, secrets.token_hex(8)])
        if self._me:
            self._connect(address, port)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        word = _BYE
        if kind is not None and not issubclass(kind, self._shared):
            word = f"failed {kind.__name__}"
        for peer in self._peers:
            peer.send(word)
            peer.connection.close()
        if self._server is not None:
            self._server.close()

    def _connect(self, address: str, port: int) -> None:
        local = ["localhost"] * (self._hosts[self._me] == self._hosts[0])
        for host in (*local, address, self._hosts[0]):
            with contextlib.suppress(OSError):
                connection = socket.create_connection((host, port), timeout=_CONNECT_S)
                connection.settimeout(None)
                peer = _Peer(connection, 0)
                peer.send(f"hello {self._token} {self._me}")
                self._peers.append(peer)
                return
        report(
            f"process {self._me} can't reach {self._hosts[0]}:{port}: where one stops, it is only "
            "noticed by the limits of watchdog.step"
        )

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            if self._server is not None:
                selector.register(self._server, selectors.EVENT_READ, None)
            for peer in self._peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            last = sent = time.monotonic()
            while not self._stop.is_set():
                ready = [key.data for key, _ in selector.select(self._pace / 4)]
                now = time.monotonic()
                if now - last > 2 * self._pace + 1:
                    # This process was suspended: it has not read what the others have sent.
                    for peer in self._peers:
                        peer.heard = now
                last = now
                for peer in ready:
                    if peer is None:
                        self._accept(selector)
                    else:
                        self._hear(peer, selector)
                if now - sent > self._pace:
                    sent = now
                    for peer in self._peers:
                        peer.send(".")
                for peer in self._peers:
                    if peer.index is not None and now - peer.heard > self._limit:
                        seconds = f"{now - peer.heard:.0f} s"
                        self._lose(f"{self._name(peer)} has not been heard of for {seconds}")

    def _accept(self, selector: selectors.BaseSelector) -> None:
        assert self._server is not None
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            peer = _Peer(connection, None)
            self._peers.append(peer)
            selector.register(connection, selectors.EVENT_READ, peer)

    def _hear(self, peer: _Peer, selector: selectors.BaseSelector) -> None:
        for word in peer.read():
            kind, _, rest = word.partition(" ")
            if peer.index is None:
                token, _, index = rest.partition(" ")
                if not secrets.compare_digest(token.encode(), self._token.encode()):
                    peer.is_gone = True  # Another program, such as a port scanner.
                    break
                peer.index = int(index) if index.isdecimal() else None
                if peer.index is None or not 0 < peer.index < len(self._hosts):
                    peer.index, peer.is_gone = None, True
                    break
            elif kind == _BYE:
                peer.has_left = True
            elif kind == "lost":
                self._lose(rest)
            elif kind == "failed":
                peer.has_left = True
                self._expect_end(f"{self._name(peer)} has ended with {rest}")
        if peer.is_gone or peer.has_left:
            selector.unregister(peer.connection)
            self._peers.remove(peer)
            if peer.index is not None and not peer.has_left:
                self._lose(f"{self._name(peer)} is gone")

    def _expect_end(self, what: str) -> None:
        timer = threading.Timer(_FAILED_S, lambda: self._stop.is_set() or self._lose(what))
        timer.daemon = True
        timer.start()

    def _name(self, peer: _Peer) -> str:
        return f"process {peer.index} on {self._hosts[peer.index or 0]}"

    def _lose(self, what: str) -> None:
        if self._stop.is_set():
            return
        # Before anything else, since JAX aborts a process that has lost process 0.
        for peer in self._peers:
            peer.send(f"lost {what}")
        report(f"{what}; ends with code {RUN_AGAIN}, to be restarted")
        end_to_run_again(lambda: self._on_exit(what), timeout=_ON_EXIT_S)


def _own_address() -> str:
    """The address from which this machine sends to others. Nothing is sent here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):
        s.connect(("10.255.255.255", 1))
        return s.getsockname()[0]
    return socket.gethostname()
