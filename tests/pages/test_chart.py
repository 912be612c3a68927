# SPDX-License-Identifier: Apache-2.0
"""Charts: what is drawn where, and nothing of what is no number."""

import itertools
import math
import re

import pytest

from tests.html_pages import Page
from vit_jax.pages.chart import Curve, plot_curves, plot_matrix, plot_reliability


def polyline(text):
    (points,) = re.findall(r'<polyline[^>]* points="([^"]*)"', text)
    return [tuple(map(float, pair.split(","))) for pair in points.split()]


def test_a_curve_goes_from_left_to_right_and_up_with_its_values():
    points = polyline(plot_curves([Curve("a", [(0, 1.0), (10, 2.0), (30, 4.0)])], label="a"))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2
    assert y0 > y1 > y2  # the origin of a drawing is above
    assert (x2 - x0) / (x1 - x0) == pytest.approx(3, rel=1e-2)
    assert (y2 - y0) / (y1 - y0) == pytest.approx(3, rel=1e-2)


def test_what_is_no_number_is_left_out():
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    text = plot_curves([Curve("a", points), Curve("b", [(0, math.nan)])], label="a")
    assert len(polyline(text)) == 2
    assert "nan" not in text
    assert "inf" not in text
    assert "keys" not in text  # b has nothing to be explained


def test_of_many_points_the_extremes_stay():
    points = [(step, 0.5) for step in range(100_000)]
    points[777], points[50_001] = (777, 9.0), (50_001, -9.0)
    found = polyline(plot_curves([Curve("a", points)], label="a"))
    assert len(found) <= 402
    heights = [y for _, y in found]
    middle = heights[0]
    assert sorted({y < middle for y in heights}) == [False, True]
    assert max(heights) > middle
    assert found == sorted(found)


def test_a_lone_point_is_a_dot_and_equal_values_have_a_range():
    text = plot_curves([Curve("a", [(4, 0.5)]), Curve("b", [(0, 0.5), (8, 0.5)], 1)], label="a")
    assert text.count("<circle") == 3
    assert text.count("<polyline") == 1
    assert "a at step 4: 0.5" in text
    assert re.findall(r"<li( class=dot)? ", text) == [" class=dot", ""]


def test_curves_of_one_colour_differ_in_dashes():
    text = plot_curves([Curve("a", [(0, 1), (1, 2)], i) for i in (1, 9, 17)], label="a")
    styles = re.findall(r'<polyline class="curve" style="([^"]*)"', text)
    assert all("var(--s1)" in style for style in styles)
    assert len(set(styles)) == 3


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.0, 1.0), ["0", "0.25", "0.5", "0.75", "1"]),
        ((0.0, 0.002), ["0", "0.0005", "0.001", "0.0015", "0.002"]),
        ((1e-7, 1e-6), ["2e-7", "4e-7", "6e-7", "8e-7", "1e-6"]),
        ((0.0, 3e6), ["0", "1M", "2M", "3M"]),
    ],
)
def test_axes_have_round_numbers(values, ticks):
    text = plot_curves([Curve("a", [(0, values[0]), (1, values[1])])], label="a")
    assert y_ticks(text) == ticks


def y_ticks(text):
    return re.findall(r'text-anchor="end">([^<]*)<', text)


def x_ticks(text):
    return re.findall(r'text-anchor="middle">([^<]*)</text>', text)[1:]


@pytest.mark.parametrize(
    ("low", "high"),
    [
        *((0.9999, 0.99995), (0.99999, 1.0), (1_234_500.0, 1_234_600.0), (9_999.0, 10_001.0)),
        *((1.0e-5, 1.1e-5), (2e-4, 9e-4), (-0.5, 0.5), (-3e-7, 1e-7), (0.0, 12_500.0), (7.0, 7.0)),
        *((0.0, 0.0), (0.5, 0.5 + 1e-12), (1e9, 1e9 + 1), (1e-300, 2e-300), (0.0, 1e12)),
    ],
)
def test_ticks_differ_from_each_other_and_say_where_they_are(low, high):
    ticks = y_ticks(plot_curves([Curve("a", [(0, low), (9, high)])], label="a"))
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    values = [float(t.rstrip("kMG").replace(",", "")) * units.get(t[-1], 1) for t in ticks]
    assert 2 <= len({*values}) == len(ticks) <= 12
    gaps = [b - a for a, b in itertools.pairwise(values)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-3)
    assert len({*ticks}) == len(ticks)


def test_axes_are_named_and_steps_are_whole():
    text = plot_curves([Curve("a", [(1, 0.5), (3, 1.0)])], label="a", y="loss")
    assert re.findall(r'<text class="axis-name"[^>]*>([^<]*)<', text) == ["loss", "step"]
    assert x_ticks(text) == ["0", "1", "2", "3"]
    text = plot_curves([Curve("a", [(100, 0.5), (20_000, 1.0)])], label="a")
    assert x_ticks(text) == ["0", "5k", "10k", "15k", "20k"]


def test_shares_are_in_percent_and_their_axis_ends_at_100():
    curve = Curve("val/top1", [(1, 0.25), (2, 1.0)])
    text = plot_curves([curve], label="a", y="accuracy", is_share=True)
    assert ">accuracy, %<" in text
    assert y_ticks(text) == ["40", "60", "80", "100"]
    assert "val/top1 at step 1: 25 %" in text
    # The top of the chart, not a line below it.
    assert min(y for _, y in polyline(text)) == 26
    for value in (0.0, 1.0):
        flat = plot_curves([Curve("a", [(1, value), (2, value)])], label="a", is_share=True)
        assert all(0 <= float(tick) <= 100 for tick in y_ticks(flat))


def test_a_single_bin_of_confidence_is_a_dot():
    text = plot_reliability([(0.9, 0.8, 5)], label="a")
    assert "<polyline" not in text
    assert "confidence 90.0 %, accuracy 80.0 %, 5 examples" in text
    assert ">confidence, %<" in text
    assert ">accuracy, %<" in text


def test_perfect_calibration_lies_on_the_diagonal_and_empty_bins_are_not_there():
    text = plot_reliability([(0.1, 0.1, 5), (0.5, 0.5, 0), (0.9, 0.9, 20)], label="a")
    (x0, y0), (x1, y1) = polyline(text)
    (line,) = re.findall(r'stroke-dasharray[^>]*x1="(.*?)" y1="(.*?)" x2="(.*?)" y2="(.*?)"', text)
    left, bottom, right, top = map(float, line)
    for x, y, value in ((x0, y0, 0.1), (x1, y1, 0.9)):
        assert x == pytest.approx(left + value * (right - left), abs=0.2)
        assert y == pytest.approx(bottom + value * (top - bottom), abs=0.2)
    assert [float(r) for r in re.findall(r' r="(.*?)"', text)] == [4.5, 7.0]


def test_a_confusion_matrix_has_a_cell_for_each_pair_that_occurs_and_escapes_names():
    text = plot_matrix([[3, 1], [0, 0]], ["<b>", "a&b"], label="<i>")
    assert text.count("<rect") == 1 + 2  # the background, and the cells
    page = Page(text)
    assert page.tags.count("b") == page.tags.count("i") == 0
    assert "<b> taken for a&b: 1 of 4" in page.text
    assert re.findall(r"fill-opacity:([\d.]*)", text) == ["0.79", "0.46"]
    assert ">label<" in text
    assert ">predicted<" in text
