# SPDX-License-Identifier: Apache-2.0
"""What a run came from is written down, and what is new since is said."""

import json
import subprocess

from vit_jax.observe.provenance import describe_git, describe_run, log_changes


def test_it_is_json_with_versions_devices_and_data():
    run = json.loads(json.dumps(describe_run({"seed": 0}, data="abc")))
    assert (run["config"], run["data"], run["devices"]) == ({"seed": 0}, "abc", {"cpu": 8})
    assert {"vit_jax", "jax", "orbax-checkpoint", "python"} <= run["versions"].keys()


def test_changes_are_said_by_name(said):
    run = describe_run({}, data="abc")
    log_changes(run, run)
    log_changes({}, run)
    assert said == []
    log_changes(run | {"devices": {"H100": 2}, "versions": {"jax": "0.1"}}, run)
    assert len(said) == 2
    assert said[0].startswith("changed since the checkpoint: jax: 0.1 before, ")
    assert said[1] == "changed since the checkpoint: devices: {'H100': 2} before, {'cpu': 8} now"


def test_git_names_the_commit_and_whether_it_was_changed(tmp_path):
    assert describe_git(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    file = tmp_path / "f"
    file.write_text("1")
    for command in (["init", "-q"], ["add", "f"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *command], check=True)
    commit = describe_git(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    file.write_text("2")
    assert describe_git(tmp_path) == f"{commit}-dirty"
