# SPDX-License-Identifier: Apache-2.0
"""Launch scripts, with a stand-in for the cloud's command."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "launch" / "tpu_vm.sh"


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
    assert "-m vit_jax.main --coordinator=auto --config=configs/x.py:a\\,b" in done.stdout
    assert "--workdir=/mnt/my\\ runs" in done.stdout


def test_tpu_vm_without_arguments_explains_itself():
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "tpu_vm.sh NAME ZONE --config=" in done.stderr
