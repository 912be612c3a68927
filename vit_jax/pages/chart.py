# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG, in the colours of `pages.html`.

They are drawn for a width of about 400 pixels, so their text is readable on a phone.
"""

import dataclasses
import math
from collections.abc import Sequence

from vit_jax.utils.text import escape_html

# Size and margins of a drawing in its own units; the browser scales it.
_WIDTH, _HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 24
_COLORS = 8
# Most points of a curve: more than a screen shows only makes the file larger.
_MAX_POINTS = 400


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve of a chart, with its name in the legend.

    Attributes:
      points: pairs of x and y, sorted by x; those that are not finite are left out.
      color: number of its colour; from 8 on the colours repeat, with dashes.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0


def plot_curves(curves: Sequence[Curve], *, label: str) -> str:
    """Plots curves over a common x axis, with a legend if there are several.

    Args:
      curves: curves, at least one with a finite point; a single point is drawn as a dot.
      label: text for readers who cannot see the chart, as in all functions of this module.
    """
    drawn = [dataclasses.replace(curve, points=_thin(curve.points)) for curve in curves]
    drawn = [curve for curve in drawn if curve.points]
    xs = [x for curve in drawn for x, _ in curve.points]
    ys = [y for curve in drawn for _, y in curve.points]
    frame = _Frame(_limits(xs), _limits(ys, pad=0.04))
    lines = [frame.axes()]
    for curve in drawn:
        color = f"var(--s{curve.color % _COLORS})"
        dashes = f";stroke-dasharray:{2 + 3 * (curve.color // _COLORS)} 3"
        style = f"stroke:{color}{dashes if curve.color >= _COLORS else ''}"
        title = f"<title>{escape_html(curve.name)}</title>"
        if len(curve.points) > 1:
            lines.append(frame.path(curve.points, style, title))
        if len(curve.points) < 40:
            for x, y in curve.points:
                text = escape_html(f"{curve.name} at {x:g}: {y:.4g}")
                lines.append(frame.dot(x, y, "2.5", color, text))
    return _legend(drawn) + _wrap(lines, label)


def plot_reliability(bins: Sequence[tuple[float, float, int]], *, label: str) -> str:
    """Plots accuracy over confidence, with the diagonal on which they agree.

    Args:
      bins: mean confidence, accuracy and number of examples of each bin; the area of a dot grows
        with the number.
    """
    frame = _Frame((0.0, 1.0), (0.0, 1.0))
    (x0, y0), (x1, y1) = frame.place(0, 0), frame.place(1, 1)
    lines = [
        frame.axes(),
        f'<line class="axis" stroke-dasharray="4 3" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" '
        f'y2="{y1:.1f}"/>',
    ]
    full = [row for row in bins if row[2]]
    lines.append(frame.path([row[:2] for row in full], "stroke:var(--s0)"))
    most = max((count for *_, count in full), default=1)
    for confidence, accuracy, count in full:
        radius = f"{2 + 5 * math.sqrt(count / most):.1f}"
        text = f"confidence {confidence:.3f}, accuracy {accuracy:.3f}, {count:,} examples"
        lines.append(frame.dot(confidence, accuracy, radius, "var(--s0)", text))
    return _wrap(lines, label)


def plot_matrix(counts: Sequence[Sequence[int]], names: Sequence[str], *, label: str) -> str:
    """Plots a confusion matrix of counts by label (rows) and prediction (columns).

    The colour of a cell shows its share of the row.
    """
    size = len(counts)
    margin = 16 + 6.5 * max(len(_shorten(name)) for name in names)
    cell = max(12.0, min(34.0, 640.0 / size))
    whole = margin + cell * size + 4
    lines = []
    for i, row in enumerate(counts):
        total, middle = sum(row), margin + cell * (i + 0.5)
        short = escape_html(_shorten(names[i]))
        lines.append(
            f'<text x="{margin - 6}" y="{middle + 4:.1f}" text-anchor="end">{short}</text>'
            f'<text x="{middle + 4:.1f}" y="{margin - 6}" '
            f'transform="rotate(-90 {middle + 4:.1f} {margin - 6})">{short}</text>'
        )
        for j, count in enumerate(row):
            share = count / total if total else 0.0
            color = "var(--s0)" if i == j else "var(--s4)"
            title = f"{names[i]} taken for {names[j]}: {count:,} of {total:,}"
            x, y = margin + cell * j, margin + cell * i
            lines.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
                f'style="fill:{color};fill-opacity:{0.06 + 0.84 * share:.2f}">'
                f"<title>{escape_html(title)}</title></rect>"
            )
            if count and cell > 20:
                lines.append(
                    f'<text x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}" '
                    f'text-anchor="middle" style="fill:var(--text);pointer-events:none">'
                    f"{count}</text>"
                )
    return _wrap(lines, label, square=whole)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Maps values on two axes to places in a drawing."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        right = (x - self.x[0]) / (self.x[1] - self.x[0]) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - self.y[0]) / (self.y[1] - self.y[0]) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + right, _HEIGHT - _BOTTOM - up

    def path(self, points: Sequence[tuple[float, float]], style: str, title: str = "") -> str:
        places = " ".join("{:.1f},{:.1f}".format(*self.place(x, y)) for x, y in points)
        return f'<polyline class="curve" style="{style}" points="{places}">{title}</polyline>'

    def dot(self, x: float, y: float, radius: str, color: str, text: str) -> str:
        across, down = self.place(x, y)
        place = f'cx="{across:.1f}" cy="{down:.1f}" r="{radius}"'
        return f'<circle {place} style="fill:{color}"><title>{text}</title></circle>'

    def axes(self) -> str:
        """SVG of the grid lines and their numbers."""
        lines = []
        for value in _ticks(*self.y, count=5):
            y = self.place(0, value)[1]
            lines.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/><text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                f"{_show(value)}</text>"
            )
        for value in _ticks(*self.x, count=5):
            x = self.place(value, 0)[0]
            lines.append(
                f'<text x="{min(x, _WIDTH - 14):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">'
                f"{_show(value)}</text>"
            )
        bottom = _HEIGHT - _BOTTOM
        lines.append(
            f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>'
        )
        return "".join(lines)


def _wrap(lines: Sequence[str], label: str, *, square: float | None = None) -> str:
    width, height = (square, square) if square else (_WIDTH, _HEIGHT)
    limit = f' style="max-width:{square:.0f}px"' if square else ""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape_html(label)}"{limit}>{"".join(lines)}</svg>'
    )


def _legend(curves: Sequence[Curve]) -> str:
    if len(curves) < 2:
        return ""
    keys = "".join(
        f'<li style="--key:var(--s{curve.color % _COLORS})">{escape_html(curve.name)}</li>'
        for curve in curves
    )
    return f'<ul class="keys">{keys}</ul>'


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keeps finite points; of many, the lowest and the highest of each interval."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= _MAX_POINTS:
        return finite
    length = math.ceil(len(finite) / (_MAX_POINTS // 2))
    kept: set[tuple[float, float]] = {finite[-1]}
    for start in range(0, len(finite), length):
        stretch = finite[start : start + length]
        kept |= {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
    return sorted(kept)


def _limits(values: Sequence[float], *, pad: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) / 10 or 0.5
        return low - room, high + room
    return low - pad * (high - low), high + pad * (high - low)


def _ticks(low: float, high: float, *, count: int) -> list[float]:
    """Returns about `count` round numbers from `low` to `high`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= 0.999 * raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _show(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    if value and abs(value) < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{round(value, 9):.4g}"


def _shorten(name: str, most: int = 12) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
