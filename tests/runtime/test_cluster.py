# SPDX-License-Identifier: Apache-2.0
"""A process finds its place in the job from flags and the launcher's variables."""

import pytest

from vit_jax.runtime.cluster import Job, find_job, first_host
from vit_jax.utils.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
GKE = {"TPU_WORKER_HOSTNAMES": "job-0-0.job,job-0-1.job", "TPU_WORKER_ID": "1"}
ALL_GPUS = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


def auto(environment):
    return find_job("auto", None, None, None, environment)


def test_no_flags_and_no_launcher_is_a_job_of_one():
    assert find_job(None, None, None, None, {}) is None
    # A script that sbatch runs, and not a step of srun.
    batch = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}
    assert find_job(None, None, None, None, batch) is None
    assert find_job("none", None, None, None, SLURM) is None


def test_flags_say_all():
    want = Job(source="flags", coordinator="a:1", num_processes=2, process_id=1)
    assert find_job("a:1", 2, 1, None, SLURM) == want
    assert find_job("a:1", 2, 1, (2, 3), {}).local_device_ids == (2, 3)
    assert find_job(None, None, None, (0,), {}) == Job(source="flags", local_device_ids=(0,))


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({}, (1,)),
        (ALL_GPUS, (1,)),
        # Bound by Slurm: each process sees its own alone.
        ({"CUDA_VISIBLE_DEVICES": "1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_PER_TASK": "2"}, None),
        # Two processes share the machine, and one has it to itself.
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x8)"} | ALL_GPUS, (4, 5, 6, 7)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x16)", "SLURM_LOCALID": "0"} | ALL_GPUS, None),
    ],
    ids=["unknown", "one_gpu", "bound", "bound_to_two", "four_gpus", "whole_node"],
)
def test_slurm(changes, gpus):
    assert auto(SLURM | changes) == Job(
        source="Slurm",
        coordinator=f"gpu003:{61440 + 1234567 % 4096}",
        num_processes=16,
        process_id=9,
        local_device_ids=gpus,
    )


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[007,009-015]-ib,x", "node007-ib"),
    ],
)
def test_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_open_mpi():
    job = auto(OPEN_MPI)
    assert job.coordinator == f"10.96.0.1:{61440 + 1531576320 % 4096}"
    assert (job.num_processes, job.process_id, job.local_device_ids) == (4, 3, (1,))
    del (later := dict(OPEN_MPI))["OMPI_MCA_orte_hnp_uri"]
    with pytest.raises(UserError, match="Open MPI does not say where process 0 is"):
        auto(later)
    assert find_job("head:7000", None, None, None, later).coordinator == "head:7000"


def test_gke_of_one_slice_and_of_several():
    assert auto(GKE) == Job(
        source="GKE", coordinator="job-0-0.job:8482", num_processes=2, process_id=1
    )
    job = auto(
        GKE
        | {
            "MEGASCALE_NUM_SLICES": "3",
            "MEGASCALE_SLICE_ID": "2",
            "MEGASCALE_COORDINATOR_ADDRESS": "first.job:8080",
        }
    )
    assert (job.coordinator, job.num_processes, job.process_id) == ("first.job:8482", 6, 5)


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ((None, 2, None, None), {}, "--coordinator=None, --num_processes=2"),
        (("a:1", 2, None, None), {}, "expected all three"),
        (("a:1", None, None, None), {}, "expected all three"),
        (("auto", 2, 0, None), {}, "expected all three, or --coordinator=auto alone"),
        (("a", 2, 0, None), {}, "--coordinator=a: expected HOST:PORT"),
        (("a:1", 2, 2, None), {}, "--process_id=2 with --num_processes=2"),
        ((None, None, None, None), SLURM, "process 9 of 16 by Slurm; expected --coordinator=auto"),
    ],
)
def test_half_a_job_is_refused(arguments, environment, words):
    with pytest.raises(UserError, match="^" + ".*" + words):
        find_job(*arguments, environment)
