# SPDX-License-Identifier: Apache-2.0
"""What stands on the screen before and after a run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.box
import rich.table
from clu import parameter_overview
from jax.sharding import Mesh

import vit_jax
from vit_jax.observe.console import console, log, settings
from vit_jax.observe.jsonl import read_metrics
from vit_jax.utils import tree
from vit_jax.utils.layout import EVALS, METRICS, TENSORBOARD


def report_start(
    *,
    mesh: Mesh,
    hosts: tuple[str, ...],
    params: Any,
    frozen: Any,
    input_bytes: Mapping[str, int],
    groups: Sequence[tuple[str, ...]] = (),
    rates: Sequence[str] = (),
) -> None:
    """Devices by process and machine, mesh, parameters and what becomes of them.

    Args:
      mesh: of the run.
      hosts: the machine of each process.
      params: all parameters (arrays or shapes).
      frozen: those that are not trained.
      input_bytes: memory of this host for batches, by what they are for.
      groups: rows of the table of parameters that are treated alike.
      rates: lines on the learning rate and weight decay.
    """
    if settings.verbosity == "quiet":
        return
    table = rich.table.Table(box=rich.box.SIMPLE, title="devices", title_justify="left")
    for name in ("process", "host", "device", "count", "mesh"):
        table.add_column(name)
    kinds = Counter((d.process_index, d.device_kind) for d in mesh.devices.flat)
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    for i, ((process, kind), count) in enumerate(sorted(kinds.items())):
        table.add_row(str(process), hosts[process], kind, str(count), "" if i else shape)
    log(f"vit_jax {vit_jax.__version__}, jax {jax.__version__}")
    console.print(table)
    log(parameter_overview.get_parameter_overview(params, include_stats=False))
    if frozen:
        fixed = tree.count(frozen)
        log(f"trained: {tree.count(params) - fixed:,} parameters, frozen: {fixed:,}")
    if groups:
        table = rich.table.Table(box=rich.box.SIMPLE, title="optimizer", title_justify="left")
        for name in ("parameters", "arrays", "values", "weight decay", "learning rate"):
            table.add_column(name)
        for row in groups:
            table.add_row(*row)
        console.print(table)
    for line in rates:
        log(line)
    sizes = (f"{name} {size / 1e9:.3f} GB" for name, size in input_bytes.items())
    log(f"memory of this host for batches: {', '.join(sizes)}")


def report_end(
    *,
    workdir: Path,
    step: int,
    total_steps: int,
    checkpoint: Path,
    longer: str | None,
    heads: Sequence[str] = (),
    judged_on: Sequence[str] = (),
) -> None:
    """Where the run stands, and the command that goes on from there.

    Args:
      workdir: of the run.
      step: that it has reached.
      total_steps: of the config.
      checkpoint: the newest.
      longer: the command; None where there was none.
      heads: names of the heads of a linear probe.
      judged_on: names of their evaluators, the first of which chooses the head.
    """
    log("")
    log(f"finished at step {step} of {total_steps}")
    results = last_results(workdir)
    for name, value in sorted(results.items()):
        if name.endswith("/top1") and not heads:
            split = name.removesuffix("/top1")
            count = results.get(f"{split}/count", 0)
            right = f"{round(value * count)} of {count} images"
            log(f"  {split + ' accuracy':<15} {100 * value:.2f} %  ({right})")
    for line in describe_best_head(results, heads=heads, judged_on=judged_on):
        log(line)
    log(f"  {'checkpoint':<15} {checkpoint}")
    log(f"  {'logs':<15} {workdir / METRICS}, {workdir / TENSORBOARD}")
    if (workdir / EVALS).is_dir():
        log(f"  {'by class':<15} {workdir / EVALS}")
    if longer is not None:
        log(f"  {'to train on':<15} {longer}")


def describe_best_head(
    results: Mapping[str, float], *, heads: Sequence[str], judged_on: Sequence[str]
) -> list[str]:
    """The accuracy of the head that is best on the first split, on all of them."""
    splits = [split for split in judged_on if f"{split}/count" in results]
    if not heads or not splits:
        return []
    best = max(heads, key=lambda head: results[f"{splits[0]}/{head}_top1"])
    lines = [f"  {'best head':<15} {best} optimizer.lr, chosen on {splits[0]}"]
    for split in splits:
        value, count = results[f"{split}/{best}_top1"], results[f"{split}/count"]
        right = f"{round(value * count)} of {count} images"
        lines.append(f"  {split + ' accuracy':<15} {100 * value:.2f} %  ({right})")
    return lines


def last_results(workdir: Path) -> dict[str, float]:
    """The newest value of each metric."""
    results: dict[str, float] = {}
    for record in read_metrics(workdir):
        results |= record
    return results
