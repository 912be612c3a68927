# SPDX-License-Identifier: Apache-2.0
"""Checks pinned dependencies for known vulnerabilities with pip-audit, and prints what it found.

python -m tools.audit build/audit/bin/pip-audit requirements.lock
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# What pip-audit says where it can't reach the database.
_NO_NETWORK = ("ConnectionError", "ServiceError", "Max retries", "Timeout")


def report(dependencies: Sequence[dict[str, Any]]) -> tuple[list[str], int]:
    """Returns a line on each dependency, and 1 if one is vulnerable, else 0."""
    unknown = sorted(d["name"] for d in dependencies if "skip_reason" in d)
    number = len(dependencies) - len(unknown)
    if not number:
        return [f"Nothing was audited: the index has no data on any of {len(unknown)} packages."], 0
    lines = [
        f"{d['name']} {d['version']}: {v['id']}, "
        + (f"mended in {', '.join(v['fix_versions'])}" if v["fix_versions"] else "not mended yet")
        for d in dependencies
        for v in d.get("vulns", ())
    ]
    code = 1 if lines else 0
    lines.append(f"{number} packages audited, {len(lines)} vulnerabilities known.")
    if unknown:
        lines.append(f"Not audited, for want of data: {', '.join(unknown)}.")
    return lines, code


def main(argv: Sequence[str]) -> int:
    """Prints the findings; returns 1 if a dependency is vulnerable, 0 if nothing can be told."""
    pip_audit, *locks = argv
    options = ("--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off")
    found: dict[str, dict[str, Any]] = {}
    for lock in locks:  # One by one: a package that occurs in two of them is an error.
        done = subprocess.run([pip_audit, "-r", lock, *options], capture_output=True, text=True)
        try:
            found |= {d["name"]: d for d in json.loads(done.stdout)["dependencies"]}
        except (ValueError, KeyError):
            if any(word in done.stderr for word in _NO_NETWORK):
                print("Nothing was audited: the database of vulnerabilities could not be reached.")
                return 0
            print(done.stderr, end="", file=sys.stderr)
            return done.returncode or 1
    lines, code = report(list(found.values()))
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
