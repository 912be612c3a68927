# SPDX-License-Identifier: Apache-2.0
"""Metric files of a run: `metrics.jsonl` and TensorBoard events."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import histogram_raw, hparams, image, scalar

from vit_jax.observe.console import log
from vit_jax.observe.jsonl import LineWriter, read_metrics
from vit_jax.observe.trackers import Histogram, Trackers, make_hyperparameters, tile
from vit_jax.utils.files import write_atomically
from vit_jax.utils.layout import METRICS, TENSORBOARD

# Made by protobuf at import, where type checkers see nothing.
Event: Any = event_pb2.__dict__["Event"]
SessionLog: Any = event_pb2.__dict__["SessionLog"]

_FLUSH_S = 30.0


class MetricWriter:
    """Writes each record to both files and to trackers, to `metrics.jsonl` at once.

    A context manager.

    A full disk does not end a run: see `LineWriter`. TensorBoard misses what could not be written.

    Args:
      workdir: where the files are.
      step: the run starts after this step. Records of later ones, left by a run that was killed,
        are dropped, and so is half a line.
      active: False for a writer that does nothing, on all processes but one.
      trackers: that get the records too.
    """

    def __init__(self, workdir: Path, *, step: int, active: bool, trackers: Trackers | None = None):
        self._active, self._trackers = active, trackers
        if not active:
            return
        path = workdir / METRICS
        kept = [r for r in read_metrics(workdir) if r["step"] <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._lines = LineWriter(path)
        self._tensorboard = _Events(workdir / TENSORBOARD, step=step)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._active:
            self._tensorboard.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one record."""
        if not self._active:
            return
        self._lines.write({"step": step, **metrics})
        self._tensorboard.write(step, metrics)
        if self._trackers is not None:
            self._trackers.write(step, metrics)

    def write_config(self, config: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Tells TensorBoard the hyperparameters, and the metrics by which runs are compared."""
        if self._active:
            self._tensorboard.write_config(make_hyperparameters(config), metrics)

    def write_images(self, step: int, name: str, images: np.ndarray) -> None:
        """Writes uint8 images `[n, height, width, 3]` as one picture."""
        if not self._active:
            return
        picture = tile(images)
        self._tensorboard.write_picture(step, name, picture)
        if self._trackers is not None:
            self._trackers.write_images(step, name, picture)

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Writes histograms by name: counts `[n]`, and the `[n + 1]` edges of the bins."""
        if not self._active:
            return
        self._tensorboard.write_histograms(step, histograms)
        if self._trackers is not None:
            self._trackers.write_histograms(step, histograms)


class _Events:
    """TensorBoard events, written in the caller's thread: that of tensorboardX dies of an error.

    After an error it goes on in a new file, since nothing is read after half a record.
    """

    def __init__(self, folder: Path, *, step: int):
        self._folder, self._failing = folder, False
        self._file: EventsWriter | None = None
        self._flushed = 0.0
        # What comes again takes the place of what was written of it before.
        again = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._put([again] if step else [])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [scalar(name, value) for name, value in metrics.items()]
        self._put([Event(step=step, summary=value) for value in values])

    def write_config(self, flat: Mapping[str, Any], metrics: Sequence[str]) -> None:
        parts = hparams(dict(flat), dict.fromkeys(metrics, 0.0))
        self._put([Event(summary=part) for part in parts])

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._put([Event(step=step, summary=image(name, picture, dataformats="HWC"))])

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        self._put(
            [Event(step=step, summary=_summarize(name, *h)) for name, h in histograms.items()]
        )

    def close(self) -> None:
        self._flushed = 0.0
        self._put([])
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()

    def _put(self, events: Sequence[Any]) -> None:
        now = time.time()
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                # The name has the time in seconds, and a second run in one would overwrite it.
                self._file = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
            for event in events:
                event.wall_time = now
                self._file.write_event(event)
            if now - self._flushed > _FLUSH_S:
                self._file.flush()
                self._flushed = now
        except OSError as e:
            if not self._failing:
                log(f"{self._folder} can't be written to ({e.strerror}): goes on without")
            self._file, self._failing = None, True


def _summarize(name: str, counts: np.ndarray, edges: np.ndarray) -> Any:
    middles = (edges[:-1] + edges[1:]) / 2
    return histogram_raw(
        name,
        min=float(edges[0]),
        max=float(edges[-1]),
        num=float(counts.sum()),
        sum=float((counts * middles).sum()),
        sum_squares=float((counts * middles**2).sum()),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
    )
