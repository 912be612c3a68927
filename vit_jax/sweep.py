# SPDX-License-Identifier: Apache-2.0
r"""Trains a config with several settings, one run after another, and compares the results.

--sweep=KEY=VALUE,VALUE runs each value of a config key; with several keys, separated by ; or in a
--sweep each, all combinations. Values are read as those of --config.KEY=VALUE. A file has a
function get_sweep instead. It gives a dict of lists by config key, of which all combinations are
run, or a list of dicts by config key, one for each run; "name" in such a dict is that of its
folder. --config.KEY=VALUE holds for all runs. Given again, the command leaves out what is finished
and resumes with the rest. The table at the end is in WORKDIR/sweep.csv, .json and .html too.

The exit code is 2 for bad input, before anything runs; 1 if a run failed, while the others went on;
75 if it was told to stop, and is to be run again.

Examples:
  python -m vit_jax.sweep --config=digits --sweep="optimizer.lr=1e-3,3e-3" --workdir=runs/lr
  python -m vit_jax.sweep --config=digits --workdir=runs/grid \
      --sweep="optimizer.lr=1e-3,3e-3; optimizer.weight_decay=0.1,0.5" --sweep="seed=0,1"
  python -m vit_jax.sweep --config=configs/digits.py --sweep=configs/sweeps/digits.py \
      --workdir=runs/sweep --metric=val/loss --config.total_steps=1000
  python -m vit_jax.sweep --config=configs/vit_i1k.py --sweep=lr.py --workdir=/shared/lr \
      --emit=slurm --launch_args=--nodes=2 > submit.sh
  python -m vit_jax.sweep --config=configs/vit_i1k.py --sweep=lr.py --workdir=/shared/lr --summarize
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import runpy
import shlex
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.config.load import load_config, parse_literal, parse_overrides
from vit_jax.config.reduced import without_mesh
from vit_jax.observe.console import log, set_up
from vit_jax.pages.comparison import (
    RunRecord,
    make_csv,
    make_html,
    make_records,
    read_run,
    show_table,
)
from vit_jax.runtime.children import run_child, start_server
from vit_jax.utils.bounds import MAX_TABLE, read_json
from vit_jax.utils.command import CommandParser, add_workdir, local_path, run_command
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.files import write_atomically
from vit_jax.utils.layout import CONFIG
from vit_jax.utils.metrics import lower_is_better
from vit_jax.utils.registry import trust_parts
from vit_jax.utils.signals import INTERRUPTED, RUN_AGAIN, importing
from vit_jax.utils.streams import print_result
from vit_jax.utils.suggestions import suggest_path
from vit_jax.utils.text import printable

RESULTS = "sweep.json"
# What a run imports, sooner or later.
_PRELOADED = ("vit_jax.main", "vit_jax.training.run")
_NAME = re.compile(r"[\w+-][\w.,=+-]*")
_AXIS = re.compile(r"(?:--)?[A-Za-z_][\w.]*=")
_MOST_RUNS = 10_000
_LONGEST = 100  # characters of a name


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
      name: name of its folder.
      overrides: values of this run alone, by dotted key.
      arguments: arguments of `vit_jax.main`.
    """

    name: str
    overrides: Mapping[str, Any]
    arguments: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """A hash of the config: a finished run whose config has changed is trained again."""
        text = json.dumps(self.config, sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_sweep(sweeps: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """The names and overrides of all runs of a sweep.

    Args:
      sweeps: values of --sweep: files, or axes as in `optimizer.lr=1e-3,3e-3`. Several make a grid
        of all of them.

    Raises:
      UserError: a file is missing or fails, or its result is not valid; an axis can't be read.
    """
    grid: dict[str, Sequence[Any]] = {}
    trials: list[Mapping[str, Any]] = []
    for sweep in sweeps:
        where = f"--sweep={sweep}"
        found = _parse_axes(sweep) if _is_inline(sweep) else _run_file(sweep)
        if not isinstance(found, Mapping):
            if len(sweeps) > 1:
                raise UserError(
                    f"{where}: get_sweep gives a list of runs; expected it alone, or a dict of "
                    "lists by config key beside other axes"
                )
            trials = list(found)
            continue
        for key, values in found.items():
            if key in grid:
                raise UserError(f"{where}: {key} is given twice; expected one list of values")
            grid[key] = values
    where = " ".join(f"--sweep={sweep}" for sweep in sweeps)
    if grid:
        count = math.prod(map(len, grid.values()))
        if count > _MOST_RUNS:
            raise UserError(f"{where}: {count:,} runs; expected {_MOST_RUNS:,} at most")
        combinations = itertools.product(*grid.values())
        trials = [dict(zip(grid, values, strict=True)) for values in combinations]
    named = [_name_trial(dict(trial), where, trials) for trial in trials]
    name, count = Counter(name for name, _ in named).most_common(1)[0]
    if count > 1:
        raise UserError(f"{where}: two runs are {name!r}; expected each once")
    return named


def _is_inline(sweep: str) -> bool:
    return "=" in sweep and not sweep.endswith(".py") and not os.path.isfile(sweep)


def _run_file(path: str) -> Mapping[str, Sequence[Any]] | list[Mapping[str, Any]]:
    """The result of `get_sweep`: values by key, or runs."""
    where = f"--sweep={path}"
    if not os.path.isfile(path):
        raise UserError(
            f"{where}: there is no such file; expected one with get_sweep, or KEY=VALUE,VALUE such "
            f"as optimizer.lr=1e-3,3e-3{suggest_path(Path(path))}"
        )
    try:
        sweep = runpy.run_path(path)["get_sweep"]()
    except Exception as e:
        raise UserError(f"{where}: {describe_error(e)}") from e
    runs = sweep if isinstance(sweep, list | tuple) else []
    if isinstance(sweep, Mapping) and sweep:
        for key, values in sweep.items():
            if not isinstance(key, str) or not isinstance(values, list | tuple) or not values:
                raise UserError(f"{where}: {key!r}: {values!r}; expected a list of values")
        return sweep
    if not runs or not all(isinstance(trial, Mapping) for trial in runs):
        raise UserError(
            f"{where}: get_sweep gives {sweep!r}; expected a dict of lists by config key, or a "
            "list of dicts by config key"
        )
    return list(runs)


def _parse_axes(text: str) -> dict[str, list[Any]]:
    """The values by key of `KEY=VALUE,VALUE;KEY=...`, each read as that of `--config.KEY`."""
    axes: dict[str, list[Any]] = {}
    for axis in filter(None, _split(text, ";")):
        key, equals, rest = axis.partition("=")
        key = key.strip().removeprefix("--").removeprefix("config.")
        values = _split(rest, ",")
        if not equals or not key or not all(values):
            raise UserError(f"--sweep={text}: {axis!r}; expected KEY=VALUE,VALUE")
        if key in axes:
            raise UserError(
                f"--sweep={text}: {key} is given twice; expected its values in one list"
            )
        for value in values[1:]:
            if _AXIS.match(value):
                raise UserError(f"--sweep={text}: {value!r} is another key: expected ; before it")
        axes[key] = [parse_literal(value) for value in values]
    if not axes:
        raise UserError(f"--sweep={text}: expected KEY=VALUE,VALUE")
    return axes


def _split(text: str, separator: str) -> list[str]:
    """Splits a text where a separator is outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == separator and not depth:
            parts.append("")
            continue
        else:
            depth += (character in "([{") - (character in ")]}")
        parts[-1] += character
    if quote or depth:
        raise UserError(f"--sweep={text}: a bracket or a quote is left open")
    return [part.strip() for part in parts]


def _name_trial(
    trial: dict[str, Any], where: str, trials: Sequence[Mapping[str, Any]]
) -> tuple[str, dict[str, Any]]:
    given = trial.pop("name", None)
    if given is None:
        keys = {key for other in trials for key in other if key != "name"}
        leaves = [key.rpartition(".")[2] for key in keys]
        words = []
        for key, value in trial.items():
            leaf = key.rpartition(".")[2]
            short = leaf if leaves.count(leaf) == 1 else key
            words.append(f"{short}={re.sub(r'[^a-zA-Z0-9_.+-]+', '-', str(value)).strip('-')}")
        given = ",".join(words)
        if len(given) > _LONGEST:
            digest = hashlib.sha256(given.encode()).hexdigest()[:8]
            given = f"{given[: _LONGEST - 9]}-{digest}"
    if not isinstance(given, str) or not _NAME.fullmatch(given) or len(given) > _LONGEST:
        raise UserError(
            f"{where}: {given!r} can't be the name of a folder: expected letters, digits "
            f"and any of . , = + - _, at most {_LONGEST}; set it by 'name' in a list of dicts"
        )
    return given, trial


def make_trials(
    config: str,
    sweeps: Sequence[str],
    overrides: Mapping[str, Any],
    workdir: Path,
    *,
    parts: str = "",
) -> list[Trial]:
    """The runs of a sweep, by the values of --config, --sweep and --parts.

    Overrides of a single run take precedence over those of all runs, `overrides`.

    Raises:
      UserError: a file is missing or wrong, or a key is below a value.
    """
    trials = []
    for name, own in read_sweep(sweeps):
        both = {**overrides, **own}
        words = [f"--config.{key}={_write_literal(value)}" for key, value in both.items()]
        words += [f"--parts={parts}"] if parts else []
        arguments = (f"--config={config}", f"--workdir={workdir / name}", *words)
        trials.append(Trial(name, own, arguments, load_config(config, both).to_dict()))
    return trials


def _write_literal(value: Any) -> str:
    """The text of a value, from which `parse_literal` returns it."""
    text = str(value)
    return text if parse_literal(text) == value and isinstance(value, str) else repr(value)


def check_trials(trials: Sequence[Trial], workdir: Path) -> None:
    """Builds the experiment of each run, without its mesh, on the CPU.

    Raises:
      UserError: a config is wrong; the message names the run.
    """
    with importing():
        import jax

        from vit_jax.training.experiment import Experiment
        from vit_jax.training.run import check_sources
    # Accelerators are not initialized here, since that would take the memory of the runs.
    jax.config.update("jax_platforms", "cpu")
    for trial in trials:
        try:
            check_sources(trial.config, workdir / trial.name)
            Experiment.from_config(without_mesh(trial.config))
        except UserError as e:
            raise UserError(f"{trial.name}: {e}") from e


def run_trial(trial: Trial, *, command: str = "vit_jax.main") -> int:
    """Trains in a child, and returns its exit code.

    After SIGTERM, Ctrl-C or the end of the terminal the code is one of a run that was told to
    stop, even if it ended on its own meanwhile.
    """
    code, received = run_child(command, trial.arguments)
    if received is not None:
        return INTERRUPTED if received == signal.SIGINT else RUN_AGAIN
    return code


def run_sweep(
    trials: Sequence[Trial],
    workdir: Path,
    *,
    metric: str | None,
    run_trial: Callable[[Trial], int] = run_trial,
) -> int:
    """Runs the trials that are not finished, one after another, and returns the exit code.

    Results are sorted by `metric`. `run_trial` trains, and returns the exit code.

    Raises:
      UserError: the folder can't be created.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"--workdir={workdir} can't be used: {e.strerror}; expected a folder to write to"
        ) from None
    states = read_states(workdir)
    for number, trial in enumerate(trials, 1):
        state = states.get(trial.name, {})
        if state.get("status") == "finished" and state.get("digest") == trial.digest:
            log(f"run {number} of {len(trials)}: {trial.name} is finished")
            continue
        log(f"run {number} of {len(trials)}: {trial.name}")
        started = time.monotonic()
        code = run_trial(trial)
        status = {0: "finished", RUN_AGAIN: "stopped", INTERRUPTED: "stopped"}.get(code, "failed")
        states[trial.name] = {
            "status": status,
            "code": code,
            "digest": trial.digest,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_results(trials, states, workdir, metric=metric)
        if status == "stopped":
            log(f"{trial.name} was stopped; the same command resumes from there")
            return code
        if status == "failed":
            log(f"{trial.name} failed with code {code}; the others continue")
    return 1 if any(states.get(t.name, {}).get("status") == "failed" for t in trials) else 0


def read_states(workdir: Path) -> dict[str, dict[str, Any]]:
    """The states of the runs that have been started, by name."""
    try:
        runs = read_json(workdir / RESULTS, max_bytes=MAX_TABLE)["runs"]
        states = {run["run"]: run["state"] for run in runs if run["state"]}
        return {name: state for name, state in states.items() if isinstance(state, dict)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def sort_records(records: Sequence[RunRecord], metric: str | None) -> list[RunRecord]:
    """Sorts by the last value of a metric, the best first; runs without it are at the end."""
    if metric is None:
        return list(records)
    sign = 1 if lower_is_better(metric) else -1
    known = [record for record in records if metric in record.points]
    known.sort(key=lambda record: sign * record.points[metric][-1][1])
    return known + [record for record in records if metric not in record.points]


def write_results(
    trials: Sequence[Trial],
    states: Mapping[str, Mapping[str, Any]],
    workdir: Path,
    *,
    metric: str | None,
) -> list[str]:
    """Writes `sweep.json`, `sweep.csv` and `sweep.html`, and returns the lines of the table.

    Args:
      states: states of the runs that have been started, by name.
      metric: to sort by; None for the first one that evaluators have recorded.
    """
    records = [
        read_run(workdir / trial.name, name=trial.name)
        for trial in trials
        if (workdir / trial.name / CONFIG).exists()
    ]
    metric = metric or next((key for record in records for key in record.results), None)
    records = sort_records(records, metric)
    found = {record["run"]: record for record in make_records(records)}
    overrides = {trial.name: trial.overrides for trial in trials}
    runs = [
        {"run": name, "state": dict(states.get(name, {})), "overrides": overrides[name]}
        | found.get(name, {})
        for name in dict.fromkeys([*found, *overrides])
    ]
    content = json.dumps({"metric": metric, "runs": runs}, indent=1, default=repr) + "\n"
    write_atomically(workdir / RESULTS, content)
    if records:
        write_atomically(workdir / "sweep.csv", make_csv(list(found.values())))
        write_atomically(workdir / "sweep.html", make_html(records))
    rows = [("run", "state", "step", metric or "", "best", "images/s")]
    for run in runs:
        last, best = run.get("last", {}).get(metric), run.get("best", {}).get(metric, {})
        speed = run.get("images_per_sec")
        rows.append(
            (
                run["run"],
                run["state"].get("status", "not started" if run["run"] not in found else "-"),
                "" if run.get("step") is None else f"{run['step']:,} of {run['total_steps']:,}",
                "" if last is None else f"{last:.4f}",
                f"{best['value']:.4f} at {best['step']:,}" if best else "",
                "" if speed is None else f"{speed:,.0f}",
            )
        )
    return show_table(rows)


def emit(trials: Sequence[Trial], form: str, launch_args: Sequence[str]) -> list[str]:
    """The command of each run, for this machine (`commands`), `slurm` or `gke`; see `launch/`."""
    lines = []
    for number, trial in enumerate(trials, 1):
        if form == "slurm":
            name = f"--job-name={trial.name}"
            command = ["sbatch", name, *launch_args, "launch/slurm/train.sbatch"]
        elif form == "gke":
            name = _name_jobset(trial.name, number)
            command = ["python", "-m", "vit_jax.launch.gke", name, *launch_args, "--"]
        else:
            command = ["python", "-m", "vit_jax.main"]
        lines.append(shlex.join([*command, *trial.arguments]))
    return lines


def _name_jobset(name: str, number: int) -> str:
    """A name of at most 40 small letters, digits and hyphens, which starts with a letter."""
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32].strip("-")
    return f"s{number}-{text}"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments, without overrides; raises `UserError` if they exclude each other."""
    parser = CommandParser(prog="python -m vit_jax.sweep", description=__doc__)
    add = parser.add_argument
    add("--config", required=True, help="Train this config: a file or a name, as in vit_jax.main.")
    add(
        "--sweep",
        required=True,
        action="append",
        metavar="AXES",
        help="Take the values of these axes: KEY=VALUE,VALUE, with ; between several keys, or a "
        "file with get_sweep. Repeat the option for a grid of all of them.",
    )
    add_workdir(parser, "Make a workdir for each run in this folder.", type=local_path)
    add(
        "--metric",
        help="Sort the table by this metric, such as val/top1. The default is the first one.",
    )
    add(
        "--emit",
        choices=("commands", "slurm", "gke"),
        help="Print the command of each run, for this machine or a cluster, and run nothing.",
    )
    add(
        "--launch_args",
        default="",
        help="Pass these options to sbatch or vit_jax.launch.gke, with --emit.",
    )
    add("--summarize", action="store_true", help="Make the table of the runs and run nothing.")
    add(
        "--no_check",
        action="store_true",
        help="Skip the check of all configs, for data that is on another machine.",
    )
    parser.add_parts()
    args = parser.parse_args(argv)
    parser.require_workdir(args.workdir)
    if args.emit and args.summarize:
        raise UserError(f"--emit={args.emit} and --summarize: expected one of them")
    if args.launch_args and args.emit not in ("slurm", "gke"):
        raise UserError(f"--launch_args={args.launch_args}: expected --emit=slurm or gke with it")
    if (args.workdir / CONFIG).is_file():
        raise UserError(
            f"--workdir={args.workdir} is the workdir of a run; expected a folder for the workdirs "
            f"of all runs, such as {str(args.workdir.parent / 'sweep')!r}"
        )
    return args


def main(argv: Sequence[str]) -> int:
    """Runs a sweep, and returns the exit code."""
    overrides, rest = parse_overrides(list(argv))
    args = parse_arguments(rest)
    set_up(quiet=False, to_stderr=args.emit is not None)
    trust_parts(args.parts)
    trials = make_trials(args.config, args.sweep, overrides, args.workdir, parts=args.parts)
    if not args.no_check and not args.summarize:
        check_trials(trials, args.workdir)
    if not args.emit and not args.summarize:
        start_server(_PRELOADED)
    if args.emit:
        for line in emit(trials, args.emit, shlex.split(args.launch_args)):
            print_result(printable(line))
        return 0
    code = 0 if args.summarize else run_sweep(trials, args.workdir, metric=args.metric)
    for line in write_results(trials, read_states(args.workdir), args.workdir, metric=args.metric):
        log(line)
    log(f"results are in {args.workdir / RESULTS}")
    return code


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; the same command resumes with what is not finished")
