# SPDX-License-Identifier: Apache-2.0
"""Reports the progress of a run from its workdir alone.

Examples:
  python -m vit_jax.status runs/digits
  python -m vit_jax.status runs/digits --json
"""

import argparse
import datetime
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.manifest import find_fault, has_manifest
from vit_jax.checkpoint.workdir import find_holder
from vit_jax.observe.console import set_up
from vit_jax.observe.divergence import read_rollbacks
from vit_jax.observe.ledger import KINDS, read_ledger, summarize
from vit_jax.utils.command import CommandParser, add_workdir, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import CHECKPOINTS, LEDGER
from vit_jax.utils.mirrors import find_mirror
from vit_jax.utils.streams import print_result
from vit_jax.utils.suggestions import suggest_workdir
from vit_jax.utils.text import printable


def describe(workdir: Path, *, verify: bool = True) -> dict[str, Any]:
    """The state and the progress of a run as a JSON object, with times in seconds.

    The workdir is only read. `verify` verifies the checksums of the newest checkpoint.

    Raises:
      UserError: the folder has no ledger.
    """
    summary = summarize(read_ledger(workdir))
    if summary is None:
        raise UserError(
            f"{str(workdir)!r} has no {LEDGER}; expected the workdir of a run"
            f"{suggest_workdir(workdir)}"
        )
    holder = find_holder(workdir)
    causes = list(summary.causes)
    if holder is None and len(causes) < summary.starts:
        causes.append("killed")
    steps = list_steps(workdir)
    speed = summary.steps_per_second
    left = (summary.total - summary.step) / speed if speed else None
    return {
        "step": summary.step,
        "total_steps": summary.total,
        "running": holder,
        "steps_per_second": speed,
        "eta_s": left if holder else None,
        "last_record_s_ago": max(0.0, time.time() - summary.time),
        "goodput": summary.goodput,
        "seconds": dict(summary.seconds),
        "starts": summary.starts,
        "causes": causes,
        "steps_lost": summary.lost,
        "rollbacks": read_rollbacks(workdir),
        "checkpoints": steps,
        "newest_checkpoint": _describe_checkpoint(workdir, steps, verify=verify),
    }


def _describe_checkpoint(workdir: Path, steps: Sequence[int], *, verify: bool) -> str:
    if not steps:
        return "none"
    folder = workdir / CHECKPOINTS / str(steps[-1])
    if not verify:
        return "not verified"
    if (mirror := find_mirror(folder)) is not None:  # Its content would have to be downloaded.
        missing = mirror.list_missing(folder)
        return f"damaged: {missing[0]} is missing" if missing else "all files are there"
    if fault := find_fault(folder):
        return f"damaged: {fault}"
    return "verified" if has_manifest(folder) else "without checksums"


def show(workdir: Path, found: dict[str, Any]) -> list[str]:
    """The result of `describe` as lines of text."""
    lines = [f"{workdir}: step {found['step']:,} of {found['total_steps']:,}"]
    state = f"running, {found['running']}" if found["running"] else f"ended: {found['causes'][-1]}"
    rows = {"state": f"{state}; last record {found['last_record_s_ago']:.0f} s ago"}
    if found["steps_per_second"]:
        rows["speed"] = f"{found['steps_per_second']:.3g} steps/s"
    if found["eta_s"] is not None:
        rows["ETA"] = str(datetime.timedelta(seconds=round(found["eta_s"])))
    newest = found["checkpoints"][-1] if found["checkpoints"] else "-"
    rows["checkpoint"] = f"{newest}, {found['newest_checkpoint']}"
    rows["goodput"] = f"{found['goodput']:.1%} of the time went into steps that count"
    whole = sum(found["seconds"].values()) or 1.0
    shares = {kind: found["seconds"][kind] for kind in (*KINDS, "repeated", "down")}
    rows["time"] = ", ".join(f"{k} {v:.0f} s ({v / whole:.1%})" for k, v in shares.items() if v)
    counts = Counter(found["causes"])
    ends = ", ".join(f"{cause} {n}" for cause, n in counts.most_common())
    rows["starts"] = f"{found['starts']}; ends: {ends or 'none'}"
    rows["lost"] = f"{found['steps_lost']} steps were taken again or left out"
    for rollback in found["rollbacks"]:
        reason = rollback.get("reason", "its reason is lost")
        rows[f"rollback to {rollback['to']}"] = f"past {rollback['past']}: {reason}"
    return lines + [f"  {name:<14} {text}" for name, text in rows.items()]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments of the command; raises `UserError` if one is invalid."""
    parser = CommandParser(prog="python -m vit_jax.status", description=__doc__)
    add_workdir(parser, "Report on the run of this workdir, which may be under way.")
    parser.add_argument("--json", action="store_true", help="Print a JSON object, not text.")
    parser.add_argument(
        "--no_verify",
        action="store_true",
        help="Skip the checksums of the newest checkpoint, which takes long if it is large.",
    )
    args = parser.parse_args(argv)
    parser.require_workdir(args.workdir)
    return args


def main(argv: Sequence[str]) -> None:
    """Prints the progress of a run."""
    args = parse_arguments(argv)
    set_up(quiet=False, to_stderr=args.json)
    found = describe(args.workdir, verify=not args.no_verify)
    if args.json:
        print_result(json.dumps(found, indent=1))
    else:
        for line in show(args.workdir, found):
            print_result(printable(line))


if __name__ == "__main__":
    run_command(main)
