# SPDX-License-Identifier: Apache-2.0
"""Injects faults into small runs of real processes, and checks all guarantees.

python -m tools.chaos
python -m tools.chaos --only=kill,damage --rounds=3
"""

import json
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.chaos.faults import FAULTS, Outcome, prepare
from tools.chaos.job import Lab
from vit_jax.utils.command import CommandParser, run_command
from vit_jax.utils.errors import UserError

COLUMNS = ("fault", "injected", "recovered", "steps lost (max)", "end state equal")


def tabulate(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """A row for each fault."""
    rows: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        row = rows.setdefault(
            outcome.fault, dict(zip(COLUMNS, (outcome.fault, 0, 0, "-", "-"), strict=True))
        )
        injected, recovered, lost, equal = COLUMNS[1:]
        row[injected] += 1
        row[recovered] += is_recovered(outcome)
        if outcome.lost is not None:
            row[lost] = max(outcome.lost, 0 if row[lost] == "-" else row[lost])
        if outcome.equal is not None:
            row[equal] = "no" if not outcome.equal or row[equal] == "no" else "yes"
    return list(rows.values())


def is_recovered(outcome: Outcome) -> bool:
    """Whether all was as promised."""
    return outcome.problem is None and outcome.equal is not False


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | ---: | ---: | ---: | --- |"]
    lines += ["| " + " | ".join(str(row[column]) for column in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def run(kinds: Sequence[str], *, minutes: float, rounds: int, seed: int) -> list[Outcome]:
    """Goes through the faults, and begins no other when the time is up."""
    begun, found = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="vit_jax_chaos_") as folder:
        for number in range(rounds):
            lab = Lab(Path(folder) / str(number), np.random.default_rng(seed + number))
            prepare(lab)
            for kind in kinds:
                minute = (time.monotonic() - begun) / 60
                if minute > minutes:
                    print(f"{minute:.1f} min: the time is up before {kind}", flush=True)
                    return found
                for outcome in FAULTS[kind](lab):
                    found.append(outcome)
                    minute = (time.monotonic() - begun) / 60
                    good = "recovered" if is_recovered(outcome) else "NOT RECOVERED"
                    why = outcome.problem or ("" if outcome.equal is not False else "other end")
                    text = f"{minute:.1f} min  {outcome.fault}: {outcome.detail}: {good} {why}"
                    print(text.rstrip(), flush=True)
    return found


def main(argv: Sequence[str]) -> int:
    """Prints a line for each injection, and the table; 1 if one was not recovered from."""
    parser = CommandParser(prog="python -m tools.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15, help="begins no other fault later")
    parser.add_argument("--rounds", type=int, default=1, help="how often to go through all")
    parser.add_argument("--only", default=",".join(FAULTS), help=f"some of {', '.join(FAULTS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    parser.add_argument("--json", type=Path, help="file that the outcomes are written to")
    args = parser.parse_args(argv)
    kinds = args.only.split(",")
    if unknown := [kind for kind in kinds if kind not in FAULTS]:
        raise UserError(f"--only={unknown[0]}: expected some of {', '.join(FAULTS)}")
    begun = time.monotonic()
    found = run(kinds, minutes=args.minutes, rounds=args.rounds, seed=args.seed)
    rows = tabulate(found)
    print(f"\n{show(rows)}")
    if args.json:
        content = {
            "command": "python -m tools.chaos "
            + " ".join(a for a in argv if not a.startswith("--json")),
            "minutes": round((time.monotonic() - begun) / 60, 1),
            "cores": os.cpu_count(),
            "table": rows,
            "outcomes": [vars(outcome) for outcome in found],
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    bad = sum(not is_recovered(outcome) for outcome in found)
    print(f"\n{len(found)} faults injected, {bad} not recovered from")
    return 1 if bad or not found else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run_command(main)
