# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG, in the colours of `pages.html`.

They are drawn for a width of about 400 pixels, so their text is readable on a phone.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

from vit_jax.utils.text import escape_html

# Size and margins of a drawing in its own units; the browser scales it.
_WIDTH, _HEIGHT = 400, 250
_RIGHT, _TOP, _BOTTOM = 12, 26, 40
# Width of a digit of the largest text of a chart, 13 units.
_DIGIT = 7.4
_COLORS = 8
# Most points of a curve: more than a screen shows only makes the file larger.
_MAX_POINTS = 400
# From which number on an axis has a unit, and the unit with its letter.
_UNITS = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve of a chart, with its name in the legend.

    Attributes:
      points: pairs of x (0 or more) and y, sorted by x; those that are not finite are left out.
      color: number of its colour; from 8 on the colours repeat, with dashes.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0


def plot_curves(
    curves: Sequence[Curve],
    *,
    label: str,
    y: str = "",
    x: str = "step",
    is_share: bool = False,
) -> str:
    """Plots curves over an x axis of whole numbers from 0, with a legend if there are several.

    Args:
      curves: curves, at least one with a finite point; a single point is drawn as a dot.
      label: text for readers who cannot see the chart, as in all functions of this module.
      y: what the y axis shows; `x` likewise.
      is_share: whether y values are fractions; they are shown in percent.
    """
    drawn = [dataclasses.replace(curve, points=_thin(curve.points)) for curve in curves]
    drawn = [curve for curve in drawn if curve.points]
    if is_share:
        drawn = [
            dataclasses.replace(curve, points=[(x, 100 * y) for x, y in curve.points])
            for curve in drawn
        ]
    xs = [x for curve in drawn for x, _ in curve.points]
    ys = [y for curve in drawn for _, y in curve.points]
    limits = _limits(ys, pad=0.04)
    if is_share and min(ys) >= 0 and max(ys) <= 100:
        limits = max(limits[0], 0.0), min(limits[1], 100.0)
    unit = " %" if is_share else ""
    frame = _Frame((0.0, max(*xs, 1.0)), limits, x_name=x, y_name=f"{y}, %" if is_share else y)
    lines = [frame.axes(whole_steps=True)]
    for curve in drawn:
        color = f"var(--s{curve.color % _COLORS})"
        dashes = f";stroke-dasharray:{2 + 3 * (curve.color // _COLORS)} 3"
        style = f"stroke:{color}{dashes if curve.color >= _COLORS else ''}"
        title = f"<title>{escape_html(curve.name)}</title>"
        if len(curve.points) > 1:
            lines.append(frame.path(curve.points, style, title))
        if len(curve.points) < 40:
            for place, value in curve.points:
                text = escape_html(f"{curve.name} at {x} {place:,.10g}: {value:.4g}{unit}")
                lines.append(frame.dot(place, value, "2.5", color, text))
    return _legend(drawn) + _wrap(lines, label)


def plot_reliability(bins: Sequence[tuple[float, float, int]], *, label: str) -> str:
    """Plots accuracy over confidence, with the diagonal on which they agree.

    Args:
      bins: mean confidence, accuracy and number of examples of each bin; the area of a dot grows
        with the number.
    """
    frame = _Frame((0.0, 100.0), (0.0, 100.0), x_name="confidence, %", y_name="accuracy, %")
    (x0, y0), (x1, y1) = frame.place(0, 0), frame.place(100, 100)
    lines = [
        frame.axes(),
        f'<line class="axis" stroke-dasharray="4 3" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" '
        f'y2="{y1:.1f}"/>',
    ]
    full = [(100 * confidence, 100 * accuracy, n) for confidence, accuracy, n in bins if n]
    if len(full) > 1:
        lines.append(frame.path([row[:2] for row in full], "stroke:var(--s0)"))
    most = max((count for *_, count in full), default=1)
    for confidence, accuracy, count in full:
        radius = f"{2 + 5 * math.sqrt(count / most):.1f}"
        text = f"confidence {confidence:.1f} %, accuracy {accuracy:.1f} %, {count:,} examples"
        lines.append(frame.dot(confidence, accuracy, radius, "var(--s0)", text))
    return _wrap(lines, label)


def plot_matrix(counts: Sequence[Sequence[int]], names: Sequence[str], *, label: str) -> str:
    """Plots a confusion matrix of counts by label (rows) and prediction (columns).

    The colour of a cell shows its share of the row; a pair that does not occur has no cell.
    """
    size = len(counts)
    margin = 32 + 6.5 * max(len(_shorten(name)) for name in names)
    cell = max(12.0, min(34.0, 640.0 / size))
    whole, middle = margin + cell * size + 4, margin + cell * size / 2
    lines = [
        f'<text x="{middle:.1f}" y="12" text-anchor="middle">predicted</text>'
        f'<text x="12" y="{middle:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 12 {middle:.1f})">label</text>'
        f'<rect class="back" x="{margin:.1f}" y="{margin:.1f}" width="{cell * size:.1f}" '
        f'height="{cell * size:.1f}"/>'
    ]
    for i, row in enumerate(counts):
        total, middle = sum(row), margin + cell * (i + 0.5)
        short = escape_html(_shorten(names[i]))
        lines.append(
            f'<text x="{margin - 6:.1f}" y="{middle + 4:.1f}" text-anchor="end">{short}</text>'
            f'<text x="{middle + 4:.1f}" y="{margin - 6:.1f}" '
            f'transform="rotate(-90 {middle + 4:.1f} {margin - 6:.1f})">{short}</text>'
        )
        for j, count in enumerate(row):
            if not count:
                continue
            share = count / total
            color = "var(--s0)" if i == j else "var(--s4)"
            title = f"{names[i]} taken for {names[j]}: {count:,} of {total:,}"
            x, y = margin + cell * j, margin + cell * i
            lines.append(
                f'<rect x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{cell - 1:.1f}" '
                f'height="{cell - 1:.1f}" style="fill:{color};fill-opacity:{0.3 + 0.65 * share:.2f}'
                f'"><title>{escape_html(title)}</title></rect>'
            )
            if cell > 20:
                # Of the colours of the page, the one that differs more from the cell.
                fill = "back" if share > 0.5 else "text"
                lines.append(
                    f'<text x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}" '
                    f'text-anchor="middle" style="fill:var(--{fill});pointer-events:none">'
                    f"{count}</text>"
                )
    return _wrap(lines, label, square=whole)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Maps values on two axes to places in a drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    _: dataclasses.KW_ONLY
    x_name: str
    y_name: str

    @functools.cached_property
    def _y_ticks(self) -> list[tuple[float, str]]:
        return _ticks(*self.y, count=5)

    @functools.cached_property
    def _left(self) -> float:
        """The margin that the numbers of the y axis need."""
        return 14 + _DIGIT * max(3, *(len(text) for _, text in self._y_ticks))

    def place(self, x: float, y: float) -> tuple[float, float]:
        right = (x - self.x[0]) / (self.x[1] - self.x[0]) * (_WIDTH - self._left - _RIGHT)
        up = (y - self.y[0]) / (self.y[1] - self.y[0]) * (_HEIGHT - _TOP - _BOTTOM)
        return self._left + right, _HEIGHT - _BOTTOM - up

    def path(self, points: Sequence[tuple[float, float]], style: str, title: str = "") -> str:
        places = " ".join("{:.1f},{:.1f}".format(*self.place(x, y)) for x, y in points)
        return f'<polyline class="curve" style="{style}" points="{places}">{title}</polyline>'

    def dot(self, x: float, y: float, radius: str, color: str, text: str) -> str:
        across, down = self.place(x, y)
        place = f'cx="{across:.1f}" cy="{down:.1f}" r="{radius}"'
        return f'<circle {place} style="fill:{color}"><title>{text}</title></circle>'

    def axes(self, *, whole_steps: bool = False) -> str:
        """SVG of the grid lines with their numbers, and of the names of the axes.

        With `whole_steps` there are only integers on the x axis.
        """
        lines = [
            f'<text class="axis-name" x="0" y="11">{escape_html(self.y_name)}</text>'
            f'<text class="axis-name" x="{(self._left + _WIDTH - _RIGHT) / 2:.1f}" '
            f'y="{_HEIGHT - 6}" text-anchor="middle">{escape_html(self.x_name)}</text>'
        ]
        left, right = f"{self._left:.1f}", _WIDTH - _RIGHT
        for value, text in self._y_ticks:
            y = self.place(0, value)[1]
            lines.append(
                f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/><text x="{self._left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">'
                f"{text}</text>"
            )
        for value, text in _ticks(*self.x, count=5, least=1.0 if whole_steps else 0.0):
            x = min(self.place(value, 0)[0], _WIDTH - _DIGIT * len(text) / 2)
            lines.append(
                f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{text}</text>'
            )
        bottom = _HEIGHT - _BOTTOM
        lines.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        return "".join(lines)


def _wrap(lines: Sequence[str], label: str, *, square: float | None = None) -> str:
    width, height = (square, square) if square else (_WIDTH, _HEIGHT)
    # A large matrix would be illegible on a phone, so it scrolls there.
    limit = f' style="max-width:{square:.0f}px;min-width:{0.7 * square:.0f}px"' if square else ""
    kind = "" if square else ' class="chart"'
    drawing = (
        f'<svg{kind} viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape_html(label)}"{limit}>{"".join(lines)}</svg>'
    )
    return f'<div class="scroll" tabindex="0">{drawing}</div>' if square else drawing


def _legend(curves: Sequence[Curve]) -> str:
    if len(curves) < 2:
        return ""
    keys = "".join(
        f"<li{' class=dot' if len(curve.points) == 1 else ''} "
        f'style="--key:var(--s{curve.color % _COLORS})">{escape_html(curve.name)}</li>'
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


def _limits(values: Sequence[float], *, pad: float) -> tuple[float, float]:
    """The limits of an axis; they differ by more than the values of a constant do by rounding."""
    low, high = min(values), max(values)
    if high - low <= max(1e-6 * max(abs(low), abs(high)), 1e-300):
        room = abs(low) / 10 or 0.5
        return low - room, high + room
    return low - pad * (high - low), high + pad * (high - low)


def _ticks(low: float, high: float, *, count: int, least: float = 0.0) -> list[tuple[float, str]]:
    """Returns about `count` round numbers from `low` to `high`, at least `least` apart, as texts.

    The texts have as many digits as it takes to tell them from each other.
    """
    raw = max((high - low) / count, least)
    power = 10.0 ** math.floor(math.log10(raw) + 1e-9)
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= 0.999 * raw)
    if least:
        step = float(math.ceil(step - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    values = [i * step for i in range(first, last + 1)]
    return [(value, _show(value, step, max(map(abs, values)))) for value in values]


def _show(value: float, step: float, most: float) -> str:
    """A tick as text, where ticks are `step` apart and at most `most` from zero."""
    _, size, letter = next((unit for unit in _UNITS if most >= unit[0]), (0.0, 1.0, ""))
    if most < 1e-3 and value:
        digits = max(math.floor(math.log10(most / step) + 1e-9), 0) + 2
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    # Two digits of the step, for 2.5.
    decimals = max(1 - math.floor(math.log10(step / size) + 1e-9), 0)
    text = f"{value / size:,.{decimals}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("0", "-0") else f"{text}{letter}"


def _shorten(name: str, most: int = 12) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
