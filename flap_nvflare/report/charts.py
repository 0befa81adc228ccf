"""Line charts: from points to what the template draws.

The lines are an SVG that stretches with the page; ticks and legends are HTML text beside it, so
that letters keep their size on a telephone. All positions are percent of the plot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flap_nvflare.report.figures import Points
from flap_nvflare.report.palette import SERIES
from flap_nvflare.report.units import NONE, axis_texts, decade_texts
from flap_nvflare.report.values import shown

_MOST_DOTS = 800  # beyond them the points of a chart stand in its table alone
_MOST_TICKS = 6


@dataclass(frozen=True)
class Series:
    """Points with a name; `role` is the class of the style sheet that colours them."""

    name: str
    points: Points
    role: str


@dataclass(frozen=True)
class Tick:
    """A label at so many percent of an axis, from the left or the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """A point at percent from the left and the top, and what it says when pointed at."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    """A series as the SVG draws it."""

    name: str
    role: str
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `left` columns are names, the rest numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


@dataclass(frozen=True)
class Chart:
    """A line chart.

    Attributes:
        key: a name for links inside the page.
        title, unit: of the figure and of its upright axis.
        x_label: of the level axis.
        description: a sentence for those who hear the page.
        lines: the series.
        legend: name and role of each line that the legend tells.
        x_ticks, y_ticks: labels of the axes.
        table: all its numbers.
        note: a line below it.
    """

    key: str
    title: str
    unit: str
    x_label: str
    description: str
    lines: tuple[Line, ...]
    legend: tuple[tuple[str, str], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    table: Table
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`, logarithmic or not, with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Percent of the way from `low` to `high`."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return round(100 * (math.log10(value) - low) / (high - low), 3)
        return round(100 * (value - self.low) / (self.high - self.low), 3)


def line_chart(
    series: Sequence[Series],
    *,
    key: str,
    title: str,
    unit: str,
    text: Callable[[float | None], str],
    tick_unit: str = "",
    x_label: str = "round",
    log: bool = False,
    zero: bool = False,
    limits: tuple[float, float] | None = None,
    note: str = "",
    table_of: Sequence[Series] | None = None,
) -> Chart | None:
    """The chart of some series; None if no point has a figure.

    Args:
        series: what to draw; the last lies on top.
        key, title, unit, x_label, note: as in `Chart`.
        text: a figure with its unit.
        tick_unit: what stands behind the numbers of an even upright axis.
        log: whether the upright axis is logarithmic, of bytes; points of 0 are then left out.
        zero: whether the upright axis starts at 0.
        limits: what the upright axis never goes beyond.
        table_of: what the table holds in place of `series`.
    """
    points = [
        (x, y) for one in series for x, y in one.points if y is not None and (y > 0 or not log)
    ]
    if not points:
        return None
    xs, ys = [x for x, _ in points], [y for _, y in points]
    across = whole_axis(min(xs), max(xs))
    upright = log_axis(min(ys), max(ys)) if log else nice_axis(min(ys), max(ys), zero, limits)
    labels = decade_texts(upright.ticks) if log else axis_texts(upright.ticks, tick_unit)
    dots = len(points) <= _MOST_DOTS
    told = [(shown(one.name, 40), one.role) for one in series if one.role != "faint"]
    faint = sum(one.role == "faint" for one in series)
    if faint:
        told.append((f"{faint} other sites", "faint"))
    return Chart(
        key=key,
        title=title,
        unit=unit,
        x_label=x_label,
        description=_description(series, text, x_label),
        lines=tuple(_line(one, across, upright, text, x_label, dots) for one in series),
        legend=tuple(told) if len(told) > 1 else (),
        x_ticks=tuple(Tick(across.place(at), f"{at:g}") for at in across.ticks),
        y_ticks=tuple(
            Tick(round(100 - upright.place(at), 3), label)
            for at, label in zip(upright.ticks, labels, strict=True)
        ),
        table=points_table(table_of or series, text, x_label),
        note=note,
    )


def coloured(by_name: Mapping[str, Points]) -> list[Series]:
    """A colour each for a few; of many the lowest and highest at the end, the others faint."""
    names = list(by_name)
    if len(names) <= SERIES:
        return [Series(name, by_name[name], f"s{i}") for i, name in enumerate(names)]
    last = {name: by_name[name][-1][1] for name in names}
    known = {name: value for name, value in last.items() if value is not None}
    if not known:
        return [Series(name, by_name[name], "faint") for name in names]
    low = min(known, key=lambda name: known[name])
    high = max(known, key=lambda name: known[name])
    ends = [Series(f"{low}, lowest at the end", by_name[low], "s1")]
    if high != low:
        ends.append(Series(f"{high}, highest at the end", by_name[high], "s0"))
    faint = [Series(name, by_name[name], "faint") for name in names if name not in (low, high)]
    return [*faint, *ends]


def points_table(
    series: Sequence[Series], text: Callable[[float | None], str], x_label: str
) -> Table:
    """One row for each x, one column for each series."""
    by_name = [dict(one.points) for one in series]
    xs = sorted({x for points in by_name for x in points})
    rows = [(f"{x:g}", *(text(points.get(x)) for points in by_name)) for x in xs]
    return Table((x_label, *(shown(one.name, 40) for one in series)), tuple(rows))


def nice_axis(
    low: float, high: float, zero: bool = False, limits: tuple[float, float] | None = None
) -> Axis:
    """From a round number below to a round number above, in round steps, within the limits."""
    if limits is not None:
        low, high = (min(max(end, limits[0]), limits[1]) for end in (low, high))
    if zero:
        low = min(0.0, low)
    if high - low < 1e-12 * max(abs(high), 1e-300):
        half = abs(high) / 10 or 0.5
        low, high = (low if zero else low - half), high + half
    step = _nice_step((high - low) / (_MOST_TICKS - 2))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if limits is not None:
        first = max(first, math.ceil(limits[0] / step - 1e-9))
        last = min(last, math.floor(limits[1] / step + 1e-9))
    ticks = tuple(float(f"{place * step:.12g}") for place in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(low: float, high: float) -> Axis:
    """Whole decades, the fewest that hold both ends; not every one has a tick."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = math.ceil((last - first) / (_MOST_TICKS - 1))
    ticks = tuple(10.0**power for power in range(first, last + 1, every))
    return Axis(10.0**first, 10.0**last, ticks, log=True)


def whole_axis(low: float, high: float) -> Axis:
    """Whole numbers, as rounds are; a single one lies in the middle."""
    if high == low:
        return Axis(low - 1, high + 1, (low,))
    step = max(1.0, _nice_step((high - low) / _MOST_TICKS, whole=True))
    ticks = [low] if low % step else []
    ticks += [place * step for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
    # The first round and the first round number may lie too near each other for two labels.
    if len(ticks) > 1 and ticks[1] - ticks[0] < step / 2:
        ticks.pop(1)
    return Axis(low, high, tuple(ticks))


def _nice_step(least: float, whole: bool = False) -> float:
    """The smallest of 1, 2, 5 (or 2.5) times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    choices = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    return next(choice * power for choice in choices if choice * power >= least * (1 - 1e-9))


def _line(
    one: Series,
    across: Axis,
    upright: Axis,
    text: Callable[[float | None], str],
    x_label: str,
    dots: bool,
) -> Line:
    path, marks, pen_down = [], [], False
    for x, y in one.points:
        if y is None or (upright.log and y <= 0):
            pen_down = False
            continue
        left, top = across.place(x), round(100 - upright.place(y), 3)
        path.append(f"{'L' if pen_down else 'M'}{left:g} {top:g}")
        marks.append(Dot(left, top, f"{shown(one.name, 40)}, {x_label} {x:g}: {text(y)}"))
        pen_down = True
    keep = (dots and one.role not in ("faint", "full")) or len(marks) == 1
    return Line(one.name, one.role, "".join(path), tuple(marks) if keep else ())


def _description(
    series: Sequence[Series], text: Callable[[float | None], str], x_label: str
) -> str:
    """The first and last figure of the lines that the legend names."""
    parts = []
    for one in series:
        known = [(x, y) for x, y in one.points if y is not None]
        if known and one.role != "faint":
            (x, first), (last_x, last) = known[0], known[-1]
            parts.append(
                f"{shown(one.name, 40)}: {text(first)} at {x_label} {x:g}, "
                f"{text(last)} at {x_label} {last_x:g}"
            )
    return "; ".join(parts) or NONE
