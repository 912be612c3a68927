# SPDX-License-Identifier: Apache-2.0
"""The summaries on the screen at the start and end of a run."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.box
import rich.table
import rich.text
from jax.sharding import Mesh

import vit_jax
from vit_jax.observe.console import console, log, settings
from vit_jax.observe.jsonl import read_metrics
from vit_jax.utils import tree
from vit_jax.utils.layout import EVALS, METRICS, REPORT, TENSORBOARD
from vit_jax.utils.text import describe_size

# Skipped steps that are listed by their numbers.
_MAX_STEPS = 20


def report_start(
    *,
    mesh: Mesh,
    hosts: tuple[str, ...],
    model: str,
    params: Any,
    frozen: Any,
    input_bytes: Mapping[str, int],
    groups: Sequence[tuple[str, ...]] = (),
    rates: Sequence[str] = (),
) -> None:
    """Logs devices, mesh, model, and how its parameters are optimized.

    The tables of all parameters and of how groups of them are optimized are for `--verbose`.

    Args:
      hosts: the machine of each process.
      model: its name and sizes.
      params: nested dict of all parameters, arrays or shapes.
      frozen: nested dict of the parameters that are not trained.
      input_bytes: bytes of batches on this host, by their use.
      groups: rows of `optim.summary.group_params`.
      rates: lines of `optim.summary.describe_rates`.
    """
    if settings.verbosity == "quiet":
        return
    kinds = Counter((d.process_index, d.device_kind) for d in mesh.devices.flat)
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    log(f"vit_jax {vit_jax.__version__}, jax {jax.__version__}")
    if len(hosts) == 1:
        counts = ", ".join(f"{count} x {kind}" for (_, kind), count in sorted(kinds.items()))
        log(f"devices: {counts}; mesh: {shape}")
    else:
        rows = [
            (str(process), hosts[process], kind, str(count), "" if i else shape)
            for i, ((process, kind), count) in enumerate(sorted(kinds.items()))
        ]
        _print_table("devices", ("process", "host", "device", "count", "mesh"), rows)
    log(f"model: {model}, {tree.count(params):,} parameters")
    if frozen:
        fixed = tree.count(frozen)
        log(f"trained: {tree.count(params) - fixed:,} parameters, frozen: {fixed:,}")
    if settings.verbosity == "verbose":
        shapes = tree.flatten(params)
        rows = [
            (path, "x".join(map(str, leaf.shape)) or "scalar", f"{math.prod(leaf.shape):,}")
            for path, leaf in shapes.items()
        ]
        _print_table("parameters", ("path", "shape", "values"), rows)
        columns = ("parameters", "arrays", "values", "weight decay", "learning rate")
        _print_table("optimizer", columns, groups)
    for line in rates:
        log(line)
    sizes = (f"{name} {describe_size(size)}" for name, size in input_bytes.items())
    log(f"memory of this host for batches: {', '.join(sizes)}")


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table that is at most as wide as the screen: longer cells take several lines."""
    table = rich.table.Table(box=rich.box.SIMPLE, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(rich.text.Text, row))
    console.print(table)


def report_end(
    *,
    workdir: Path,
    step: int,
    total_steps: int,
    checkpoint: Path,
    longer: str | None,
    uses: Mapping[str, str] | None = None,
    stop_reason: str | None = None,
    skipped: Sequence[int] = (),
    heads: Sequence[str] = (),
    judged_on: Sequence[str] = (),
    details: str = "by class",
) -> None:
    """Logs the results of a run, what to look at, its files, and what to do next.

    Args:
      checkpoint: folder of the newest checkpoint.
      longer: the command that trains for longer; None if it is not known.
      uses: what the model is good for, and what to type.
      stop_reason: why the run ended before `total_steps`; None if it did not.
      skipped: the steps that diverged and changed nothing, in ascending order.
      heads: names of the heads of a linear probe.
      judged_on: names of their evaluators; the first one chooses the head.
      details: what the files of details of evaluations have.
    """
    log("")
    early = "" if stop_reason is None else f", early: {stop_reason}"
    log(f"finished at step {step} of {total_steps}{early}")
    if skipped:
        few = ", ".join(map(str, skipped[:_MAX_STEPS])) + ", ..." * (len(skipped) > _MAX_STEPS)
        log(f"  {'skipped':<15} {len(skipped)} steps that diverged and changed nothing: {few}")
    results = last_results(workdir)
    for name, value in sorted(results.items()):
        split = name.removesuffix("/top1")
        # Training accuracy is a mean over steps: it has no count of images.
        if name.endswith("/top1") and f"{split}/count" in results and not heads:
            log(_describe_accuracy(split, value, results[f"{split}/count"]))
    for line in describe_best_head(results, heads=heads, judged_on=judged_on):
        log(line)
    if (workdir / REPORT).is_file():
        log(f"  {'report':<15} {workdir / REPORT}")
    for name, use in (uses or {}).items():
        log(f"  {name:<15} {use}")
    log(f"  {'checkpoint':<15} {checkpoint}")
    log(f"  {'logs':<15} {workdir / METRICS}, {workdir / TENSORBOARD}")
    if (workdir / EVALS).is_dir():
        log(f"  {details:<15} {workdir / EVALS}")
    if longer is not None:
        log(f"  {'to train longer':<15} {longer}")


def describe_best_head(
    results: Mapping[str, float], *, heads: Sequence[str], judged_on: Sequence[str]
) -> list[str]:
    """Returns lines with the accuracy on all splits of the head that is best on the first one."""
    splits = [split for split in judged_on if f"{split}/count" in results]
    if not heads or not splits:
        return []
    best = max(heads, key=lambda head: results[f"{splits[0]}/{head}_top1"])
    lines = [f"  {'best head':<15} {best} optimizer.lr, chosen on {splits[0]}"]
    for split in splits:
        accuracy = results[f"{split}/{best}_top1"]
        lines.append(_describe_accuracy(split, accuracy, results[f"{split}/count"]))
    return lines


def _describe_accuracy(split: str, value: float, count: float) -> str:
    if not math.isfinite(value):
        return f"  {split + ' accuracy':<15} {value}"
    right = f"{round(value * count)} of {count} images"
    return f"  {split + ' accuracy':<15} {100 * value:.2f} %  ({right})"


def last_results(workdir: Path) -> dict[str, float]:
    """Returns the newest value of each metric of a run."""
    results: dict[str, float] = {}
    for record in read_metrics(workdir):
        results |= record
    return results
