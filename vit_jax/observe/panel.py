# SPDX-License-Identifier: Apache-2.0
"""The panel at the foot of a terminal while a run trains; lines of text scroll above it."""

import datetime
import itertools
import math
import resource
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import rich.console
import rich.live
import rich.progress
import rich.text

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 24  # characters of a sparkline at most
_BAR = 40
# Fields of a line; unknown ones and counts of zero are left out.
_FIELDS = {
    "images_per_sec": "{:,.0f} images/s",
    "data_wait": "data-wait {:.1%}",
    "mfu": "MFU {:.1%}",
    "memory": "memory {}",
    "corrupt": "corrupt {:,}",
    "checkpoint": "checkpoint {}",
}


class Panel:
    """A progress bar over lines of curves, of `_FIELDS`, and of the time by phase.

    Args:
      step: step after which the run starts.
      live: whether to draw anything.
      seconds: returns the seconds spent so far by phase; the first steps are in `compile`.

    Attributes:
      loss: points of the curve of the loss, and `accuracy` of that of the training accuracy.
      compiling: whether the first step is still being compiled.
    """

    def __init__(
        self,
        console: rich.console.Console,
        *,
        step: int,
        total: int,
        live: bool,
        seconds: Callable[[], Mapping[str, float]] = dict,
    ):
        self.loss: list[float] = []
        self.accuracy: list[float] = []
        self.compiling = False
        self._metric, self._values = "", list[float]()
        self._console, self._seconds = console, seconds
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(_BAR),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[eta]}"),
        )
        self._task = self._bar.add_task("", total=total, completed=step, eta="")
        self._live = rich.live.Live(console=console, get_renderable=self._render) if live else None

    def start(self) -> None:
        """Shows the panel."""
        if self._live is not None:
            self._live.start()

    def stop(self) -> None:
        """Leaves the panel as it is; later output is printed below it."""
        if self._live is not None:
            self._live.stop()

    def update(
        self, *, step: int | None = None, left: datetime.timedelta | None = None, **fields: Any
    ) -> None:
        """Sets the step, the time left and some of `_FIELDS`; redrawn a few times a second."""
        if left is not None:
            fields["eta"] = f"ETA {left}"
        self._bar.update(self._task, completed=step, **fields)

    def add_loss(self, value: float) -> None:
        """Appends a point to the curve of the loss."""
        self.loss = _append(self.loss, value)

    def add_accuracy(self, value: float) -> None:
        """Appends a point to the curve of the training accuracy."""
        self.accuracy = _append(self.accuracy, value)

    def add_results(self, results: dict[str, float]) -> None:
        """Appends a point to the curve of the first accuracy that an evaluator reported."""
        key = self._metric or next((k for k in results if k.endswith("/top1")), "")
        if math.isfinite(results.get(key, math.nan)):
            self._metric = key
            self._values.append(results[key])

    def _render(self) -> rich.console.RenderableType:
        spent = dict(self._seconds())
        curves = [("loss", self.loss), ("top1", self.accuracy), (self._metric, self._values)]
        curves = [(f"{name} {ys[-1]:.4f} ", ys) for name, ys in curves if ys]
        # All curves fit in one line.
        free = self._console.width - sum(len(name) + 2 for name, _ in curves)
        most = min(max(free // max(len(curves), 1), 4), _SPARKS)
        fields = [(text, self._bar.tasks[0].fields.get(key)) for key, text in _FIELDS.items()]
        lines = [
            [name + draw_sparkline(ys, most=most) for name, ys in curves],
            [text.format(value) for text, value in fields if value or isinstance(value, float)],
            _show_time(spent),
        ]
        if self.compiling:
            lines.insert(0, [f"compiling ... {spent.get('compile', 0.0):.0f} s"])
        return rich.console.Group(self._bar, *(rich.text.Text("  ".join(x)) for x in lines if x))


def _show_time(spent: Mapping[str, float]) -> list[str]:
    """The time so far, and its share in each phase; phases that took no time are left out."""
    whole = sum(spent.values())
    if whole < 1:
        return []
    shares = [f"{phase} {s / whole:.1%}" for phase, s in spent.items() if s]
    return [f"time {datetime.timedelta(seconds=round(whole))}", *shares]


def draw_sparkline(values: Sequence[float], *, most: int = _SPARKS) -> str:
    """Numbers as a line of blocks, low to high; more than `most` are averaged in groups."""
    if len(values) > most:
        edges = [round(i * len(values) / most) for i in range(most + 1)]
        values = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(values), max(values)
    if low == high:
        return _BLOCKS[0] * len(values)
    scale = (len(_BLOCKS) - 1) / (high - low)
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


def describe_memory() -> str:
    """Peak memory of the first device, or of this process where the device does not report it."""
    device = jax.local_devices()[0]
    stats, peak = device.memory_stats() or {}, peak_bytes(device)
    if "peak_bytes_in_use" not in stats:
        return f"{peak / 1e9:.1f} GB (host)"
    limit = stats.get("bytes_limit")
    return f"{peak / 1e9:.1f} GB" + (f" ({peak / limit:.0%})" if limit else "")


def peak_bytes(device: Any) -> int:
    """The peak memory of a device or, where it does not report it, of this process."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _append(values: list[float], value: float) -> list[float]:
    """Adds a finite value to a curve; a long one keeps means of neighbours, as it is drawn."""
    if not math.isfinite(value):
        return values
    longer = [*values, value]
    return _halve(longer) if len(longer) > 8 * _SPARKS else longer


def _halve(values: list[float]) -> list[float]:
    """Means of pairs; the last value stays as it is."""
    pairs = zip(values[:-1:2], values[1:-1:2], strict=False)
    return [*((a + b) / 2 for a, b in pairs), values[-1]]
