# SPDX-License-Identifier: Apache-2.0
"""Compares the results of several runs: as records, a table, CSV and a page."""

import csv
import dataclasses
import io
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.checkpoint.workdir import read_config
from vit_jax.observe.console import log
from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.ledger import read_ledger, summarize
from vit_jax.pages.chart import Curve, plot_curves
from vit_jax.pages.html import make_card, make_page, make_section, make_table
from vit_jax.pages.run_page import Points, collect_points, find_best
from vit_jax.utils.errors import UserError
from vit_jax.utils.metrics import describe_metric, format_value, lower_is_better
from vit_jax.utils.nested import flatten_config
from vit_jax.utils.text import printable

PAGE = "index.html"
_SPEED = "perf/images_per_sec"
_CURVES = ("train/loss", "train/lr", _SPEED)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The results and the config of a run.

    Attributes:
      name: name that distinguishes the run from the others.
      step: last step of the ledger; None without a ledger, as `total` is.
      points: pairs of step and value by metric.
      config: values by dotted key.
    """

    name: str
    step: int | None
    total: int | None
    points: Mapping[str, Points]
    config: Mapping[str, Any]

    @property
    def results(self) -> list[str]:
        """The names of the metrics of evaluators."""
        return [k for k in self.points if not k.startswith(("train/", "perf/", "data/"))]

    @property
    def images_per_sec(self) -> float | None:
        """The median speed over all records; None without one."""
        points = self.points.get(_SPEED)
        return statistics.median(y for _, y in points) if points else None


def read_run(workdir: Path, *, name: str) -> RunRecord:
    """Reads the files of a run; raises `UserError` if the folder is not the workdir of one."""
    config = flatten_config(read_config(workdir))
    summary = summarize(read_ledger(workdir))
    points = collect_points(read_metrics(workdir))
    points = {key: values for key, values in points.items() if not key.endswith("count")}
    step, total = (summary.step, summary.total) if summary else (None, None)
    return RunRecord(name, step, total, points, config)


def read_runs(workdirs: Sequence[Path]) -> list[RunRecord]:
    """Reads several runs and names each by its path below the folder that all have in common.

    Files among the folders, such as the tables of a sweep in `runs/sweep/*`, are left out with a
    note.

    Raises:
      UserError: a folder is not the workdir of a run, or is given twice.
    """
    files = [path for path in workdirs if path.is_file()]
    if 0 < len(files) < len(workdirs):
        log(f"left out, since they are files: {', '.join(map(str, files))}")
        workdirs = [path for path in workdirs if path not in files]
    paths = [Path(os.path.abspath(path)) for path in workdirs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UserError(f"{workdirs[i]} is given twice; expected each run once")
    root = os.path.commonpath([path.parent for path in paths])
    names = [printable(os.path.relpath(path, root)) for path in paths]
    return [read_run(path, name=name) for path, name in zip(workdirs, names, strict=True)]


def find_differences(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the config keys whose values differ between runs, sorted."""
    keys = sorted({key for run in runs for key in run.config})
    return [k for k in keys if any(run.config.get(k) != runs[0].config.get(k) for run in runs)]


def make_records(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Makes an object for each run: `run, step, total_steps, images_per_sec, last, best, config`.

    `best` holds value and step of each metric; `config` holds the keys that differ between runs.
    """
    keys = find_differences(runs)
    records = []
    for run in runs:
        best = {key: find_best(key, run.points[key]) for key in run.results}
        records.append(
            {
                "run": run.name,
                "step": run.step,
                "total_steps": run.total,
                "images_per_sec": run.images_per_sec,
                "last": {key: run.points[key][-1][1] for key in run.results},
                "best": {key: {"value": v, "step": int(step)} for key, (step, v) in best.items()},
                "config": {key: run.config.get(key) for key in keys},
            }
        )
    return records


def make_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Formats records as CSV with columns `METRIC`, `best METRIC` and `config.KEY`."""
    rows = [
        {k: record[k] for k in ("run", "step", "total_steps", "images_per_sec")}
        | record["last"]
        | {f"best {key}": best["value"] for key, best in record["best"].items()}
        | {f"config.{key}": _text(value) for key, value in record["config"].items()}
        for record in records
    ]
    stream = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def make_rows(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Makes the rows of a table with a column for each run; the first row has their names."""
    rows = [("", *(str(record["run"]) for record in records))]
    steps = [(record["step"], record["total_steps"]) for record in records]
    rows.append(("step", *("" if s is None else f"{s:,} of {total:,}" for s, total in steps)))
    for key in dict.fromkeys(key for record in records for key in record["last"]):
        last = [record["last"].get(key) for record in records]
        rows.append((key, *_mark(key, last)))
        best = [record["best"].get(key, {}).get("value") for record in records]
        if best != last:
            rows.append((f"{key}, best", *_mark(key, best)))
    speeds = [record["images_per_sec"] for record in records]
    rows.append(("images/s", *("" if s is None else f"{s:,.0f}" for s in speeds)))
    for key in records[0]["config"]:
        rows.append((f"config.{key}", *(_text(record["config"][key]) for record in records)))
    return rows


def _mark(key: str, values: Sequence[float | None]) -> list[str]:
    """Formats the values of a metric, with a star at the best of several."""
    known = [value for value in values if value is not None]
    choose = min if lower_is_better(key) else max
    best = choose(known) if len(set(known)) > 1 else None
    return [
        "" if value is None else format_value(key, value) + " *" * (value == best)
        for value in values
    ]


def _text(value: Any) -> str:
    return printable(value) if isinstance(value, str) else json.dumps(value)


def make_html(runs: Sequence[RunRecord]) -> str:
    """Makes a page of the table and of charts that show the curves of all runs."""
    header, *rows = make_rows(make_records(runs))
    table = make_card(
        "", make_table(header, rows), caption="A star marks the best value.", wide=True
    )
    cards = []
    for key in dict.fromkeys(key for run in runs for key in (*_CURVES, *run.results)):
        curves = [Curve(r.name, r.points[key], i) for i, r in enumerate(runs) if key in r.points]
        # A single point is in the table.
        if any(len(curve.points) > 1 for curve in curves):
            what = describe_metric(key)
            chart = plot_curves(
                curves, label=f"{key} by step", y=what.label, is_share=what.is_share
            )
            cards.append(make_card(key, chart))
    title = ", ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    sections = [make_section("Results", [table]), make_section("Curves", cards, layout="charts")]
    return make_page(f"Compared: {title}", (), sections)


def show_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats rows of text as lines with aligned columns."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
