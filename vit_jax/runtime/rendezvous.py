# SPDX-License-Identifier: Apache-2.0
"""All processes of a job connect to process 0 before JAX starts.

JAX aborts a process whose peers are missing, without naming them. Here each process reports which
ones are missing, after a bounded wait.
"""

import contextlib
import ipaddress
import json
import socket
import time
from typing import Any

from vit_jax.runtime.cluster import check_address
from vit_jax.utils.errors import UserError

_RETRY_S = 0.2
_MAX_LINE = 1 << 16


def rendezvous(coordinator: str, num_processes: int, process_id: int, *, timeout: float) -> None:
    """Returns in all processes once all of them have connected.

    Args:
      coordinator: HOST:PORT of process 0; the port is free again afterwards.
      timeout: seconds to wait.

    Raises:
      UserError: processes are missing, two have the same number, or they disagree on how many
        there are; in every process that could be reached.
    """
    host, port = check_address(coordinator)
    if process_id:
        _report(host, port, num_processes, process_id, timeout)
        return
    try:
        # Only processes of this machine can be meant by a loopback address.
        server = listen(port, host if is_loopback(host) else "")
    except OSError as e:
        raise UserError(
            f"--coordinator={coordinator}: process 0 can't listen on port {port} ({e.strerror}); "
            "expected a free one"
        ) from None
    with server:
        _wait_for_all(server, num_processes, timeout)


def listen(port: int, host: str = "") -> socket.socket:
    """A server on one address, or on all, of IPv6 too if the machine has it; port 0 is a free one.

    Raises:
      OSError: the port is taken.
    """
    if host:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _wait_for_all(server: socket.socket, num_processes: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    present: dict[int, str] = {}
    callers: list[socket.socket] = []
    error = None
    while len(present) < num_processes - 1 and error is None:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            connection, (address, *_) = server.accept()
        except TimeoutError:
            missing = sorted(set(range(1, num_processes)) - present.keys())
            error = (
                f"{_name(missing)} of {num_processes} did not come within {timeout:g} s; expected "
                "all to be started with the same --coordinator and --num_processes"
            )
            break
        message = _read(connection)
        if message is None or not _is_call(message):  # Another program, such as a port scanner.
            connection.close()
            continue
        index, name = message["process_id"], message["host"]
        if message["num_processes"] != num_processes:
            error = (
                f"--num_processes={message['num_processes']} in process {index} ({name}), "
                f"{num_processes} in process 0: expected the same"
            )
        elif index in present or not 0 < index < num_processes:
            other = present.get(index, "the machine of process 0")
            error = f"--process_id={index} is given twice, on {other} and {name} ({address})"
        callers.append(connection)
        present.setdefault(index, name)
    for connection in callers:
        _send(connection, {"error": error})
        connection.close()
    if error is not None:
        raise UserError(error)


def _report(host: str, port: int, num_processes: int, process_id: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    me = {"process_id": process_id, "num_processes": num_processes, "host": socket.gethostname()}
    reason = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                _send(connection, me)
                # Process 0 may have started to wait later than this one.
                answer = _read(connection, timeout=left + timeout)
        except OSError as e:
            reason = e.strerror or str(e)
        else:
            if answer is not None and isinstance(answer.get("error"), str | None):
                if answer.get("error") is not None:
                    raise UserError(answer["error"])
                return
            reason = "it closed the connection, as one does that already runs without this process"
        time.sleep(_RETRY_S)
    raise UserError(
        f"process 0 of {num_processes} did not answer at {host}:{port} within {timeout:g} s "
        f"({reason}); expected it to run there"
    )


def _is_call(message: dict[str, Any]) -> bool:
    kinds = {"process_id": int, "num_processes": int, "host": str}
    return all(type(message.get(key)) is kind for key, kind in kinds.items())


def _name(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (" and more" if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {shown}"


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    # A process that has ended by now is noticed elsewhere: every wait is bounded.
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket, *, timeout: float = 5.0) -> dict[str, Any] | None:
    connection.settimeout(timeout)
    try:
        with connection.makefile("rb") as file:
            message = json.loads(file.readline(_MAX_LINE))
    except (OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
