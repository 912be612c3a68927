# SPDX-License-Identifier: Apache-2.0
r"""Trains a config with several settings, one run after another, and compares the results.

The file of --sweep has a function get_sweep. It gives a dict of lists by config key, of which all
combinations are run, or a list of dicts by config key, one for each run; "name" in such a dict is
that of its folder. --config.KEY=VALUE holds for all runs. Given again, the command leaves out what
is finished and goes on with the rest. The table at the end is in WORKDIR/sweep.csv, .json and .html
too.

The exit code is 2 for bad input, before anything runs; 1 if a run failed, while the others went on;
75 if it was told to stop, and is to be run again.

Examples:
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
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

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
from vit_jax.runtime.preemption import RUN_AGAIN
from vit_jax.training.experiment import Experiment
from vit_jax.utils.bounds import MAX_TABLE, read_json
from vit_jax.utils.command import CommandParser, run_command
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.files import write_atomically
from vit_jax.utils.layout import CONFIG
from vit_jax.utils.metrics import lower_is_better
from vit_jax.utils.registry import trust_parts
from vit_jax.utils.signals import INTERRUPTED
from vit_jax.utils.streams import print_result
from vit_jax.utils.text import printable

RESULTS = "sweep.json"
_NAME = re.compile(r"[\w+-][\w.,=+-]*")
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


def read_sweep(path: str) -> list[tuple[str, dict[str, Any]]]:
    """The names and overrides of all runs of a sweep file.

    Raises:
      UserError: the file is missing or fails, or its result is not valid.
    """
    if not Path(path).is_file():
        raise UserError(f"--sweep={path}: there is no such file")
    try:
        sweep = runpy.run_path(path)["get_sweep"]()
    except Exception as e:
        raise UserError(f"--sweep={path}: {describe_error(e)}") from e
    if isinstance(sweep, Mapping):
        for key, values in sweep.items():
            if not isinstance(key, str) or not isinstance(values, list | tuple) or not values:
                raise UserError(f"--sweep={path}: {key!r}: {values!r}; expected a list of values")
        count = math.prod(map(len, sweep.values()))
        if count > _MOST_RUNS:
            raise UserError(f"--sweep={path}: {count:,} runs; expected {_MOST_RUNS:,} at most")
        combinations = itertools.product(*sweep.values())
        trials = [dict(zip(sweep, values, strict=True)) for values in combinations]
        trials = trials if sweep else []
    else:
        trials = list(sweep) if isinstance(sweep, list | tuple) else []
    if not trials or not all(isinstance(trial, Mapping) for trial in trials):
        raise UserError(
            f"--sweep={path}: get_sweep gives {sweep!r}; expected a dict of lists by config key, "
            "or a list of dicts by config key"
        )
    named = [_name_trial(dict(trial), path, trials) for trial in trials]
    name, count = Counter(name for name, _ in named).most_common(1)[0]
    if count > 1:
        raise UserError(f"--sweep={path}: two runs are {name!r}; expected each once")
    return named


def _name_trial(
    trial: dict[str, Any], path: str, trials: Sequence[Mapping[str, Any]]
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
            f"--sweep={path}: {given!r} can't be the name of a folder: expected letters, digits "
            f"and any of . , = + - _, at most {_LONGEST}; set it by 'name' in a list of dicts"
        )
    return given, trial


def make_trials(
    config: str, sweep: str, overrides: Mapping[str, Any], workdir: Path, *, parts: str = ""
) -> list[Trial]:
    """The runs of a sweep, by the values of --config, --sweep and --parts.

    Overrides of a single run take precedence over those of all runs, `overrides`.

    Raises:
      UserError: a file is missing or wrong, or a key is below a value.
    """
    trials = []
    for name, own in read_sweep(sweep):
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


def check_trials(trials: Sequence[Trial]) -> None:
    """Builds the experiment of each run, without its mesh, on the CPU.

    Raises:
      UserError: a config is wrong; the message names the run.
    """
    # Accelerators are not initialized here, since that would take the memory of the runs.
    jax.config.update("jax_platforms", "cpu")
    for trial in trials:
        try:
            Experiment.from_config(without_mesh(trial.config))
        except UserError as e:
            raise UserError(f"{trial.name}: {e}") from e


def run_trial(trial: Trial) -> int:
    """Trains in a subprocess, and returns its exit code.

    SIGTERM, Ctrl-C and the end of the terminal are passed on; then the code is one of a run that
    was told to stop, even if it ended on its own meanwhile.
    """
    received: list[int] = []
    processes: list[subprocess.Popen] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        command = [sys.executable, "-m", "vit_jax.main", *trial.arguments]
        # In a session of its own: a terminal sends Ctrl-C to all processes of one, and the second
        # that a run receives ends it at once.
        processes.append(subprocess.Popen(command, start_new_session=True))
        for number in received:
            processes[0].send_signal(number)
        code = processes[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return INTERRUPTED if received[0] == signal.SIGINT else RUN_AGAIN
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
    add("--config", required=True, help="config file, as for vit_jax.main")
    add("--sweep", required=True, help="file with get_sweep")
    add("--workdir", required=True, type=Path, help="of all runs")
    add("--metric", help="to sort by, such as val/top1; the first there is")
    add("--emit", choices=("commands", "slurm", "gke"), help="print the commands, run nothing")
    add("--launch_args", default="", help="of --emit: options of sbatch, or of vit_jax.launch.gke")
    add("--summarize", action="store_true", help="only make the table")
    add("--no_check", action="store_true", help="do not check the configs: the data is elsewhere")
    parser.add_parts()
    args = parser.parse_args(argv)
    if args.emit and args.summarize:
        raise UserError(f"--emit={args.emit} and --summarize: expected one of them")
    if args.launch_args and args.emit not in ("slurm", "gke"):
        raise UserError(f"--launch_args={args.launch_args}: expected --emit=slurm or gke with it")
    return args


def main(argv: Sequence[str]) -> int:
    """Runs a sweep, and returns the exit code."""
    overrides, rest = parse_overrides(list(argv))
    args = parse_arguments(rest)
    set_up(quiet=False, to_stderr=args.emit is not None)
    trust_parts(args.parts)
    trials = make_trials(args.config, args.sweep, overrides, args.workdir, parts=args.parts)
    if not args.no_check and not args.summarize:
        check_trials(trials)
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
