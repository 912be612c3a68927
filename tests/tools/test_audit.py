# SPDX-License-Identifier: Apache-2.0
"""What is said of dependencies, by a pip-audit that is not there."""

import json

import pytest

from tools import audit

GOOD = {"name": "good", "version": "1.0", "vulns": []}
BAD = {
    "name": "bad",
    "version": "2.0",
    "vulns": [
        {"id": "CVE-2026-1", "fix_versions": ["2.1", "3.0"]},
        {"id": "CVE-2026-2", "fix_versions": []},
    ],
}
UNKNOWN = {"name": "unknown", "skip_reason": "Dependency not found"}


@pytest.fixture
def pip_audit(tmp_path):
    """Makes a command that says what it is told to, and keeps its arguments."""

    def make(stdout="", stderr="", code=0):
        for name, text in {"out": stdout, "err": stderr}.items():
            (tmp_path / name).write_text(text)
        command = tmp_path / "pip-audit"
        command.write_text(
            f'#!/bin/sh\ncd "{tmp_path}"\necho "$@" >>arguments\n'
            f"cat out\ncat err >&2\nexit {code}\n"
        )
        command.chmod(0o755)
        return str(command)

    return make


@pytest.mark.parametrize(
    ("dependencies", "code", "lines"),
    [
        ([GOOD], 0, ["1 packages audited, 0 vulnerabilities known."]),
        (
            [GOOD, BAD, UNKNOWN],
            1,
            [
                "bad 2.0: CVE-2026-1, mended in 2.1, 3.0",
                "bad 2.0: CVE-2026-2, not mended yet",
                "2 packages audited, 2 vulnerabilities known.",
                "Not audited, for want of data: unknown.",
            ],
        ),
        # Of an index that mirrors packages alone, nothing can be learned: that is not "none known".
        ([UNKNOWN], 0, ["Nothing was audited: the index has no data on any of 1 packages."]),
    ],
)
def test_what_is_known_is_told_from_what_is_not(
    dependencies, code, lines, pip_audit, tmp_path, capsys
):
    command = pip_audit(json.dumps({"dependencies": dependencies}), code=code)
    assert audit.main([command, "a.lock", "b.lock"]) == code
    assert capsys.readouterr().out.splitlines() == lines
    calls = (tmp_path / "arguments").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["a.lock", "b.lock"]


def test_without_a_network_it_says_so(pip_audit, capsys):
    command = pip_audit(stderr="requests.exceptions.ConnectionError: no\n", code=1)
    assert audit.main([command, "a.lock"]) == 0
    assert "could not be reached" in capsys.readouterr().out


def test_another_failure_is_one(pip_audit, capsys):
    command = pip_audit(stderr="pip-audit: no such file: a.lock\n", code=2)
    assert audit.main([command, "a.lock"]) == 2
    assert "no such file" in capsys.readouterr().err
