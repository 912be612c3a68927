# SPDX-License-Identifier: Apache-2.0
"""The page of a run, `WORKDIR/report.html`, made only of files in its workdir."""

import csv
import dataclasses
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.checkpoint.workdir import read_run
from vit_jax.config.load import list_modules
from vit_jax.observe.console import log
from vit_jax.observe.jsonl import iterate_metrics
from vit_jax.observe.ledger import KINDS, read_ledger, summarize
from vit_jax.pages.chart import Curve, plot_curves, plot_matrix, plot_reliability
from vit_jax.pages.html import (
    make_bars,
    make_card,
    make_command,
    make_details,
    make_figure,
    make_page,
    make_section,
    make_table,
    make_tiles,
)
from vit_jax.utils.bounds import MAX_TABLE, check_count, read_json, read_text
from vit_jax.utils.errors import describe_error
from vit_jax.utils.files import write_atomically
from vit_jax.utils.layout import CHECK, CONFIG, DUPLICATES, EVALS, LABEL_ERRORS, REPORT
from vit_jax.utils.metrics import describe_metric, format_value, lower_is_better
from vit_jax.utils.nested import flatten_config
from vit_jax.utils.text import escape_html

# Most classes of a confusion matrix; with more, the most frequent confusions are listed.
_MAX_CLASSES = 50
_PAIRS = 20
_MAX_LABEL = 2**20
_GROUPS = ("parameters", "arrays", "values", "weight decay", "learning rate")
_MAX_CHARTS = 24
# Pictures of each evaluator, their bytes, and their width in pixels of the page, at most.
_MAX_PICTURES, _MAX_PICTURE, _PICTURE_WIDTH = 4, 2**23, 1024
# Tables of `data.check`, and how many of their rows are shown.
_CHECKS, _CHECKED = {LABEL_ERRORS: "Likely label errors", DUPLICATES: "Duplicates"}, 20
# Metrics without a chart: counts, and those that another curve shows.
_NOT_DRAWN = ("count", "real_count", "step_ms", "first_step_s")
# Accuracies at the head of the page; runs with more of them have a table below.
_MAX_TILES = 4
# What the kinds of time in the ledger are.
_TIMES = {
    "step": "training steps",
    "compile": "start and compilation",
    "data_wait": "waiting for images",
    "save": "saving checkpoints",
    "evaluation": "evaluation",
    "repeated": "steps taken again",
    "down": "between a stop and the next start",
}

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Statistics of the predictions for a split.

    Attributes:
      title: name of the split, and step.
      bins: confidence, accuracy and count of each bin of confidence; empty if not known.
      confusion: non-zero counts by label and prediction; empty if not known.
    """

    title: str
    names: Sequence[str]
    bins: Sequence[tuple[float, float, int]] = ()
    confusion: Mapping[tuple[int, int], int] = dataclasses.field(default_factory=dict)


def refresh_report(workdir: Path) -> None:
    """Rewrites the page of a run. Errors are logged and do not end the run."""
    try:
        write_atomically(workdir / REPORT, make_report(workdir))
    except Exception as e:  # A page must not end a run.
        log(f"{workdir / REPORT} can't be written ({describe_error(e)}): continues without it")


def make_report(
    workdir: Path, *, predictions: Sequence[Predictions] = (), sections: Sequence[str] = ()
) -> str:
    """Makes the page of a run as HTML.

    Args:
      predictions: statistics that are added to those in its files; equal titles replace them.
      sections: HTML of sections to add after the predictions.
    """
    points, run = collect_points(iterate_metrics(workdir)), _check_run(read_run(workdir))
    known = {one.title: one for one in [*read_details(workdir), *predictions]}
    config = _read_config(workdir)
    body = [
        make_tiles(_find_tiles(points)),
        make_section("Results", _show_results(points)),
        make_section("Curves", _show_curves(points), layout="charts"),
        make_section("Predictions", _show_predictions(known.values()), layout="pairs"),
        make_section("Masks", _show_masks(workdir)),
        make_section("Depth", _show_depths(workdir)),
        make_section("Pictures", _show_pictures(workdir)),
        *sections,
        make_section("Data", _show_check(workdir)),
        make_section("Time", _show_time(workdir)),
        make_section("Parameters", _show_params(run)),
        make_section("Commands", _show_commands(workdir, run, config)),
        make_section("Config", _show_config(config)),
    ]
    return make_page(str(workdir), _describe(workdir, run), body)


def collect_points(records: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """Collects pairs of step and value by metric, in the order of the first records."""
    found: dict[str, Points] = {}
    for record in records:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(key, []).append((record["step"], float(value)))
    return found


def find_best(key: str, points: Points) -> tuple[float, float]:
    """Finds the step and the value of the best point of a metric; the first of equal ones."""
    sign = -1 if lower_is_better(key) else 1
    return max(points, key=lambda point: (sign * point[1], -point[0]))


def _find_details(workdir: Path) -> list[tuple[str, Path]]:
    """The title and the file of each evaluator's newest evaluation with details."""
    newest: dict[str, tuple[int, Path]] = {}
    for path in (workdir / EVALS).glob("*.json"):
        match = re.fullmatch(r"(.+)_(\d+)", path.stem)
        if match and int(match[2]) >= newest.get(match[1], (0, path))[0]:
            newest[match[1]] = (int(match[2]), path)
    return [(f"{name}, step {step:,}", path) for name, (step, path) in sorted(newest.items())]


def read_details(workdir: Path) -> list[Predictions]:
    """Reads the details of each evaluator's newest evaluation; damaged ones are left out."""
    found = []
    for title, path in _find_details(workdir):
        try:
            found += _read_details(path, title)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as e:
            log(f"{path} can't be read ({describe_error(e)}): left out")
    return found


def _read_details(path: Path, title: str) -> list[Predictions]:
    """Reads the details of an evaluation; none if it was not of a classifier."""
    content = read_json(path, max_bytes=MAX_TABLE)
    if not isinstance(content, dict) or "classes" not in content:
        return []
    rows = content.get("calibration", ())
    bins = [(float(row["confidence"]), float(row["accuracy"]), int(row["count"])) for row in rows]
    names = [str(c["name"] or c["label"]) for c in content["classes"]]
    table = path.with_name(f"{path.stem}_confusion.csv")
    confusion: dict[tuple[int, int], int] = {}
    if table.exists():
        for row in csv.DictReader(read_text(table, max_bytes=MAX_TABLE).splitlines()):
            label, predicted = int(row["label"]), int(row["predicted"])
            for number in (label, predicted):
                check_count(number, _MAX_LABEL, "a label")
            confusion[label, predicted] = int(row["count"])
    return [Predictions(title, names, bins, confusion)]


# What run.json has of each kind; other values are of another program, or damaged.
_RUN_KINDS = {
    "versions": dict,
    "devices": dict,
    "git": str,
    "started": str,
    "command": str,
    "params": list,
    "groups": list,
}


def _check_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is known of a run, without values of other kinds than those of `_RUN_KINDS`."""
    known = {k: v for k, v in run.items() if isinstance(v, _RUN_KINDS.get(k, ()))}
    known["params"] = [row for row in known.get("params", ()) if _is_param(row)]
    known["groups"] = [row for row in known.get("groups", ()) if isinstance(row, list)]
    known["groups"] = [row for row in known["groups"] if len(row) == len(_GROUPS)]
    return known


def _is_param(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("path"), str)
        and isinstance(row.get("shape"), list)
        and all(type(n) is int and 0 <= n < 2**48 for n in row["shape"])
    )


def _describe(workdir: Path, run: Mapping[str, Any]) -> list[str]:
    """Lines below the heading: progress, versions and devices."""
    lines, summary = [], summarize(read_ledger(workdir))
    if summary is not None:
        ended = len(summary.causes) == summary.starts
        state = f"ended: {summary.causes[-1]}" if ended else "was running when this was written"
        lines.append(f"Step {summary.step:,} of {summary.total:,}; {state}")
    versions = run.get("versions") or {}
    devices = run.get("devices") or {}
    words = [f"{name} {versions[name]}" for name in ("vit_jax", "jax") if versions.get(name)]
    if run.get("git"):
        commit, dash, dirty = run["git"].partition("-")
        words.append(f"commit {commit[:12]}{dash}{dirty}")
    words += [
        f"{count}\N{NO-BREAK SPACE}x\N{NO-BREAK SPACE}{kind}" for kind, count in devices.items()
    ]
    words += [f"started {run['started']}"] if run.get("started") else []
    return [*lines, ", ".join(words)] if words else lines


def _is_result(key: str) -> bool:
    """Whether an evaluator reports a metric."""
    return not key.startswith(("train/", "perf/", "data/")) and not key.endswith("count")


def _find_tiles(points: Mapping[str, Points]) -> list[tuple[str, str]]:
    """The last accuracy or mIoU of each evaluator, with its name."""
    found = []
    for key, values in points.items():
        split, _, metric = key.rpartition("/")
        if metric in ("top1", "miou") and _is_result(key):
            count = points.get(f"{split}/count", [(0, 0)])[-1][1]
            what = "accuracy" if metric == "top1" else "mIoU"
            below = f"{split} {what}" + (f", {count:,.0f} images" if count else "")
            found.append((format_value(key, values[-1][1]), below))
    return found[:_MAX_TILES]


def _show_results(points: Mapping[str, Points]) -> list[str]:
    rows, meanings = [], dict[str, str]()
    for key, values in points.items():
        if not _is_result(key):
            continue
        step, best = find_best(key, values)
        last = format_value(key, values[-1][1])
        rows.append((key, last, format_value(key, best), f"{step:,.0f}"))
        meanings[key.rpartition("/")[2]] = describe_metric(key).meaning
    if not rows:
        return []
    table = make_table(("metric", "last", "best", "at step"), rows)
    notes = "".join(
        f'<p class="soft">{escape_html(f"{name}: {meaning}")}</p>'
        for name, meaning in meanings.items()
        if meaning
    )
    return [make_card("", table + notes, wide=True)]


def _show_curves(points: Mapping[str, Points]) -> list[str]:
    """A chart for each metric, shared by the evaluators that report it.

    What was measured once is no curve: training metrics of that kind are in a table.
    """
    prefixes = {"train": 0}
    charts: dict[str, list[Curve]] = {"loss": [], "top1": [], "lr": []}
    for key, values in points.items():
        prefix, _, metric = key.rpartition("/")
        if metric in _NOT_DRAWN or (metric == "corrupt" and not any(y for _, y in values)):
            continue
        # Metrics of speed and data are not shared by evaluators.
        title = key if prefix in ("perf", "data") else metric
        color = 0 if prefix in ("perf", "data") else prefixes.setdefault(prefix, len(prefixes))
        charts.setdefault(title, []).append(Curve(key, values, color))
    once = [
        curve
        for curves in charts.values()
        if all(len(curve.points) == 1 for curve in curves)
        for curve in curves
    ]
    drawn = [(t, curves) for t, curves in charts.items() if any(len(c.points) > 1 for c in curves)]
    drawn.sort(key=lambda chart: chart[0].startswith(("perf/", "data/")))
    cards = []
    for title, curves in drawn[:_MAX_CHARTS]:
        name, what = curves[0].name if len(curves) == 1 else title, describe_metric(title)
        chart = plot_curves(curves, label=f"{title} by step", y=what.label, is_share=what.is_share)
        caption = f"{title.rpartition('/')[2]}: {what.meaning}" if what.meaning else ""
        cards.append(make_card(name, chart, caption=caption))
    rows = [(c.name, format_value(c.name, y), f"{x:,.0f}") for c in once for x, y in c.points]
    if rows := [row for row in rows if not _is_result(row[0])]:
        cards.append(make_card("Measured once", make_table(("metric", "value", "step"), rows)))
    if len(drawn) > _MAX_CHARTS:
        text = f"{len(drawn) - _MAX_CHARTS} more metrics are in metrics.jsonl."
        cards.append(make_card("", f"<p>{text}</p>"))
    return cards


def _show_predictions(predictions: Iterable[Predictions]) -> list[str]:
    cards = []
    for one in predictions:
        if one.bins:
            chart = plot_reliability(one.bins, label=f"reliability of {one.title}")
            caption = (
                "The accuracy of predictions by their confidence. On the dashed line they are "
                "equal; below it the model is too confident."
            )
            cards.append(make_card(f"Calibration: {one.title}", chart, caption=caption))
        if one.confusion:
            cards.append(_show_confusion(one))
    return cards


def _show_confusion(one: Predictions) -> str:
    title, size = f"Confusion: {one.title}", len(one.names)
    # A head may have more classes than the data.
    size = max(size, *(max(pair) + 1 for pair in one.confusion))
    names = [*one.names, *map(str, range(len(one.names), size))]
    if size <= _MAX_CLASSES:
        counts = [[one.confusion.get((i, j), 0) for j in range(size)] for i in range(size)]
        caption = (
            "The number of images by label and prediction. The stronger the colour, the larger "
            "the share of the label; errors are red."
        )
        return make_card(title, plot_matrix(counts, names, label=title), caption=caption)
    wrong = [(count, pair) for pair, count in one.confusion.items() if pair[0] != pair[1]]
    rows = [
        (names[label], names[predicted], f"{count:,}")
        for count, (label, predicted) in sorted(wrong, key=lambda w: (-w[0], w[1]))[:_PAIRS]
    ]
    return make_card(title, make_table(("label", "predicted", "images"), rows))


def _show_pictures(workdir: Path) -> list[str]:
    """The newest pictures of each evaluator, the last first."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in (workdir / EVALS).glob("*.png"):
        if match := re.fullmatch(r"(.+)_(\d+)", path.stem):
            found.setdefault(match[1], []).append((int(match[2]), path))
    cards = []
    for name, pictures in sorted(found.items()):
        for step, path in sorted(pictures, reverse=True)[:_MAX_PICTURES]:
            cards += _show_picture(path, f"{name}, step {step:,}")
    return cards


def _show_check(workdir: Path) -> list[str]:
    """What `data.check` found in the data: the first rows of its tables, and its pictures."""
    cards = []
    for name, title in _CHECKS.items():
        path = workdir / CHECK / name
        if not path.exists():
            continue
        try:
            header, *rows = csv.reader(read_text(path, max_bytes=MAX_TABLE).splitlines())
        except (OSError, ValueError, csv.Error) as e:
            log(f"{path} can't be read ({describe_error(e)}): left out")
            continue
        rows = [row for row in rows if len(row) == len(header)]
        shown = f"{title}: {len(rows):,}"
        more = f", of which the first {_CHECKED} are shown" if len(rows) > _CHECKED else ""
        caption = f"Made by data.check; all are in {CHECK}/{name}{more}."
        table = make_table([text.replace("_", " ") for text in header], rows[:_CHECKED])
        cards.append(make_card(shown, table if rows else "", caption=caption, wide=True))
        picture = path.with_suffix(".png")
        if rows and picture.exists():
            cards += _show_picture(picture, title)
    return cards


def _show_picture(path: Path, title: str) -> list[str]:
    """The card of a picture; none if it can't be read."""
    try:
        picture = _read_picture(path)
    except (OSError, ValueError) as e:
        log(f"{path} can't be read ({describe_error(e)}): left out")
        return []
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    width, height = min(width, _PICTURE_WIDTH), height * min(width, _PICTURE_WIDTH) // width
    alt = f"picture of {title}"
    return [make_figure(picture, (width, height), alt=alt, title=title, wide=True)]


def _read_picture(path: Path) -> bytes:
    if (size := path.stat().st_size) > _MAX_PICTURE:
        raise ValueError(f"{size:,} bytes; at most {_MAX_PICTURE:,} are shown")
    picture = path.read_bytes()
    if not picture.startswith(b"\x89PNG") or not int.from_bytes(picture[16:20], "big"):
        raise ValueError("it is no PNG")
    return picture


def _show_masks(workdir: Path) -> list[str]:
    """A table of the classes of pixels for each evaluator that counts them."""
    cards = []
    for title, path in _find_details(workdir):
        try:
            content = read_json(path, max_bytes=MAX_TABLE)
        except (OSError, ValueError):  # `read_details` logs it.
            continue
        if not isinstance(content, dict) or "pixel_classes" not in content:
            continue
        try:
            rows = [
                (row["name"], *(_percent(row[key]) for key in ("iou", "accuracy")), row["pixels"])
                for row in content["pixel_classes"]
            ]
            images = [(row["image"], _percent(row["miou"])) for row in content["images"]]
        except (ValueError, KeyError, TypeError) as e:
            log(f"{path} can't be read ({describe_error(e)}): left out")
            continue
        table = make_table(("class", "IoU", "accuracy", "pixels"), rows)
        names = make_details("Images of the picture", make_table(("image", "mIoU"), images))
        caption = (
            "The picture below has, from top to bottom, images, their masks and what is predicted: "
            "those of the lowest mIoU on the left, those of the highest on the right."
        )
        title = f"Classes of pixels: {title}"
        cards.append(make_card(title, table + names, caption=caption, wide=True))
    return cards


def _show_depths(workdir: Path) -> list[str]:
    """The images with the largest and the smallest errors for each evaluator of depth."""
    cards = []
    for title, path in _find_details(workdir):
        try:
            content = read_json(path, max_bytes=MAX_TABLE)
        except (OSError, ValueError):  # `read_details` logs it.
            continue
        if not isinstance(content, dict) or "pixel_depth" not in content:
            continue
        try:
            counts = content["pixel_depth"]
            images = [(row["image"], f"{row['rmse']:.3f} m") for row in content["images"]]
            summary = f"{counts['pixels']:,} pixels of {counts['images']:,} images have a depth. "
        except (ValueError, KeyError, TypeError) as e:
            log(f"{path} can't be read ({describe_error(e)}): left out")
            continue
        caption = (
            f"{summary}The picture below has, from top to bottom, images, their depths and what is "
            "predicted, from near (light) to far (dark): those of the largest error on the left."
        )
        table = make_table(("image", "RMSE"), images)
        cards.append(make_card(f"Depth: {title}", table, caption=caption, wide=True))
    return cards


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


def _show_time(workdir: Path) -> list[str]:
    summary = summarize(read_ledger(workdir))
    if summary is None:
        return []
    whole = sum(summary.seconds.values()) or 1.0
    spent = {kind: summary.seconds[kind] for kind in (*KINDS, "repeated", "down")}
    shares = [
        (f"{_TIMES[kind]}, {s:,.0f}\N{NO-BREAK SPACE}s", s / whole)
        for kind, s in spent.items()
        if s
    ]
    speed = summary.steps_per_second
    rows = [
        *([("speed", f"{speed:.3g} steps/s")] if speed else []),
        (
            "goodput",
            f"{100 * summary.goodput:.1f} %: the share of the time since the first start "
            "that went into training steps whose result was kept",
        ),
        ("starts", f"{summary.starts}; ends: {', '.join(summary.causes) or 'none'}"),
    ]
    cards = {"Where it went": make_bars(shares), "The run": make_table(("", ""), rows)}
    return [make_card(title, content) for title, content in cards.items()]


def _show_params(run: Mapping[str, Any]) -> list[str]:
    params = run.get("params") or ()
    if not params:
        return []
    count = sum(math.prod(row["shape"]) for row in params)
    groups = make_table(_GROUPS, run.get("groups") or ())
    rows = [(p["path"], str(tuple(p["shape"])), f"{math.prod(p['shape']):,}") for p in params]
    every = make_details(f"All {len(params)}", make_table(("path", "shape", "values"), rows))
    return [make_card(f"{count:,} values", groups + every, wide=True)]


def _show_commands(workdir: Path, run: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    place, modules = shlex.quote(str(workdir)), list_modules(config)
    # Modules outside of this package are imported only where a command names them.
    place += f" --parts={','.join(modules)}" if modules else ""
    commands = {
        "Train it, or resume": run.get("command"),
        "Predict": f"python -m vit_jax.predict --workdir={place} IMAGES",
        "Evaluate": f"python -m vit_jax.evaluate --workdir={place}",
        "Make this page again, with pictures": f"python -m vit_jax.report --workdir={place}",
    }
    content = "".join(
        f"<p>{escape_html(title)}</p>{make_command(command)}"
        for title, command in commands.items()
        if command
    )
    return [make_card("", content, wide=True)]


def _read_config(workdir: Path) -> dict[str, Any]:
    """Reads the config of a run; it is empty where it can't be read."""
    try:
        config = read_json(workdir / CONFIG)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _show_config(config: Mapping[str, Any]) -> list[str]:
    if not config:
        return []
    rows = [(key, json.dumps(value)) for key, value in flatten_config(config).items()]
    table = make_table(("key", "value"), rows)
    return [make_card("", make_details(f"All {len(rows)} keys", table), wide=True)]
