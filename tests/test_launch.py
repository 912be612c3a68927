# SPDX-License-Identifier: Apache-2.0
"""Launch scripts, with a stand-in for the cloud's command."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "launch" / "tpu_vm.sh"
TRAIN = ["--config=configs/x.py:a,b", "--workdir=/shared/my runs"]


def test_tpu_vm_hands_the_arguments_to_every_host(tmp_path):
    fake = tmp_path / "gcloud"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    repository = tmp_path / "repository"
    (repository / "launch").mkdir(parents=True)
    (repository / "launch" / SCRIPT.name).write_text(SCRIPT.read_text())
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "All"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    arguments = ["--config=configs/x.py:a,b", "--workdir=/mnt/my runs"]
    done = subprocess.run(
        ["bash", repository / "launch" / SCRIPT.name, "pod", "zone-a", *arguments],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--worker=all") == 3
    assert "bash ~/vit_jax/launch/tpu_host.sh --config=configs/x.py:a\\,b" in done.stdout
    assert "--workdir=/mnt/my\\ runs" in done.stdout


def test_tpu_vm_dry_run_prints_the_commands():
    done = subprocess.run(
        ["bash", SCRIPT, "pod", "zone-a", *TRAIN],
        env=os.environ | {"DRY_RUN": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    commands = [line.split()[0] for line in done.stdout.splitlines() if " tpu-vm " in line]
    assert commands == ["gcloud"] * 3
    assert "git -C" in done.stdout


@pytest.mark.parametrize(("notice", "code"), [("NONE", 2), ("TERMINATE_ON_HOST_MAINTENANCE", 75)])
def test_a_tpu_host_tells_the_run_when_its_machine_will_go(notice, code, tmp_path):
    # One that ends by itself with code 2, and with 75 when it is told to.
    files = {
        "curl": 'case "$*" in *preempted) echo FALSE ;; '
        f"*) grep -q main ~/vit_jax.log && echo {notice} ;; esac",
        "python": 'trap "exit 75" TERM; echo "$@"; '
        f"for _ in {{1..{9 if code == 2 else 9999}}}; do sleep 0.1; done; exit 2",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", SCRIPT.parent / "tpu_host.sh", *TRAIN],
        env=os.environ
        | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "PYTHON": str(tmp_path / "python"),
            "POLL_S": "0.3",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done
    assert "-m vit_jax.main --coordinator=auto --config=" in (tmp_path / "vit_jax.log").read_text()
    assert ("will be taken away" in done.stdout) == (code == 75)


def test_the_image_is_made_of_what_there_is():
    root = SCRIPT.parent.parent
    text = (SCRIPT.parent / "docker" / "Dockerfile").read_text()
    sources = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
    sources = sorted(s for copied in sources for s in copied if not s.startswith(("--", "/")))
    ignored = (SCRIPT.parent / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert sources == [line[1:] for line in ignored if line.startswith("!")]
    assert all((root / source).exists() for source in sources)
    # Without requirements.lock and LICENSE, which pip and setup.py ask for, nothing is installed.
    assert {"requirements.lock", "LICENSE"} <= set(sources)
    assert all(f'"{extra}": [' in (root / "setup.py").read_text() for extra in ("tpu", "cuda"))


def test_tpu_vm_without_arguments_explains_itself():
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "tpu_vm.sh NAME ZONE --config=" in done.stderr


SBATCH = SCRIPT.parent / "slurm" / "train.sbatch"


def run_sbatch(tmp_path, *, code, state="RUNNING", **environment):
    """Runs the batch script with stand-ins for Slurm; the exit code and what they were given."""
    record = tmp_path / "record"
    answers = {"srun": f"exit {code}", "scontrol": "exit 0", "squeue": f"echo {state}"}
    for name, text in answers.items():
        fake = tmp_path / name
        fake.write_text(f'#!/usr/bin/env bash\nprintf "%s " {name} "$@" >> "{record}"\n{text}\n')
        fake.chmod(0o755)
    done = subprocess.run(
        ["bash", SBATCH, *TRAIN],
        env=os.environ
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        | environment,
        capture_output=True,
        text=True,
    )
    return done, record.read_text() if record.exists() else ""


def test_slurm_job_goes_back_to_the_queue_when_it_asks_to(tmp_path):
    done, record = run_sbatch(tmp_path, code=75)
    assert done.returncode == 0, done.stderr
    assert "python -m vit_jax.main --coordinator=auto --platform=gpu --config" in record
    assert record.endswith("scontrol requeue 7 ")


def test_slurm_job_that_was_cancelled_stays_away(tmp_path):
    done, record = run_sbatch(tmp_path, code=75, state="COMPLETING")
    assert done.returncode == 75
    assert "requeue" not in record


def test_slurm_job_that_fails_stays_failed(tmp_path):
    done, record = run_sbatch(tmp_path, code=2)
    assert done.returncode == 2
    assert "requeue" not in record


def test_slurm_dry_run_starts_nothing(tmp_path):
    done, record = run_sbatch(tmp_path, code=0, DRY_RUN="1")
    assert done.stdout.startswith("srun --kill-on-bad-exit=0 --wait=60 python -m vit_jax.main")
    assert "/shared/my\\ runs" in done.stdout
    assert record == ""


QUEUE = SCRIPT.parent / "tpu_queue.sh"


def run_queue(*arguments, **environment):
    return subprocess.run(
        ["bash", QUEUE, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_tpu_from_the_queue_is_asked_for_trained_on_and_given_back():
    kind = ["pod", "zone-a", "v5litepod-16", "v2-alpha"]
    done = run_queue("train", *kind, "--spot", "--", *TRAIN, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    create, train = done.stdout.splitlines()
    assert "queued-resources create pod --node-id=pod --zone=zone-a" in create
    assert "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha --spot" in create
    assert "tpu_vm.sh pod zone-a --config=" in train
    assert "--spot" not in run_queue("create", *kind, DRY_RUN="1").stdout
    assert "delete pod --zone=zone-a --force" in run_queue("delete", *kind[:2], DRY_RUN="1").stdout


def test_training_goes_on_when_the_machines_were_taken(tmp_path):
    # The first run ends as its machines are taken away; the second ends well.
    (tmp_path / "gcloud").write_text(
        f"""#!/usr/bin/env bash
cd "{tmp_path}"
case "$*" in
  *describe*) cat state ;;
  *create*) echo create >> record; echo ACTIVE > state ;;
  *delete*) echo delete >> record; echo NONE > state ;;
esac
"""
    )
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "state").write_text("NONE")
    scripts = tmp_path / "launch"
    scripts.mkdir()
    (scripts / "tpu_queue.sh").write_text(QUEUE.read_text())
    (scripts / "tpu_vm.sh").write_text(
        f"cd '{tmp_path}'; echo train >> record; [ -e ran ] && exit 0; touch ran;"
        "echo SUSPENDED > state; exit 255"
    )
    done = subprocess.run(
        ["bash", scripts / "tpu_queue.sh", "train", "pod", "z", "t", "v", "--", *TRAIN],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "POLL_S": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    record = (tmp_path / "record").read_text().split()
    assert record == ["create", "train", "delete", "create", "train"]
