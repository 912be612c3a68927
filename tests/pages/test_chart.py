# SPDX-License-Identifier: Apache-2.0
"""Charts: what is drawn where, and nothing of what is no number."""

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
    assert "a at 4: 0.5" in text


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
    assert re.findall(r'text-anchor="end">([^<]*)<', text) == ticks


def test_perfect_calibration_lies_on_the_diagonal_and_empty_bins_are_not_there():
    text = plot_reliability([(0.1, 0.1, 5), (0.5, 0.5, 0), (0.9, 0.9, 20)], label="a")
    (x0, y0), (x1, y1) = polyline(text)
    (line,) = re.findall(r'stroke-dasharray[^>]*x1="(.*?)" y1="(.*?)" x2="(.*?)" y2="(.*?)"', text)
    left, bottom, right, top = map(float, line)
    for x, y, value in ((x0, y0, 0.1), (x1, y1, 0.9)):
        assert x == pytest.approx(left + value * (right - left), abs=0.2)
        assert y == pytest.approx(bottom + value * (top - bottom), abs=0.2)
    assert [float(r) for r in re.findall(r' r="(.*?)"', text)] == [4.5, 7.0]


def test_a_confusion_matrix_has_a_cell_for_each_pair_and_escapes_names():
    text = plot_matrix([[3, 1], [0, 0]], ["<b>", "a&b"], label="<i>")
    assert text.count("<rect") == 4
    page = Page(text)
    assert page.tags.count("b") == page.tags.count("i") == 0
    assert "<b> taken for a&b: 1 of 4" in page.text
    assert re.findall(r"fill-opacity:([\d.]*)", text) == ["0.69", "0.27", "0.06", "0.06"]
