# SPDX-License-Identifier: Apache-2.0
"""Finds the processes of the job and the devices of this one, from flags and environment.

Supports TPU VMs, GKE, Slurm, Open MPI and plain flags. Nothing here uses the network.
"""

import dataclasses
import re
from collections.abc import Mapping

from vit_jax.utils.errors import UserError

# Seconds that processes wait for each other at the start of a job.
START_TIMEOUT = 300
# Each job of Slurm or Open MPI gets a port by its number, in a range that others rarely use.
_FIRST_PORT, _PORTS = 61440, 4096
_TPU_PORT = 8482


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """How this process joins its job.

    Attributes:
      source: of these values: `flags`, `Slurm`, `Open MPI`, `GKE`, or `JAX` if it detects them.
      coordinator: HOST:PORT of process 0; None if JAX detects it.
      process_id: of this process, from 0.
      local_device_ids: GPUs of the machine that this process uses; None for all visible ones.
    """

    source: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None


def find_job(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    local_device_ids: tuple[int, ...] | None,
    environment: Mapping[str, str],
) -> Job | None:
    """Finds this process's place in its job.

    Args:
      coordinator: HOST:PORT of process 0; `auto` to read the environment; `none` for a job of this
        process alone; None for that too, unless the environment has several processes. Under Slurm
        and Open MPI an address alone is enough.
      local_device_ids: GPUs of this process.

    Returns:
      None for a job of one process that needs no coordinator.

    Raises:
      UserError: arguments are missing or exclude each other, or the environment has several
        processes and it is not clear whether they are one job.
    """
    given = (num_processes, process_id)
    found = _from_slurm(environment) or _from_open_mpi(environment) or _from_gke(environment)
    is_address = coordinator not in (None, "none", "auto")
    if coordinator is not None and is_address:
        check_address(coordinator)
    from_flags = is_address and (given != (None, None) or found is None)
    is_incomplete = None in given if from_flags else given != (None, None)
    if is_incomplete:
        raise UserError(
            f"--coordinator={coordinator}, --num_processes={num_processes}, "
            f"--process_id={process_id}: expected all three, or --coordinator=auto alone"
        )
    if coordinator in (None, "none"):
        if coordinator is None and found is not None and (found.num_processes or 1) > 1:
            raise UserError(
                f"--coordinator is missing: this is process {found.process_id} of "
                f"{found.num_processes} by {found.source}; expected --coordinator=auto to make "
                "them one job, or --coordinator=none to run each alone"
            )
        if local_device_ids is None:
            return None
        return Job(source="flags", local_device_ids=local_device_ids)
    if from_flags:
        found = Job(source="flags", num_processes=num_processes, process_id=process_id)
    found = found or Job(source="JAX")
    if is_address:
        found = dataclasses.replace(found, coordinator=coordinator)
        assert found.num_processes is not None
        assert found.process_id is not None
        if not 0 <= found.process_id < found.num_processes:
            raise UserError(
                f"--process_id={process_id} with --num_processes={num_processes}: expected 0 to "
                "one less"
            )
    elif found.source != "JAX" and found.coordinator is None:
        raise UserError(
            f"--coordinator=auto: {found.source} does not say where process 0 is; expected "
            "--coordinator=HOST:PORT of it"
        )
    if local_device_ids is not None:
        found = dataclasses.replace(found, local_device_ids=local_device_ids)
    return found


def check_address(address: str) -> tuple[str, int]:
    """Splits HOST:PORT; raises `UserError` if the address has another form."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={address}: expected HOST:PORT, auto or none")
    return host.strip("[]"), int(port)


def _from_slurm(environment: Mapping[str, str]) -> Job | None:
    """The job of a step that srun has started; a script that sbatch runs is not a step."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID")
    values = [environment.get(name, "") for name in names]
    if not all(values):
        return None
    job, tasks, nodes, index = values
    port = _FIRST_PORT + int(job) % _PORTS
    # Such as "8(x2),4": all nodes except the last have as many tasks as the first.
    here = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return Job(
        source="Slurm",
        coordinator=f"{first_host(nodes)}:{port}",
        num_processes=int(tasks),
        process_id=int(index),
        local_device_ids=_own_gpus(
            environment,
            tasks=int(here[0]) if here else 1,
            local_id=int(environment.get("SLURM_LOCALID", "0")),
            bound="SLURM_GPUS_PER_TASK" in environment,
        ),
    )


def _from_open_mpi(environment: Mapping[str, str]) -> Job | None:
    size, rank = (environment.get(f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    if size is None or rank is None:
        return None
    # The address of mpirun, as in "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", which starts
    # rank 0 on its own machine. Later versions do not set it.
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"(\d+)\.\d+;tcp://([^,:;]+)", uri)
    port = _FIRST_PORT + int(found[1]) % _PORTS if found else 0
    return Job(
        source="Open MPI",
        coordinator=f"{found[2]}:{port}" if found else None,
        num_processes=int(size),
        process_id=int(rank),
        local_device_ids=_own_gpus(
            environment,
            tasks=int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")),
            local_id=int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")),
            bound=False,
        ),
    )


def _from_gke(environment: Mapping[str, str]) -> Job | None:
    """The job of a TPU pod on GKE, of one slice or several."""
    names = environment.get("TPU_WORKER_HOSTNAMES")
    worker = environment.get("TPU_WORKER_ID")
    if names is None or worker is None:
        return None
    hosts = [name.strip() for name in names.split(",")]
    slices = int(environment.get("MEGASCALE_NUM_SLICES", "1"))
    slice_id = int(environment.get("MEGASCALE_SLICE_ID", "0"))
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).partition(":")[0]
    return Job(
        source="GKE",
        coordinator=f"{first}:{_TPU_PORT}",
        num_processes=slices * len(hosts),
        process_id=slice_id * len(hosts) + int(worker),
    )


def _own_gpus(
    environment: Mapping[str, str], *, tasks: int, local_id: int, bound: bool
) -> tuple[int, ...] | None:
    """The ids of a process's share of the visible GPUs; None for all of them.

    The only process of a machine takes all, and so does one that the launcher has bound to its own
    GPUs. Otherwise the processes of the machine share the visible GPUs evenly.
    """
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if tasks == 1 or bound or (visible and len(visible) < tasks):
        return None
    share = len(visible) // tasks if visible else 1
    return tuple(range(local_id * share, (local_id + 1) * share))


def first_host(nodes: str) -> str:
    """The first host of a list such as Slurm's `gpu[003-007,12],cpu1`."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r}: expected names of nodes")
    return "".join(part or "" for part in found.groups())
