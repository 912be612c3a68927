# SPDX-License-Identifier: Apache-2.0
"""Metric files of a run: `metrics.jsonl` and TensorBoard events."""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorboardX

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricWriter:
    """Writes each record to both files, to `metrics.jsonl` at once. A context manager.

    Args:
      workdir: where the files are.
      step: the run starts after this step. Records of later ones, left by a run that was killed,
        are dropped, and so is half a line.
      active: False for a writer that does nothing, on all processes but one.
    """

    def __init__(self, workdir: Path, *, step: int, active: bool):
        self._active = active
        if not active:
            return
        path = workdir / METRICS
        kept = [r for r in read_metrics(workdir) if r["step"] <= step]
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(fresh, path)
        self._jsonl = open(path, "a", buffering=1)  # noqa: SIM115 (closed in __exit__)
        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / TENSORBOARD),
            purge_step=step + 1 if step else None,
            flush_secs=30,
            # The name has the time in seconds, and a second run in one would overwrite it.
            filename_suffix=f".{time.time_ns()}",
        )

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._active:
            self._jsonl.close()
            self._tensorboard.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one record."""
        if not self._active:
            return
        self._jsonl.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of a workdir; a torn last line is left out."""
    path = workdir / METRICS
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Appends an object as a line, on a line of its own even after half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0, os.SEEK_END)
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects that `append_record` wrote; lines that are torn are left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records
