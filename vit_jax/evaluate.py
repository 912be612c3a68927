# SPDX-License-Identifier: Apache-2.0
r"""Evaluates checkpoints: one of a run, one of others, or all that a run writes, as it writes them.

The evaluators are those of the config, which is the workdir's own or that of --config.

Examples:
  python -m vit_jax.evaluate runs/digits
  python -m vit_jax.evaluate --workdir=runs/digits --checkpoint=4000 --details
  python -m vit_jax.evaluate --workdir=runs/digits --follow
  python -m vit_jax.evaluate --workdir=runs/digits --config.evals.near.name=knn \
      --config.evals.near.train_split=train --config.evals.near.split=test \
      --config.evals.near.preprocess='decode|resize(16)'
  python -m vit_jax.evaluate --config=configs/vit.py:b16,imagenet2012 \
      --init_from=augreg+imagenet2012:B/16@384 --output=b16.jsonl
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.workdir import is_workdir, read_config, write_temperature
from vit_jax.config.load import find_file, load_config, parse_overrides
from vit_jax.observe.console import log, log_lines, set_up
from vit_jax.observe.jsonl import append_record, read_records
from vit_jax.observe.ledger import is_complete_early, read_ledger
from vit_jax.utils.command import (
    CommandParser,
    add_workdir,
    local_path,
    print_error,
    run_command,
)
from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import CHECKPOINTS, CONFIG, EVALS, RESULTS, TEMPERATURE
from vit_jax.utils.mirrors import refresh, upload
from vit_jax.utils.nested import flatten_config
from vit_jax.utils.registry import trust_parts
from vit_jax.utils.signals import importing
from vit_jax.utils.streams import print_result

if TYPE_CHECKING:
    from vit_jax.training.evaluation import Judge
    from vit_jax.training.experiment import Experiment

# Seconds between two looks into the workdir, and what the removal of a checkpoint may take.
_POLL = 2.0
_REMOVAL = 10.0


class FollowTimeoutError(Exception):
    """There is no new checkpoint for too long."""


def follow(
    judge: "Judge",
    workdir: Path,
    output: Path,
    *,
    total: int,
    timeout: float,
    report: Callable[[dict[str, Any]], None],
) -> int:
    """Evaluates the checkpoints of a run as another process writes them, each once.

    Steps that `output` has with all evaluators and the same changes are not evaluated again. The
    run is complete after the step `total`, or where it ended early. `report` takes the record of
    each checkpoint.

    Returns:
      The step of the newest checkpoint.

    Raises:
      FollowTimeoutError: there is no new checkpoint for `timeout` seconds.
    """
    done = {
        record["step"]
        for record in read_records(output)
        if isinstance(record.get("step"), int)
        and record.get("changes", {}) == judge.changes
        and judge.names <= {key.partition("/")[0] for key in record}
    }
    since = time.monotonic()
    while True:
        newest = max(done, default=0)
        refresh(workdir)
        # Before the checkpoints are listed, since the last one comes before the end.
        ended = newest >= total or is_complete_early(read_ledger(workdir))
        todo = [step for step in list_steps(workdir) if step not in done]
        if todo:
            # The oldest first: it will be removed first.
            done.add(todo[0])
            _follow_step(judge, workdir / CHECKPOINTS / str(todo[0]), report)
            since = time.monotonic()
        elif ended:
            return newest
        elif time.monotonic() - since > timeout:
            raise FollowTimeoutError(
                f"no new checkpoint in {workdir / CHECKPOINTS} for {timeout:g} s; the newest is of "
                f"step {newest} of {total}"
            )
        else:
            time.sleep(_POLL)


def _follow_step(
    judge: "Judge", checkpoint: Path, report: Callable[[dict[str, Any]], None]
) -> None:
    try:
        loaded = judge.load(str(checkpoint))
    except UserError:
        # Removing takes a while, and a checkpoint that is partly removed can't be read.
        until = time.monotonic() + _REMOVAL
        while checkpoint.exists() and time.monotonic() < until:
            time.sleep(_REMOVAL / 100)
            refresh(checkpoint)
        if checkpoint.exists():
            raise
        log(f"{checkpoint} was removed before it was evaluated")
        return
    report(judge.record(str(checkpoint), loaded))


def try_to_append(path: Path, record: Mapping[str, Any]) -> str | None:
    """Appends a record to a file; returns why it can't be written, None if it was."""
    try:
        append_record(path, record)
        upload(path)
    except OSError as e:
        return e.strerror
    return None


def show(record: Mapping[str, Any]) -> list[str]:
    """A record as the lines of a table: a metric a line, by raw parameters and by their average."""
    table: dict[str, dict[str, Any]] = {}
    for key, value in record.items():
        name, slash, metric = key.partition("/")
        if slash:
            column = "average" if name.endswith("_ema") else "parameters"
            table.setdefault(f"{name.removesuffix('_ema')}/{metric}", {})[column] = value
    columns = [c for c in ("parameters", "average") if any(c in row for row in table.values())]
    width = max(map(len, table), default=0)
    lines = [f"{record['checkpoint']}", " ".join([" " * width, *(f"{c:>11}" for c in columns)])]
    for metric, row in table.items():
        cells = [_format(row[c]) if c in row else "" for c in columns]
        lines.append(" ".join([f"{metric:<{width}}", *(f"{cell:>11}" for cell in cells)]))
    return lines


def _format(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if value < 1e-3 else f"{value:.4f}"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments, without overrides of the config.

    Raises:
      UserError: they don't go together.
    """
    parser = CommandParser(prog="python -m vit_jax.evaluate", description=__doc__)
    add = parser.add_argument
    add_workdir(parser, "Evaluate the run of this workdir.")
    add(
        "--config",
        help="Use the evaluators of this config in place of that of the workdir. "
        "--config.KEY=VALUE overrides a key of either.",
    )
    add(
        "--checkpoint",
        help="Evaluate the checkpoint of this step of the run, or its `last` or `best` one, or the "
        "checkpoint at this path. The default is last.",
    )
    add(
        "--init_from",
        help="Evaluate these weights, given as in a config: a file, a URL, or a name that "
        "`vit_jax models` lists.",
    )
    add("--json", action="store_true", help="Print a JSON object a line, not a table.")
    add(
        "--output",
        type=local_path,
        help=f"Append the results to this file. The default is WORKDIR/{RESULTS}.",
    )
    add(
        "--details",
        action="store_true",
        help=f"Write results by class and other details to WORKDIR/{EVALS} too.",
    )
    add(
        "--keep_temperature",
        action="store_true",
        help="Write the temperature that an evaluator `trust` fits to the workdir, for "
        "probabilities of predict, serve and export.",
    )
    add(
        "--follow",
        action="store_true",
        help="Evaluate each checkpoint of a run as it is written, to the end of the run.",
    )
    add(
        "--timeout",
        type=float,
        default=3600,
        metavar="SECONDS",
        help="Stop --follow after so long without a new checkpoint. The default is %(default)s.",
    )
    parser.add_parts()
    args = parser.parse_args(argv)
    if args.workdir is None and args.config is None:
        raise UserError("--workdir and --config are missing: expected one of them, or both")
    if args.workdir is None and not (args.init_from or args.checkpoint):
        raise UserError("--workdir, --checkpoint and --init_from are missing: expected one of them")
    if args.init_from and args.checkpoint:
        raise UserError(
            f"--init_from={args.init_from} and --checkpoint={args.checkpoint}: expected one of them"
        )
    if args.follow and (args.workdir is None or args.init_from or args.checkpoint):
        raise UserError("--follow: expected --workdir, and no --checkpoint or --init_from")
    if args.keep_temperature and (args.workdir is None or args.init_from or args.follow):
        raise UserError(
            "--keep_temperature: expected --workdir, to which it is written, and no --init_from or "
            "--follow"
        )
    if args.details and args.workdir is None:
        raise UserError("--details: expected --workdir, in which to write them")
    if args.config is not None:
        find_file(args.config)
    elif args.workdir is not None and not args.follow and not is_workdir(args.workdir):
        read_config(args.workdir)  # Raises, before seconds of imports.
    return args


def make_experiment(args: argparse.Namespace, overrides: dict[str, Any]) -> "Experiment":
    """The experiment of --config or of the workdir, with what only training needs left out.

    Raises:
      UserError: there is no config, it is wrong, or it has no evaluator.
    """
    from vit_jax.training.evaluation import make_evaluation

    if args.config:
        config = load_config(args.config, {}).to_dict()
    else:
        until = time.monotonic() + (args.timeout if args.follow else 0)
        while not (args.workdir / CONFIG).exists() and time.monotonic() < until:
            time.sleep(_POLL)
            refresh(args.workdir)
        try:
            config = read_config(args.workdir)
        except UserError as e:
            raise UserError(f"{e}; or add --config") from None
    return make_evaluation(config, overrides)


def find_changes(
    workdir: Path | None, experiment: "Experiment", overrides: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Returns, by evaluator, the config keys whose values are not those of the run, as in JSON.

    Only what decides the results counts: data, preprocessing, model and objective. An evaluator
    that the run has not is compared by all keys but its own.
    """
    if workdir is None or not (workdir / CONFIG).exists():
        return {}
    before, now = (
        flatten_config(json.loads(json.dumps(config)))
        for config in (read_config(workdir), experiment.config)
    )
    # Keys that only the newer config has are defaults, unless they were given.
    known = before.keys() | overrides.keys()
    changed = {k: v for k, v in now.items() if k in known and before.get(k) != v}
    changes = {}
    for evaluator in experiment.evaluators:
        own = f"evals.{evaluator.name}."
        prefixes = ["model.", "objective.", "adapt.", "precision"]
        if evaluator.data.name == experiment.train_data.name:
            prefixes.append("data.name")
        if any(key.startswith(own) for key in before):
            prefixes.append(own)
        ignored = (f"{own}every", f"{own}batch_size")
        keys = {
            key: value
            for key, value in changed.items()
            if key.startswith(tuple(prefixes)) and not key.startswith(ignored)
        }
        if keys:
            changes[evaluator.name] = keys
    return changes


def find_trust(experiment: "Experiment") -> str:
    """The name of the one evaluator that fits a temperature to the logits of a softmax.

    Raises:
      UserError: there is none, or several, or the loss is another.
    """
    names = [e.name for e in experiment.evaluators if "temperature" in e.metrics]
    if len(names) != 1:
        raise UserError(
            f"--keep_temperature: {len(names)} evaluators fit one: expected one, such as "
            "--config.evals.fit.name=trust with its split and preprocess"
        )
    if experiment.config["objective"].get("loss") == "sigmoid":
        raise UserError(
            "--keep_temperature: objective.loss='sigmoid': expected 'softmax', whose logits a "
            "temperature is fitted to"
        )
    return names[0]


def keep_temperature(workdir: Path, name: str, record: Mapping[str, Any], data: str) -> None:
    """Writes the temperatures of a record of one checkpoint of the run to its workdir.

    Raises:
      UserError: the weights are no checkpoint of the run.
    """
    from vit_jax.evaluators.metrics import TEMPERATURES

    if record["step"] is None:
        raise UserError(
            f"--checkpoint={record['checkpoint']} --keep_temperature: expected a checkpoint of "
            f"{workdir}"
        )
    keys = {"raw": f"{name}/temperature", "ema": f"{name}_ema/temperature"}
    fitted = {params: record[key] for params, key in keys.items() if key in record}
    write_temperature(workdir, record["step"], fitted, data)
    for value in fitted.values():
        if any(math.isclose(value, limit, rel_tol=1e-3) for limit in TEMPERATURES):
            log(
                f"warning: {workdir / TEMPERATURE}: {value:g} is the limit of the search: this "
                "split is too small, or hardly related to the logits; probabilities would be "
                "near uniform or near 0 and 1"
            )
    upload(workdir / TEMPERATURE)


def main(argv: Sequence[str]) -> int:
    """Evaluates, shows the results and appends them to a file; returns the exit code."""
    overrides, rest = parse_overrides(list(argv))
    args = parse_arguments(rest)
    trust_parts(args.parts)
    set_up(quiet=False, to_stderr=args.json)
    with importing():
        from vit_jax.training.evaluation import Judge, find_source
    output = args.output or (args.workdir / RESULTS if args.workdir else None)

    def report(record: dict[str, Any]) -> None:
        unwritten = None if output is None else try_to_append(output, record)
        if args.json:
            print_result(json.dumps(record))
        elif output is None:
            print_result("\n".join(show(record)))
        else:
            log_lines(show(record))
        if unwritten is not None:  # The results have been shown.
            raise UserError(f"--output={output} can't be written ({unwritten})")

    source = None if args.follow else find_source(args)
    experiment = make_experiment(args, overrides)
    changes = find_changes(args.workdir, experiment, overrides)
    judge = Judge(experiment, workdir=args.workdir, details=args.details, changes=changes)
    trust = find_trust(experiment) if args.keep_temperature else None
    if source is not None:
        record = judge.record(source, judge.load(source))
        report(record)
        if trust is not None:
            data = next(e.data for e in experiment.evaluators if e.name == trust)
            keep_temperature(args.workdir, trust, record, f"{data.split} of {data}")
    else:
        assert output is not None  # --follow comes with --workdir
        total = experiment.total_steps
        try:
            last = follow(
                judge, args.workdir, output, total=total, timeout=args.timeout, report=report
            )
        except FollowTimeoutError as e:
            print_error(e)
            return 1
        log(f"{args.workdir} is complete at step {last}")
    if output is not None:
        log(f"results are in {output}")
    if args.details:
        log(f"details are in {args.workdir / EVALS}")
    return 0


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; the results so far are recorded")
