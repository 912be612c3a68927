# SPDX-License-Identifier: Apache-2.0
"""A job of two tasks under a real Slurm on this machine: stopped, requeued, finished, cancelled."""

import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests.runtime.test_processes import ROOT, free_port, metric
from vit_jax.utils.signals import RUN_AGAIN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        None in map(shutil.which, ("slurmctld", "slurmd", "sbatch")),
        reason="Slurm is not installed: slurmctld, slurmd, sbatch (Debian: slurm-wlm)",
    ),
]

# No authentication, control groups or accounting: they need services of the system.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}
SlurmdSpoolDir={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:4
"""
CONFIG_FILE = """
from tests.tiny import tiny_config
def get_config(data_dir):
    return tiny_config(
        data_dir,
        total_steps=300,
        model__num_layers=1,
        log_every=5,
        evals={},
        checkpoint__every=1_000_000,
    )
"""


def wait_until(found, *, seconds=120):
    """What `found` gives once that is true."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
    return result


@pytest.fixture
def slurm(tmp_path):
    """The environment of commands of a cluster of this machine alone."""
    host = socket.gethostname().partition(".")[0]
    configuration = tmp_path / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            folder=tmp_path,
            host=host,
            ctld_port=free_port(),
            slurmd_port=free_port(),
            user=pwd.getpwuid(os.getuid()).pw_name,
            cpus=os.cpu_count(),
        )
    )
    environment = os.environ | {
        "SLURM_CONF": str(configuration),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    daemons = []
    try:
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            with open(tmp_path / f"{command[0]}.log", "w") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        wait_until(lambda: "idle" in run(environment, "sinfo", "-h", "-o", "%T", check=False))
        yield environment
    finally:
        run(environment, "scancel", "--user", str(os.getuid()), "--signal=KILL", check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def run(environment, *command, check=True):
    done = subprocess.run(
        command, env=environment, cwd=ROOT, text=True, capture_output=True, timeout=600
    )
    assert not check or done.returncode == 0, done
    return done.stdout


def test_a_job_stops_at_a_signal_comes_back_and_finishes(slurm, data_dir, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG_FILE)
    output = tmp_path / "output"

    def submit(*more):
        said = run(
            slurm,
            *("sbatch", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={output}"),
            *("launch/slurm/train.sbatch", "--platform=cpu", "--expect_devices=2"),
            *(f"--config={tmp_path / 'config.py'}:{data_dir}", *more),
            f"--workdir={tmp_path / 'workdir'}",
        )
        return said.split()[-1]

    def text():
        return output.read_text() if output.exists() else ""

    def state(job):
        shown = run(slurm, "scontrol", "show", "job", job)
        return re.findall(r"JobState=(\w+)", shown)[0]

    job = submit()
    wait_until(lambda: "step 5/300" in text())
    run(slurm, "scancel", "--signal=TERM", job)
    wait_until(lambda: "train.sbatch: to be run again" in text())
    assert text().count(f"Exited with exit code {RUN_AGAIN}") >= 1
    (saved,) = (int(p.name) for p in (tmp_path / "workdir" / "checkpoints").iterdir())

    # Slurm lets what is requeued wait for two minutes.
    wait_until(lambda: state(job) == "PENDING")
    run(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_until(lambda: state(job) == "COMPLETED", seconds=300)
    assert f"resuming from {tmp_path / 'workdir' / 'checkpoints' / str(saved)}" in text()
    assert list(metric(tmp_path, "train/loss"))[-1] == 300

    output.unlink()
    job = submit("--config.total_steps=1000000")
    wait_until(lambda: "step 305/1000000" in text())
    run(slurm, "scancel", job)
    wait_until(lambda: state(job) == "CANCELLED")
    assert "of 1000000, which is saved" in text()
    assert "to be run again" not in text()
