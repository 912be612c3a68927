# SPDX-License-Identifier: Apache-2.0
"""Jobs of several processes: how they find each other, and how they stop together."""

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.runtime.cluster import Job, resolve
from vit_jax.runtime.cpu_devices import set_cpu_devices
from vit_jax.runtime.rendezvous import rendezvous
from vit_jax.utils.errors import UserError

# Seconds that processes wait for each other at the start.
START_TIMEOUT = 300
_ENCODED_HOST = 64


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the devices of the job must be, or it does not start.

    Attributes:
      devices: how many, over all processes; None for any number.
      platform: `cpu`, `gpu` or `tpu`; None for any.
    """

    devices: int | None = None
    platform: str | None = None


def initialize(
    coordinator: str | None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: tuple[int, ...] | None = None,
    timeout: float = START_TIMEOUT,
    expected: Expected | None = None,
    cpu_devices: int | None = None,
) -> Job | None:
    """Joins the job, if there is one.

    Args:
      coordinator: this and the next three: see `cluster.resolve`.
      num_processes: of the job.
      process_id: of this process, from 0.
      local_device_ids: GPUs of this process.
      timeout: seconds to wait for the other processes.
      expected: what the devices must be.
      cpu_devices: of a job of one process, if it runs on a CPU; None leaves it to JAX.

    Returns:
      How the processes found each other; None for a job of one process.

    Raises:
      UserError: arguments are missing, processes don't come, or the devices are not as expected.
    """
    job = resolve(coordinator, num_processes, process_id, local_device_ids, os.environ)
    if job is not None and job.coordinator is None and job.source == "flags":
        ids = ",".join(map(str, job.local_device_ids or ()))
        jax.config.update("jax_cuda_visible_devices", ids)
        jax.config.update("jax_rocm_visible_devices", ids)
    elif job is not None:
        _join(job, timeout)
    else:
        set_cpu_devices(cpu_devices)
    check_devices(expected or Expected())
    return job


def _join(job: Job, timeout: float) -> None:
    # Else JAX takes SIGTERM for itself, and a job would not end by it.
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
            # Else JAX would fill in what is left out here on purpose, such as all GPUs.
            cluster_detection_method="deactivate",
        )
    except (ValueError, RuntimeError) as e:
        raise UserError(f"--coordinator={job.coordinator or 'auto'}: {e}") from e


def check_devices(expected: Expected) -> None:
    """Raises `UserError` unless the job's devices are those expected."""
    try:
        devices = jax.devices()
    except RuntimeError as e:
        raise UserError(f"JAX finds no devices: {e}") from e
    platform = devices[0].platform
    what = f"found {len(devices)} {devices[0].device_kind} in {jax.process_count()} process(es)"
    if expected.platform not in (None, platform):
        raise UserError(
            f"--platform={expected.platform}: {what}; expected devices of that platform: is the "
            "jax of this environment the one for them, and does no other program hold them?"
        )
    if expected.devices not in (None, len(devices)):
        counts = Counter(d.process_index for d in devices)
        usual = Counter(counts.values()).most_common(1)[0][0]
        odd = [f"process {i} has {n}" for i, n in sorted(counts.items()) if n != usual][:4]
        raise UserError(
            f"--expect_devices={expected.devices}: {what}, {usual} each"
            + "".join(f", {text}" for text in odd)
            + "; expected as many as asked for: is a process or its --local_device_ids missing?"
        )


def host_names() -> tuple[str, ...]:
    """The machine of each process; all processes have to ask for it."""
    name = socket.gethostname().encode()[:_ENCODED_HOST]
    row = np.zeros(_ENCODED_HOST, np.uint8)
    row[: len(name)] = np.frombuffer(name, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, _ENCODED_HOST)
    return tuple(bytes(r).rstrip(b"\0").decode(errors="replace") for r in rows)


def check_same(values: Mapping[str, Any]) -> None:
    """Makes sure that all processes were started alike.

    Args:
      values: by dotted key, such as the flat config. All processes have to come here.

    Raises:
      UserError: they differ; names the first keys that do.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(dict(values), sort_keys=True, default=str).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    other = next((i for i, d in enumerate(digests) if (d != digests[0]).any()), None)
    if other is None:
        return
    length = int(np.max(multihost_utils.process_allgather(np.asarray(len(text), np.int32))))
    padded = np.frombuffer(text.ljust(length), np.uint8)
    texts = np.asarray(multihost_utils.process_allgather(padded))
    first, second = (json.loads(bytes(texts[i])) for i in (0, other))
    keys = [
        k for k in sorted(first.keys() | second.keys()) if first.get(k, "") != second.get(k, "")
    ]
    shown = [f"{k} is {first.get(k)!r} there and {second.get(k)!r} here" for k in keys[:3]]
    raise UserError(
        f"processes 0 and {other} were not started alike: {'; '.join(shown)}"
        f"{' and more' if len(keys) > 3 else ''} (there: 0, here: {other}); expected the same "
        "command and the same files everywhere"
    )


def sum_over_processes(*counts: int) -> list[int]:
    """The sums of each process's counts; all processes have to ask for them.

    Between processes numbers go as float32, in which those above 2**24 are rounded.
    """
    if jax.process_count() == 1:
        return list(counts)
    return [int(total) for total in gather_over_processes(*counts).sum(axis=0)]


def gather_over_processes(*values: float) -> np.ndarray:
    """The numbers of each process, float64 `[processes, values]`; all have to ask for them.

    Between processes they go as float32.
    """
    gathered = np.asarray(multihost_utils.process_allgather(np.array(values, np.float32)))
    return gathered.astype(np.float64).reshape(-1, len(values))


def broadcast_from_process_0(value: Any) -> Any:
    """What process 0 has, a JSON value, in all processes; all have to ask for it."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
    # Whatever the others have: only its length counts.
    padded = np.frombuffer(text.ljust(length)[:length], np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)))


@contextlib.contextmanager
def all_agree() -> Iterator[None]:
    """All processes go on, or none does: one that stopped alone would leave the others waiting.

    Raises:
      UserError: that of the block, or of another process.
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
