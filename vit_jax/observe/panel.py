# SPDX-License-Identifier: Apache-2.0
"""The panel at the foot of a terminal while a run trains; lines of text scroll above it."""

import datetime
import itertools
import math
import resource
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import rich.console
import rich.live
import rich.progress
import rich.text

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 24  # characters of a sparkline
_BAR = 40
# Fields of the last line; unknown ones and counts of zero are left out.
_FIELDS = {
    "images_per_sec": "{:,.0f} images/s",
    "data_wait": "data-wait {:.1%}",
    "mfu": "MFU {:.1%}",
    "memory": "memory {}",
    "corrupt": "corrupt {:,}",
    "checkpoint": "checkpoint {}",
}


class Panel:
    """A progress bar over a line of curves and a line of `_FIELDS`.

    Args:
      step: step after which the run starts.
      live: whether to draw anything.
    """

    def __init__(self, console: rich.console.Console, *, step: int, total: int, live: bool):
        self.loss: list[float] = []
        self._metric, self._values = "", list[float]()
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
        if math.isfinite(value):
            self.loss.append(value)
            # A sparkline draws means of neighbours anyway.
            if len(self.loss) > 8 * _SPARKS:
                self.loss = _halve(self.loss)

    def add_results(self, results: dict[str, float]) -> None:
        """Appends a point to the curve of the first accuracy that was reported."""
        key = self._metric or next((k for k in results if k.endswith("/top1")), "")
        if math.isfinite(results.get(key, math.nan)):
            self._metric = key
            self._values.append(results[key])

    def _render(self) -> rich.console.RenderableType:
        curves = [("loss", self.loss), (self._metric, self._values)]
        fields = [(text, self._bar.tasks[0].fields.get(key)) for key, text in _FIELDS.items()]
        lines = (
            [f"{name} {ys[-1]:.4f} {draw_sparkline(ys)}" for name, ys in curves if ys],
            [text.format(value) for text, value in fields if value or isinstance(value, float)],
        )
        return rich.console.Group(self._bar, *(rich.text.Text("  ".join(x)) for x in lines if x))


def draw_sparkline(values: Sequence[float]) -> str:
    """Numbers as a line of blocks, low to high; long sequences are averaged in groups."""
    if len(values) > _SPARKS:
        edges = [round(i * len(values) / _SPARKS) for i in range(_SPARKS + 1)]
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


def _halve(values: list[float]) -> list[float]:
    """Means of pairs; the last value stays as it is."""
    pairs = zip(values[:-1:2], values[1:-1:2], strict=False)
    return [*((a + b) / 2 for a, b in pairs), values[-1]]
