"""Ticks, ranges, smoothing, and coordinates of the SVG plots."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from megatron_occ.observe import Series, plot_series_svg, write_plot
from megatron_occ.observe.plot import line_path
from megatron_occ.observe.plot_bars import plot_stacked_bars_svg
from megatron_occ.observe.plot_intervals import IntervalRow, plot_intervals_svg
from megatron_occ.observe.plot_scale import (
    Scale,
    bucket_means,
    nice_range,
    robust_range,
    smooth,
    step_ticks,
    thin,
    tick_step,
)
from megatron_occ.observe.text import (
    escape,
    format_duration,
    format_number,
    format_points,
    tick_formatter,
)

SVG = "{http://www.w3.org/2000/svg}"


def by_class(svg, name):
    root = ElementTree.fromstring(svg)
    return [node for node in root.iter() if name in node.get("class", "").split()]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, 0.2), (0, 10, 2), (0, 7, 1), (0, 17, 5), (0, 0.03, 0.005), (0, 4e6, 1e6)],
)
def test_tick_step_is_one_two_or_five(low, high, expected):
    assert tick_step(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.13, 0.58, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        (-0.3, 1.1, [-0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]),
        (0.0, 0.3, [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
        (2.0, 2.0, [1.8, 1.9, 2.0, 2.1, 2.2]),
        (0.0, 0.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_nice_range_ends_on_ticks_without_rounding_noise(low, high, ticks):
    assert nice_range(low, high) == (ticks[0], ticks[-1], ticks)


def test_step_ticks_are_whole_numbers_inside_the_range():
    assert step_ticks(1, 4) == [1, 2, 3, 4]
    assert step_ticks(1, 200) == [50, 100, 150, 200]
    assert step_ticks(7, 7) == [7]


def test_tick_labels_have_the_decimals_that_tell_them_apart():
    def labels(ticks, percent=False):
        return [tick_formatter(ticks, percent)(tick) for tick in ticks]

    assert labels([-0.05, 0.0, 0.05]) == ["\N{MINUS SIGN}0.05", "0.00", "0.05"]
    assert labels([0.0, 0.2, 0.4], percent=True) == ["0%", "20%", "40%"]
    assert labels([0.0, 0.005, 0.01], percent=True) == ["0.0%", "0.5%", "1.0%"]
    assert labels([0.0, 20_000.0, 40_000.0]) == ["0", "20k", "40k"]
    assert labels([1_000_000.0, 1_500_000.0]) == ["1.0M", "1.5M"]
    assert labels([0.0, 5e-7, 1e-6]) == ["0", "5e-7", "1e-6"]
    assert labels([0.0, 1000.0, 2000.0]) == ["0", "1,000", "2,000"]


def test_numbers_for_people():
    values = [0.0, 0.51234, 12.345, 1234.5, 41_500.0, 2.4e-6, -0.05]
    assert [format_number(value) for value in values] == [
        "0",
        "0.512",
        "12.3",
        "1,234",
        "41.5k",
        "2.4e-6",
        "-0.0500",
    ]
    assert format_number(math.nan) == "nan"
    assert format_points(0.267) == "+26.7"
    assert format_points(-0.01) == "\N{MINUS SIGN}1.0"
    seconds = [0.08, 8.2, 204, 8040, 273_600]
    assert [format_duration(s) for s in seconds] == [
        "80 ms",
        "8.2 s",
        "3 min 24 s",
        "2 h 14 min",
        "3 d 4 h",
    ]


def test_smoothing_keeps_a_line_and_removes_a_spike():
    line = [(float(i), 2.0 * i) for i in range(30)]
    assert smooth(line, 3)[6:-6] == line[6:-6]
    spiked = [(float(i), 1e20 if i == 15 else 1.0) for i in range(30)]
    assert all(y == 1.0 for _, y in smooth(spiked, 3))


def test_smoothing_leaves_out_what_is_not_finite():
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 1.0)]
    assert [y for _, y in smooth(points, 1)] == [1.0] * 4
    assert all(math.isnan(y) for _, y in smooth([(0.0, math.nan)] * 3, 1))


def test_thinning_keeps_the_extremes_in_order():
    points = [(float(i), math.sin(i)) for i in range(10_000)]
    points[4321] = (4321.0, 50.0)
    points[77] = (77.0, -50.0)
    kept = thin(points, 400)
    assert len(kept) <= 400
    assert kept == sorted(kept)
    assert (4321.0, 50.0) in kept
    assert (77.0, -50.0) in kept
    assert thin(points[:10], 400) == points[:10]


def test_bucket_means_average_equal_stretches():
    points = [(float(i), float(i % 2)) for i in range(8)]
    assert bucket_means(points, 4) == [(0.5, 0.5), (2.5, 0.5), (4.5, 0.5), (6.5, 0.5)]
    assert bucket_means(points, 8) == points


def test_range_leaves_out_rare_spikes_only():
    calm = [i / 100 for i in range(200)]
    assert robust_range(calm) == (0.0, 1.99)
    low, high = robust_range([*calm, 1000.0])
    assert low == 0.0
    assert 1.9 < high < 3.0
    assert robust_range([1.0] * 50 + [9.0]) == (1.0, 9.0)


def test_path_coordinates_and_gaps():
    x, y = Scale(0, 10, 100, 200), Scale(0, 1, 50, 10)
    points = [(0, 0.0), (5, 0.5), (6, math.nan), (8, 1.0), (10, 0.25)]
    assert line_path(points, x, y) == "M100.0 50.0L150.0 30.0M180.0 10.0L200.0 40.0"


def test_known_series_lands_where_it_should():
    # 480 x 220: x from 46 (room for labels) to 468, y from 184 (0%) to 10 (100%).
    svg = plot_series_svg([Series("a", [(0, 0.0), (5, 0.5), (10, 1.0)], color=3)], percent=True)
    (line,) = by_class(svg, "line")
    assert line.get("d") == "M46.0 184.0L257.0 97.0L468.0 10.0"
    assert line.get("class") == "line c3"
    markers = by_class(svg, "marker")
    assert [(m.get("cx"), m.get("cy")) for m in markers] == [
        ("46.0", "184.0"),
        ("257.0", "97.0"),
        ("468.0", "10.0"),
    ]
    assert {"0%", "20%", "100%"} <= {node.text for node in ElementTree.fromstring(svg)}


def test_long_series_get_a_raw_and_a_smoothed_line():
    points = [(float(i), float(i % 2)) for i in range(100)]
    svg = plot_series_svg([Series("a", points)])
    raw, smoothed = by_class(svg, "line")
    assert "raw" in raw.get("class")
    assert "raw" not in smoothed.get("class")
    heights = [float(v) for v in re.findall(r" ([\d.]+)", smoothed.get("d"))]
    assert max(heights) - min(heights) < 0.75 * 174
    assert len(by_class(plot_series_svg([Series("a", points, smoothed=False)]), "line")) == 1


def test_points_outside_the_range_are_counted_and_clipped():
    points = [(float(i), 0.5 + 0.1 * (i % 5)) for i in range(300)]
    points[150] = (150.0, 1e9)
    svg = plot_series_svg([Series("a", points)])
    assert "1 point outside the range shown" in svg
    heights = [
        float(y) for node in by_class(svg, "line") for y in re.findall(r" ([\d.]+)", node.get("d"))
    ]
    assert min(heights) == 10.0
    assert max(heights) <= 184.0


def test_nothing_finite_is_refused():
    with pytest.raises(ValueError, match="no series has a finite value"):
        plot_series_svg([Series("a", [(0, math.nan)])], title="lambda")
    with pytest.raises(ValueError, match="no series has a finite value"):
        plot_stacked_bars_svg([Series("a", [])])


def test_labels_are_escaped_and_tooltips_list_every_series():
    series = [Series("<b>&", [(0, 1.0), (1, 2.0)]), Series("other", [(0, 3.0), (1, 4.0)])]
    svg = plot_series_svg(series, title='"><script>')
    assert "<script" not in svg
    assert "<b>" not in svg
    tips = [node.text for node in ElementTree.fromstring(svg).iter(f"{SVG}title")]
    assert tips == ["step 0\n<b>&: 1.00\nother: 3.00", "step 1\n<b>&: 2.00\nother: 4.00"]


def test_escape_makes_any_text_printable():
    assert escape("a<b>\x00\x1b\n'\udc00") == "a&lt;b&gt;\u2400\u241b\n&#x27;?"


def test_written_plot_stands_alone(tmp_path):
    series = [Series("detach", [(0, 0.4), (10, 0.6)]), Series("occ", [(0, 0.4), (10, 0.7)], 2)]
    path = write_plot(tmp_path / "figures" / "plot.svg", series, title="pass@1", percent=True)
    root = ElementTree.parse(path).getroot()
    assert root.get("viewBox") == "0 0 720 360"
    assert "prefers-color-scheme: dark" in root.find(f"{SVG}style").text
    texts = [node.text for node in root.iter(f"{SVG}text")]
    assert {"pass@1", "detach", "occ", "40%", "70%"} <= set(texts)
    assert not re.search(r"(href|src|url)\s*[=(]", path.read_text())


def test_stacked_bars_have_the_heights_of_their_values():
    # Totals 3 and 4 on an axis from 0 (y 184) to 4 (y 10): 43.5 a second.
    series = [Series("a", [(1, 1.0), (2, 3.0)], 1), Series("b", [(1, 2.0), (2, 1.0)], 2)]
    bars = by_class(plot_stacked_bars_svg(series), "bar")
    boxes = [(b.get("class"), float(b.get("y")), float(b.get("height"))) for b in bars]
    assert boxes == [
        ("bar c1", 140.5, 43.5),
        ("bar c2", 53.5, 87.0),
        ("bar c1", 53.5, 130.5),
        ("bar c2", 10.0, 43.5),
    ]


def test_many_steps_share_bars_that_show_the_mean():
    series = [Series("a", [(i, float(i % 2)) for i in range(120)])]
    bars = by_class(plot_stacked_bars_svg(series), "bar")
    assert len(bars) == 60
    assert bars[0].find(f"{SVG}title").text == "steps 0 to 1, mean\na: 500 ms"


def test_a_band_is_the_area_between_its_ends_and_belongs_to_the_range():
    series = Series("a", [(0, 2.0), (10, 2.0)], band=[(0, 0.0, 4.0), (10, 1.0, 3.0)])
    svg = plot_series_svg([series], width=480, height=220)
    (band,) = by_class(svg, "band")
    corners = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", band.get("d"))]
    # the y range 0 to 4 is drawn from 184 up to 10; upper end first, lower end back
    assert [y for _, y in corners] == [10.0, 53.5, 140.5, 184.0]
    assert corners[0][0] == corners[3][0] < corners[1][0] == corners[2][0] == 468.0


def test_plots_that_share_a_range_share_their_ticks():
    low, high = ([(0, 0.1), (1, 0.2)], [(0, 0.8), (1, 0.9)])
    labels = [
        re.findall(r'text-anchor="end">([^<]+)<', plot_series_svg([Series("a", points)], **options))
        for points in (low, high)
        for options in ({}, {"y_range": (0.0, 1.0)})
    ]
    assert labels[1] == labels[3] != labels[0] != labels[2]


def test_intervals_lie_where_their_numbers_are():
    rows = [
        IntervalRow("first", 0.01, (-0.01, 0.03), [0.0, 0.02], cells=("+1.0",)),
        IntervalRow("second", -0.02, None, [-0.02], color=2, cells=("\N{MINUS SIGN}2.0",)),
    ]
    svg = plot_intervals_svg(rows, title="t", heads=("mean",), width=600, percent=True)
    (zero,) = by_class(svg, "zero")
    origin = float(re.match(r"M([\d.]+)", zero.get("d"))[1])
    first, second = (float(node.get("cx")) for node in by_class(svg, "marker"))
    point = first - origin  # of one percentage point
    assert second - origin == pytest.approx(-2 * point, abs=0.2)
    (line,) = by_class(svg, "line")
    low, high = map(float, re.match(r"M([\d.]+) [\d.]+H([\d.]+)", line.get("d")).groups())
    assert (low - origin, high - origin) == pytest.approx((-point, 3 * point), abs=0.2)
    assert len(by_class(svg, "hollow")) == 1 and len(by_class(svg, "dot")) == 3
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert "second" in text and "mean" in text and "\N{MINUS SIGN}2.0" in text
