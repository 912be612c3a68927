# SPDX-License-Identifier: Apache-2.0
"""Writes the metrics of a run to `metrics.jsonl`, TensorBoard events and trackers."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import histogram_raw, hparams, image, scalar

from vit_jax.observe.console import log
from vit_jax.observe.jsonl import LineWriter, drop_metrics_after
from vit_jax.observe.trackers import Histogram, Trackers, make_hyperparameters, tile
from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import METRICS, TENSORBOARD
from vit_jax.utils.pictures import to_rgb

# Created by protobuf at import, which type checkers do not see.
Event: Any = event_pb2.__dict__["Event"]
SessionLog: Any = event_pb2.__dict__["SessionLog"]

_FLUSH_S = 30.0


class MetricWriter:
    """Writes each record to both files and to trackers, to `metrics.jsonl` at once.

    A context manager. A full disk does not end a run, see `LineWriter`; TensorBoard then lacks the
    records that could not be written.

    Args:
      step: the run starts after this step. Records of later steps, which a killed run left, and
        half a line are dropped.
      active: False on all processes but one, to do nothing.
      on_record: called with each record, a dict with its `step`, after it was written. If it
        returns True or a text, the run is to end.

    Attributes:
      stop_reason: what `on_record` returned to end the run, as text; None so far.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        active: bool,
        trackers: Trackers | None = None,
        on_record: Callable[[dict[str, Any]], object] | None = None,
    ):
        self._active, self._on_record = active, on_record
        self.stop_reason: str | None = None
        self._sinks: list[Any] = []  # They get what metrics.jsonl gets, and pictures.
        if not active:
            return
        drop_metrics_after(workdir, step)
        self._lines = LineWriter(workdir / METRICS)
        self._tensorboard = _Events(workdir / TENSORBOARD, step=step)
        self._sinks = [self._tensorboard, *([] if trackers is None else [trackers])]

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._active:
            self._tensorboard.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one record.

        Raises:
          UserError: `on_record` returns what it may not.
        """
        if self._active:
            self._lines.write({"step": step, **metrics})
        for sink in self._sinks:
            sink.write(step, metrics)
        if self._active and self._on_record is not None:
            self._take_answer(self._on_record({"step": step, **metrics}))

    def _take_answer(self, answer: object) -> None:
        if answer is None or answer is False:
            return
        if answer is not True and not isinstance(answer, str):
            raise UserError(
                f"on_record returns {type(answer).__name__}: expected None or False to continue, "
                "True or a text with the reason to end the run"
            )
        self.stop_reason = answer if isinstance(answer, str) else "on_record returned True"

    def write_config(self, config: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Writes hyperparameters and the names of metrics to compare runs by, for TensorBoard."""
        if self._active:
            self._tensorboard.write_config(make_hyperparameters(config), metrics)

    def write_images(self, step: int, name: str, images: np.ndarray) -> None:
        """Writes uint8 images `[n, height, width, channels]` as one picture."""
        picture = to_rgb(tile(images))
        for sink in self._sinks:
            sink.write_images(step, name, picture)

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Writes histograms by name: counts `[n]`, and the edges `[n + 1]` of the bins."""
        for sink in self._sinks:
            sink.write_histograms(step, histograms)


class _Events:
    """Writes TensorBoard events in the caller's thread, since an error ends that of tensorboardX.

    After an error it starts a new file, since readers stop at half a record.
    """

    def __init__(self, folder: Path, *, step: int):
        self._folder, self._failing = folder, False
        self._file: EventsWriter | None = None
        self._flushed = 0.0
        # Steps that are repeated replace what was written for them before.
        again = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._put([again] if step else [])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [scalar(name, value) for name, value in metrics.items()]
        self._put([Event(step=step, summary=value) for value in values])

    def write_config(self, flat: Mapping[str, Any], metrics: Sequence[str]) -> None:
        parts = hparams(dict(flat), dict.fromkeys(metrics, 0.0))
        self._put([Event(summary=part) for part in parts])

    def write_images(self, step: int, name: str, picture: np.ndarray) -> None:
        self._put([Event(step=step, summary=image(name, picture, dataformats="HWC"))])

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        values = [_summarize(name, *histogram) for name, histogram in histograms.items()]
        self._put([Event(step=step, summary=value) for value in values])

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
                # The name has the time in seconds: two runs in one second would share a file.
                self._file = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
            for event in events:
                event.wall_time = now
                self._file.write_event(event)
            if now - self._flushed > _FLUSH_S:
                self._file.flush()
                self._flushed = now
        except OSError as e:
            if not self._failing:
                log(f"{self._folder} can't be written to ({e.strerror}): continues without it")
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
