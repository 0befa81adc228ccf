"""Axes, lines, colours and the texts of numbers."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flap_nvflare.report import units
from flap_nvflare.report.charts import Series, coloured, line_chart, log_axis, nice_axis, whole_axis
from flap_nvflare.report.heat_map import heat_map
from flap_nvflare.report.palette import STEPS, contrast, heat_colour, heat_css
from flap_nvflare.report.values import count, number, share, shown

SIZES = st.floats(-1e9, 1e9, allow_nan=False)


@given(low=SIZES, size=st.floats(0, 1e9))
def test_an_axis_holds_its_ends_between_few_even_ticks(low: float, size: float) -> None:
    high = low + size
    axis = nice_axis(low, high)
    tolerance = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert axis.low <= low + tolerance
    assert axis.high >= high - tolerance
    assert 2 <= len(axis.ticks) <= 8
    steps = [b - a for a, b in itertools.pairwise(axis.ticks)]
    assert max(steps) - min(steps) <= 1e-6 * max(map(abs, axis.ticks))


@given(low=st.integers(0, 5000), size=st.integers(0, 100_000))
def test_labels_of_rounds_are_few_whole_and_inside(low: int, size: int) -> None:
    axis = whole_axis(low, low + size)
    assert 1 <= len(axis.ticks) <= 8
    assert all(tick == int(tick) and low <= tick <= low + size for tick in axis.ticks)
    places = [axis.place(tick) for tick in axis.ticks]
    assert all(b - a >= 5 for a, b in itertools.pairwise(places))  # no label on another


@given(low=st.floats(1, 1e15), times=st.floats(1, 1e9))
def test_a_scale_of_powers_holds_its_ends(low: float, times: float) -> None:
    axis = log_axis(low, low * times)
    assert axis.low <= low * (1 + 1e-9)
    assert axis.high >= low * times * (1 - 1e-9)
    assert 1 <= len(axis.ticks) <= 6
    assert all(math.log10(tick) == round(math.log10(tick)) for tick in axis.ticks)


def test_the_error_of_an_exact_rule_has_a_scale() -> None:
    axis = nice_axis(2e-17, 8e-17, zero=True)
    assert axis.ticks == (0.0, 2e-17, 4e-17, 6e-17, 8e-17)
    assert units.axis_texts(axis.ticks, " %")[1] == "2e-17 %"
    assert axis.place(6e-17) == 75.0


def test_a_dice_axis_stays_within_its_limits() -> None:
    axis = nice_axis(0.97, 1.0, limits=(0.0, 1.0))
    assert axis.high == 1.0
    assert nice_axis(0.0, 0.0, limits=(0.0, 1.0)).low == 0.0
    assert nice_axis(1.0, 1.0, limits=(0.0, 1.0)).high == 1.0


def test_a_line_breaks_where_a_figure_is_missing() -> None:
    points = [(1.0, 0.0), (2.0, 1.0), (3.0, None), (4.0, 0.5)]
    chart = line_chart(
        [Series("A", points, "s0")], key="x", title="t", unit="u", text=units.dice_text
    )
    assert chart is not None
    [line] = chart.lines
    assert line.path == "M0 100L33.333 0M100 50"
    assert [dot.label for dot in line.dots] == [
        "A, round 1: 0.000",
        "A, round 2: 1.000",
        "A, round 4: 0.500",
    ]
    assert chart.table.rows == (
        ("1", "0.000"), ("2", "1.000"), ("3", units.NONE), ("4", "0.500"),
    )  # fmt: skip
    assert chart.legend == ()  # one line needs none


def test_no_figure_no_chart() -> None:
    series = [Series("A", [(1.0, None)], "s0")]
    assert line_chart(series, key="x", title="t", unit="u", text=units.dice_text) is None


def test_of_many_sites_only_the_ends_have_colours() -> None:
    sites = {f"site-{i}": [(1.0, i / 100)] for i in range(100)}
    series = coloured(sites)
    assert len(series) == 100
    assert [one.name for one in series if one.role != "faint"] == [
        "site-0, lowest at the end",
        "site-99, highest at the end",
    ]
    chart = line_chart(series, key="x", title="t", unit="u", text=units.dice_text)
    assert chart is not None
    assert len(chart.legend) == 3
    assert chart.legend[-1] == ("98 other sites", "faint")


def test_heat_map_by_hand() -> None:
    found = heat_map(
        {"best": {"A": 0.31, "B": 0.49}, "site_B": {"B": 0.42}},
        ["A", "B"],
        {"best": "best", "site_B": "B's own"},
        {"site_B": "B"},
    )
    assert found is not None
    assert (found.low, found.high) == ("0.30", "0.50")
    (_, best, mean), (name, own, _) = found.rows
    assert [cell.text for cell in best] == ["0.31", "0.49"]
    assert best[0].role == f"h{round(0.05 * (STEPS - 1))}"
    assert mean.text == "0.40"
    assert name == "B's own"
    assert [(cell.text, cell.own) for cell in own] == [(units.NONE, False), ("0.42", True)]


def test_every_colour_of_a_heat_map_bears_its_text() -> None:
    lines = heat_css().splitlines()
    assert len(lines) == STEPS
    for step, line in enumerate(lines):
        ink = (255, 255, 255) if "#fff" in line else (0, 0, 0)
        assert contrast(heat_colour(step), ink) >= 4.5  # WCAG 2.1, AA


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.bytes_text(0), "0 B"),
        (units.bytes_text(999), "999 B"),
        (units.bytes_text(999_999), "1.00 MB"),
        (units.bytes_text(7_385_536), "7.39 MB"),
        (units.bytes_text(362_131_708), "362 MB"),
        (units.bytes_text(None), units.NONE),
        (units.seconds_text(0.42), "0.4 s"),
        (units.seconds_text(59.6), "1 min 00 s"),
        (units.seconds_text(293), "4 min 53 s"),
        (units.seconds_text(3599.7), "1 h 00 min"),
        (units.seconds_text(7500), "2 h 05 min"),
        (units.seconds_text(3 * 86400), "3.0 days"),
        (units.percent_text(0.0143), "1.4 %"),
        (units.times_text(49.04), "49"),
        (units.times_text(2063.2), "2,063"),
        (units.signed_text(-0.0312), "\N{MINUS SIGN}0.031"),
        (units.digits(0.000123456), "0.000123"),
        (units.digits(1e-9), "1.00e-09"),
        (units.plain_text(["a", {"b": 1.5}]), "a, b: 1.5"),
    ],
)
def test_numbers_as_a_reader_wants_them(text: str, expected: str) -> None:
    assert text == expected


def test_labels_of_a_scale_have_the_decimals_of_its_step() -> None:
    assert units.axis_texts([0, 0.25, 0.5], " %") == ["0.00 %", "0.25 %", "0.50 %"]
    assert units.axis_texts([0, 1000, 2000]) == ["0", "1,000", "2,000"]
    assert units.decade_texts([1e4, 1e6]) == ["10 kB", "1 MB"]


def test_values_of_strangers_are_what_they_should_be_or_nothing() -> None:
    for value in (True, "1", None, [], float("nan"), float("inf"), 10**400):
        assert number(value) is None
        assert share(value) is None
        assert count(value) == 0
    assert share(1.5) is None
    assert count(-1) == 0
    assert shown("a\nb\u202ec") == "a?b?c"
    assert shown("x" * 30) == "x" * 23 + "…"
