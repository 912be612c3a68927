# SPDX-License-Identifier: Apache-2.0
"""Array jobs of Slurm and Indexed Jobs of Kubernetes that pack a dataset in parts."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.test_launch_gke import check
from vit_jax.data.pack import _parse
from vit_jax.data.pack_parts import parse_part

LAUNCH = Path(__file__).parent.parent / "launch"
SBATCH = LAUNCH / "slurm" / "pack.sbatch"
PACK = ["folder:/data/my birds", "/shared/birds", "--short_side=256"]


def run_sbatch(tmp_path, *arguments, python="exit 0", stop=False, **environment):
    """Runs the batch script with stand-ins for Python and Slurm; returns its exit code and record.

    It gets SIGTERM once Python has started, if it is to `stop`.
    """
    record = tmp_path / "record"
    answers = {"python": python, "scontrol": "exit 0", "squeue": "echo RUNNING"}
    for name, text in answers.items():
        fake = tmp_path / name
        fake.write_text(f'#!/usr/bin/env bash\nprintf "%s " {name} "$@" >> "{record}"\n{text}\n')
        fake.chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "9"}
    process = subprocess.Popen(
        ["bash", SBATCH, *arguments],
        env=os.environ | given | {"SLURM_ARRAY_TASK_ID": "3"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while stop and not (record.exists() and record.read_text().startswith("python")):
        time.sleep(0.01)
    if stop:
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    return process.returncode, record.read_text() if record.exists() else "", out + err


def test_a_task_of_an_array_packs_its_part(tmp_path):
    code, record, _ = run_sbatch(tmp_path, *PACK, PARTS="16")
    assert code == 0
    assert record.startswith("python -m vit_jax.data.pack folder:/data/my birds /shared/birds ")
    assert "--short_side=256 --part=3/16 " in record
    assert "scontrol" not in record


def test_the_default_number_of_parts_is_that_of_the_array(tmp_path):
    _, _, said = run_sbatch(tmp_path, *PACK, DRY_RUN="1")
    part = parse_part(said.split("--part=")[1].strip())
    last = next(line for line in SBATCH.read_text().splitlines() if "#SBATCH --array=" in line)
    assert last == f"#SBATCH --array=0-{part.count - 1}"
    assert "folder:/data/my\\ birds" in said


def test_the_last_step_joins(tmp_path):
    code, record, _ = run_sbatch(tmp_path, *PACK, "--join", SLURM_ARRAY_TASK_ID="0")
    assert code == 0
    assert record.strip().split("squeue")[0].strip().endswith("--short_side=256 --join")
    assert "--part" not in record


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_part_that_fails_stays_failed(code, tmp_path):
    found, record, _ = run_sbatch(tmp_path, *PACK, python=f"exit {code}")
    assert found == code
    assert "requeue" not in record


def test_a_part_whose_time_is_up_goes_back_to_the_queue(tmp_path):
    waits = "trap 'exit 143' TERM; for _ in {1..999}; do sleep 0.05; done"
    code, record, said = run_sbatch(tmp_path, *PACK, python=waits, stop=True)
    assert code == 0, said
    assert record.endswith("scontrol requeue 9 ")


def test_the_script_without_arguments_explains_itself(tmp_path):
    code, _, said = run_sbatch(tmp_path)
    assert code == 2
    assert "launch/slurm/pack.sbatch SRC DST" in said


# Of batch/v1 and core/v1, what is used here.
FAILURE = {
    "action": {"FailJob", "Ignore"},
    "onPodConditions": [{"type": {"DisruptionTarget"}, "status": {"True"}}],
    "onExitCodes": {"containerName": str, "operator": {"In"}, "values": [int]},
}
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "resources": {"requests": {"": str}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
JOB = {
    "apiVersion": {"batch/v1"},
    "kind": {"Job"},
    "metadata": {"name": str},
    "spec": {
        "suspend": bool,
        "completionMode": {"Indexed"},
        "completions": int,
        "parallelism": int,
        "backoffLimit": int,
        "podFailurePolicy": {"rules": [FAILURE]},
        "template": {
            "spec": {
                "restartPolicy": {"Never"},
                "containers": [CONTAINER],
                "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
            }
        },
    },
}


def test_pods_of_an_indexed_job_pack_the_parts_and_a_second_job_joins_them():
    parts, join = yaml.safe_load_all((LAUNCH / "kubernetes" / "pack.yaml").read_text())
    for job in (parts, join):
        check(job, JOB)
        (rule,) = (r for r in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in r)
        assert rule["onExitCodes"]["values"] == [2]
    spec = parts["spec"]
    (pod,), (last,) = (job["spec"]["template"]["spec"]["containers"] for job in (parts, join))
    count = spec["completions"]
    assert pod["args"][-1] == f"--part=$(JOB_COMPLETION_INDEX)/{count}"
    for index in range(count):
        text = pod["args"][-1].replace("$(JOB_COMPLETION_INDEX)", str(index))
        assert parse_part(text.removeprefix("--part=")).number == index
    assert last["args"] == [*pod["args"][:-1], "--join"]
    assert _parse(last["args"]).join
    assert pod["command"] == last["command"]
    assert pod["command"][-2:] == ["-m", "vit_jax.data.pack"]
    # The image's entry point trains; its interpreter is the same.
    entry = (LAUNCH / "docker" / "Dockerfile").read_text().split("ENTRYPOINT ")[1]
    assert pod["command"][:-1] == yaml.safe_load(entry)[:-1]
    assert join["spec"]["suspend"]
