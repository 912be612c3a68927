# SPDX-License-Identifier: Apache-2.0
"""The panel at the foot of a terminal while a run trains; lines of text scroll above it."""

import dataclasses
import datetime
import itertools
import math
import resource
import sys
from collections.abc import Sequence
from typing import Any

import jax
import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 24  # letters of a sparkline
_BAR = 40


@dataclasses.dataclass
class Shown:
    """What the panel shows; what is None is left out."""

    step: int
    total: int
    loss: list[float] = dataclasses.field(default_factory=list)
    metric: str | None = None
    values: list[float] = dataclasses.field(default_factory=list)
    images_per_sec: float | None = None
    data_wait: float | None = None
    mfu: float | None = None
    memory: str | None = None
    left: datetime.timedelta | None = None
    checkpoint: int | None = None
    corrupt: int = 0


class Panel:
    """Draws what is in `shown`, anew at each `update`.

    Args:
      console: to draw on.
      step: that the run starts after.
      total: steps of the run.
      live: False for a panel that is not there.
    """

    def __init__(self, console: rich.console.Console, *, step: int, total: int, live: bool):
        self.shown = Shown(step, total)
        self._live = rich.live.Live(console=console, get_renderable=self._render) if live else None

    def start(self) -> None:
        """Shows it."""
        if self._live is not None:
            self._live.start()

    def stop(self) -> None:
        """Leaves it as it is, and the lines below to others."""
        if self._live is not None:
            self._live.stop()

    def update(self, **changes: Any) -> None:
        """Sets fields of `Shown`; it is drawn a few times a second."""
        for key, value in changes.items():
            setattr(self.shown, key, value)

    def add_loss(self, value: float) -> None:
        """Goes on with the curve of the loss."""
        if math.isfinite(value):
            self.shown.loss.append(value)
            # What is drawn are means of neighbours anyway.
            if len(self.shown.loss) > 8 * _SPARKS:
                self.shown.loss = _halve(self.shown.loss)

    def add_results(self, results: dict[str, float]) -> None:
        """Goes on with the curve of the first accuracy that comes."""
        key = self.shown.metric or next((k for k in results if k.endswith("/top1")), None)
        if key in results:
            self.shown.metric = key
            self.shown.values.append(results[key])

    def _render(self) -> rich.console.RenderableType:
        shown = self.shown
        bar = rich.table.Table.grid(padding=(0, 1))
        bar.add_row(
            f"step {shown.step}/{shown.total}",
            rich.progress_bar.ProgressBar(total=shown.total, completed=shown.step, width=_BAR),
            f"{shown.step / shown.total:.0%}",
            "" if shown.left is None else f"ETA {shown.left}",
        )
        lines = [line for line in (_describe_curves(shown), _describe_speed(shown)) if line]
        return rich.console.Group(bar, *(rich.text.Text(line) for line in lines))


def _describe_curves(shown: Shown) -> str:
    words = []
    if shown.loss:
        words.append(f"loss {shown.loss[-1]:.4f} {draw_sparkline(shown.loss)}")
    if shown.metric is not None:
        words.append(f"{shown.metric} {shown.values[-1]:.4f} {draw_sparkline(shown.values)}")
    return "  ".join(words)


def _describe_speed(shown: Shown) -> str:
    words = []
    if shown.images_per_sec is not None:
        words.append(f"{shown.images_per_sec:,.0f} images/s")
    if shown.data_wait is not None:
        words.append(f"data-wait {shown.data_wait:.1%}")
    if shown.mfu is not None:
        words.append(f"MFU {shown.mfu:.1%}")
    if shown.memory is not None:
        words.append(f"memory {shown.memory}")
    if shown.corrupt:
        words.append(f"corrupt {shown.corrupt:,}")
    if shown.checkpoint:
        words.append(f"checkpoint {shown.checkpoint}")
    return "  ".join(words)


def draw_sparkline(values: Sequence[float]) -> str:
    """Numbers as a line of blocks, low to high; many are drawn as means of neighbours."""
    if len(values) > _SPARKS:
        edges = [round(i * len(values) / _SPARKS) for i in range(_SPARKS + 1)]
        groups = [values[a:b] for a, b in itertools.pairwise(edges)]
        values = [sum(group) / len(group) for group in groups]
    low, high = min(values), max(values)
    if low == high:
        return _BLOCKS[0] * len(values)
    scale = (len(_BLOCKS) - 1) / (high - low)
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


def describe_memory() -> str:
    """The most in use at once: of the first device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak, limit = stats.get("peak_bytes_in_use"), stats.get("bytes_limit")
    if peak is None:
        unit = 1 if sys.platform == "darwin" else 1024
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB (host)"
    return f"{peak / 1e9:.1f} GB" + (f" ({peak / limit:.0%})" if limit else "")


def _halve(values: list[float]) -> list[float]:
    """Means of pairs; the last stays as it is."""
    pairs = zip(values[:-1:2], values[1:-1:2], strict=False)
    return [*((a + b) / 2 for a, b in pairs), values[-1]]
