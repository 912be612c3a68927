# SPDX-License-Identifier: Apache-2.0
"""Jobs of several processes: how they connect, exchange values and fail together."""

import contextlib
import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.runtime.cluster import START_TIMEOUT, Job, check_address, find_job
from vit_jax.runtime.cpu_devices import set_cpu_devices
from vit_jax.runtime.rendezvous import is_loopback, rendezvous
from vit_jax.utils.errors import UserError


def initialize(
    coordinator: str | None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: tuple[int, ...] | None = None,
    timeout: float = START_TIMEOUT,
    expect_devices: int | None = None,
    platform: str | None = None,
    cpu_devices: int | None = None,
) -> Job | None:
    """Joins the job, if there is one.

    Args:
      coordinator: this and the next three: see `cluster.find_job`.
      timeout: seconds to wait for the other processes.
      expect_devices: number of devices that the job must have; None for any.
      platform: `cpu`, `gpu` or `tpu`, which the devices must be; None for any.
      cpu_devices: of a job of one process, if it runs on a CPU; None leaves it to JAX.

    Returns:
      How the processes found each other; None for a job of one process.

    Raises:
      UserError: arguments are missing, other processes do not connect, or the devices are not as
        expected.
    """
    job = find_job(coordinator, num_processes, process_id, local_device_ids, os.environ)
    if job is not None and job.coordinator is None and job.source == "flags":
        ids = ",".join(map(str, job.local_device_ids or ()))
        jax.config.update("jax_cuda_visible_devices", ids)
        jax.config.update("jax_rocm_visible_devices", ids)
    elif job is not None:
        _join(job, timeout)
    else:
        set_cpu_devices(cpu_devices)
    check_devices(expect_devices, platform)
    return job


def _join(job: Job, timeout: float) -> None:
    # Otherwise JAX handles SIGTERM itself, and a job would not end by it.
    jax.config.update("jax_enable_preemption_service", False)
    ids = list(job.local_device_ids) if job.local_device_ids else None
    try:
        if job.coordinator is None:
            jax.distributed.initialize(local_device_ids=ids, initialization_timeout=round(timeout))
            return
        assert job.num_processes is not None
        assert job.process_id is not None
        rendezvous(job.coordinator, job.num_processes, job.process_id, timeout=timeout)
        jax.distributed.initialize(
            job.coordinator,
            job.num_processes,
            job.process_id,
            ids,
            # Otherwise JAX fills in what is left out here on purpose, such as all GPUs.
            cluster_detection_method="deactivate",
            coordinator_bind_address=bind_address(job.coordinator),
        )
    except (ValueError, RuntimeError) as e:
        raise UserError(f"--coordinator={job.coordinator or 'auto'}: {e}") from e


def bind_address(coordinator: str) -> str | None:
    """Returns where process 0 listens: a loopback address itself; None for all addresses."""
    return coordinator if is_loopback(check_address(coordinator)[0]) else None


def check_devices(expect_devices: int | None, platform: str | None) -> None:
    """Raises `UserError` unless the job has that number and platform of devices; None is any."""
    try:
        devices = jax.devices()
    except RuntimeError as e:
        raise UserError(f"JAX finds no devices: {e}") from e
    what = f"found {len(devices)} {devices[0].device_kind} in {jax.process_count()} process(es)"
    if platform not in (None, devices[0].platform):
        raise UserError(
            f"--platform={platform}: {what}; expected devices of that platform: is the "
            "jax of this environment the one for them, and does no other program hold them?"
        )
    if expect_devices not in (None, len(devices)):
        counts = Counter(d.process_index for d in devices)
        usual = Counter(counts.values()).most_common(1)[0][0]
        odd = [f"process {i} has {n}" for i, n in sorted(counts.items()) if n != usual][:4]
        raise UserError(
            f"--expect_devices={expect_devices}: {what}, {usual} each"
            + "".join(f", {text}" for text in odd)
            + "; expected as many as asked for: is a process or its --local_device_ids missing?"
        )


def _gather_json(value: Any) -> list[Any]:
    """The JSON values of all processes, which all have to call this."""
    text = json.dumps(value).encode()
    length = int(np.max(multihost_utils.process_allgather(np.asarray(len(text), np.int32))))
    padded = np.frombuffer(text.ljust(length), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, length)
    return [json.loads(row.astype(np.uint8).tobytes()) for row in rows]


def host_names() -> tuple[str, ...]:
    """The host name of each process. All processes have to call it."""
    return tuple(_gather_json(socket.gethostname()))


def share_machine() -> bool:
    """Whether all processes run on one machine and in one network namespace of it.

    Host names may be equal on several machines. All processes have to call it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        mine = f"{boot} {os.readlink('/proc/self/ns/net')}"
    except OSError:  # Not Linux.
        mine = None
    places = _gather_json(mine)
    return None not in places and len(set(places)) == 1


def check_same(values: Mapping[str, Any]) -> None:
    """Checks that all processes have the same values by key. All of them have to call it.

    Raises:
      UserError: they differ; the message has the first keys that do.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(dict(values), sort_keys=True, default=str)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    other = next((i for i, d in enumerate(digests) if (d != digests[0]).any()), None)
    if other is None:
        return
    texts = _gather_json(json.loads(text))
    first, second = texts[0], texts[other]
    keys = sorted(first.keys() | second.keys())
    keys = [k for k in keys if first.get(k, "") != second.get(k, "")]
    shown = [f"{k} is {first.get(k)!r} there and {second.get(k)!r} here" for k in keys[:3]]
    raise UserError(
        f"processes 0 and {other} were not started alike: {'; '.join(shown)}"
        f"{' and more' if len(keys) > 3 else ''} (there: 0, here: {other}); expected the same "
        "command and the same files everywhere"
    )


def sum_over_processes(*counts: int) -> list[int]:
    """The sums of the counts of all processes, which all have to call this.

    Counts above 2**24 are rounded, since processes exchange float32.
    """
    if jax.process_count() == 1:
        return list(counts)
    return [int(total) for total in gather_over_processes(*counts).sum(axis=0)]


def gather_over_processes(*values: float) -> np.ndarray:
    """The numbers of each process, float64 `[processes, values]`. All processes have to call it.

    Numbers have the precision of float32, in which processes exchange them.
    """
    gathered = np.asarray(multihost_utils.process_allgather(np.array(values, np.float32)))
    return gathered.astype(np.float64).reshape(-1, len(values))


def broadcast_from_process_0(value: Any) -> Any:
    """The JSON value of process 0, in all processes. All of them have to call it."""
    return value if jax.process_count() == 1 else _gather_json(value)[0]


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Raises in all processes if the block raises `UserError` in one of them.

    Otherwise the others would wait for a process that has ended.

    Raises:
      UserError: the error of the block, or one that names the process that failed.
    """
    error = None
    try:
        yield
    except UserError as e:
        error = e
    if jax.process_count() > 1:
        failed = np.atleast_1d(multihost_utils.process_allgather(np.asarray(error is not None)))
        if error is None and failed.any():
            error = UserError(
                f"process {int(failed.argmax())} refused its input; its line says why"
            )
    if error is not None:
        raise error
