"""Plots of a grid's cells: Dice along an axis, by row, and on other test sets.

All Dice are means over seeds, in percent, with the 95 % interval of Student's t where there are
two seeds or more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flap_nvflare.experiments.drawing import (
    COLOURS,
    INK,
    MARKERS,
    Plot,
    bounds,
    dice_limits,
    end_labels,
    new_figure,
    style,
)
from flap_nvflare.experiments.groups import (
    ALONE,
    FEDERATED,
    MODE,
    MODES,
    POOLED,
    WORST,
    Cell,
    Group,
    axis_title,
    grouped,
    labels,
    value_text,
)
from flap_nvflare.experiments.spread import Spread, spread
from flap_nvflare.experiments.tables import elsewhere, interval_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = {FEDERATED: "-", ALONE: ":", POOLED: "--"}
_SHADES = {FEDERATED: COLOURS[0], ALONE: COLOURS[5], POOLED: COLOURS[2]}
_MOST_TICKS = 10  # values of an axis that all have a label
_ROOM = 1.35  # of bars' axes, for the figure behind the longest one


@dataclass(frozen=True)
class _Line:
    label: str
    mode: str
    points: tuple[tuple[float, Spread], ...]


def lines(cells: Sequence[Cell], x: str, series: str | None = None, *, of: str = "mean") -> Plot:
    """Dice along an axis of the grid, one line for each value of another and each mode.

    Args:
        cells: runs of a grid.
        x: the axis from left to right: numbers, on a logarithmic scale if they are powers, or
            names, in the order of the cells.
        series: the axis whose values are lines; None takes all the others together.
        of: a class, `mean` or `worst site`.

    Raises:
        ValueError: if a cell has no such axis, no cell has such a Dice, or two points are one.
        SettingsError: if matplotlib is not installed.
    """
    groups = grouped(cells)
    for name in (x, *([series] if series else [])):
        lacking = next((group for group in groups if name not in group.varied), None)
        if lacking:
            raise ValueError(f"a cell has no axis {name!r}, only {sorted(lacking.varied)}")
    places, numeric = _places(groups, x)
    drawn = _series(groups, x, series, of, places)
    title = f"{_of(of)} by {axis_title(x)}"
    with style():
        figure = new_figure(4.2)
        axes = figure.add_subplot()
        for place, line in enumerate(drawn):
            _draw_line(axes, line, _colour_of(drawn, line), MARKERS[place % len(MARKERS)])
        _x_axis(axes, x, places, numeric)
        axes.set_ylabel(f"{_of(of)}, %")
        axes.set_ylim(*dice_limits([bounds(found) for line in drawn for _, found in line.points]))
        if len(drawn) > 1:
            figure.draw_without_rendering()
            ends = [(line.points[-1][0], 100 * line.points[-1][1].mean) for line in drawn]
            end_labels(axes, [line.label for line in drawn], ends)
    names = {place: name for name, place in places.items()}
    said = [
        f"{line.label}: "
        + "; ".join(
            f"{interval_text(found.values)} at {axis_title(x)} {names[place]}"
            for place, found in line.points
        )
        for line in drawn
    ]
    return Plot(figure, title, ". ".join(said))


def _places(groups: Sequence[Group], x: str) -> tuple[dict[str, float], bool]:
    """Where each value of the axis lies, by its text; and whether these are numbers."""
    values = {value_text(x, group.varied[x]): group.varied[x] for group in groups}
    numeric = all(type(value) in (int, float) for value in values.values())
    places = values if numeric else {text: place for place, text in enumerate(values)}
    return {text: float(place) for text, place in places.items()}, numeric


def _series(
    groups: Sequence[Group], x: str, series: str | None, of: str, places: Mapping[str, float]
) -> list[_Line]:
    """Lines with their points from left to right; points without a Dice are left out."""
    lanes: dict[str, dict[float, Spread]] = {}
    modes: dict[str, str] = {}
    names = _series_labels(groups, x, series)
    for group, label in zip(groups, names, strict=True):
        found, place = spread(group.dice(of)), places[value_text(x, group.varied[x])]
        lane = lanes.setdefault(label, {})
        modes[label] = group.mode
        if place in lane:
            raise ValueError(
                f"two points of the line {label!r} are at {x} = {group.varied[x]!r}: the cells "
                f"differ in more than {x!r} and {series!r}; leave the series out, or cells"
            )
        if found is not None:
            lane[place] = found
    drawn = [
        _Line(label, modes[label], tuple(sorted(lane.items(), key=lambda point: point[0])))
        for label, lane in lanes.items()
        if lane
    ]
    if not drawn:
        raise ValueError(f"no cell has a Dice of {of!r}: there is nothing to draw")
    return drawn


def _series_labels(groups: Sequence[Group], x: str, series: str | None) -> list[str]:
    """Which line each group is a point of."""
    if series is None:
        return labels(groups, but=(x,))
    modes = series != MODE and len({group.mode for group in groups}) > 1
    return [
        value_text(series, group.varied[series])
        + (f", {MODES[group.mode]}" if modes and group.mode != FEDERATED else "")
        for group in groups
    ]


def _colour_of(drawn: Sequence[_Line], line: _Line) -> str:
    """One colour for a value in all modes, which differ in their dashes."""
    stems = list(dict.fromkeys(_stem(one) for one in drawn))
    return COLOURS[stems.index(_stem(line)) % len(COLOURS)]


def _stem(line: _Line) -> str:
    return line.label.removesuffix(f", {MODES[line.mode]}")


def _draw_line(axes: Axes, line: _Line, colour: str, marker: str) -> None:
    xs = [place for place, _ in line.points]
    means = [100 * found.mean for _, found in line.points]
    lows, highs = zip(*(bounds(found) for _, found in line.points), strict=True)
    axes.plot(xs, means, color=colour, marker=marker, linestyle=_DASHES[line.mode])
    if len(xs) == 1:
        axes.vlines(xs, lows, highs, color=colour, alpha=0.4)
    else:
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.14, linewidth=0)


def _x_axis(axes: Axes, x: str, places: Mapping[str, float], numeric: bool) -> None:
    if numeric and powers(list(places.values())):
        axes.set_xscale("log")
        axes.minorticks_off()
    if not numeric or len(places) <= _MOST_TICKS:
        axes.set_xticks(list(places.values()), list(places))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(axis_title(x))


def powers(values: Sequence[float]) -> bool:
    """Whether three values or more are each the smallest times a power of two, or of ten."""
    low = min(values)
    if low <= 0 or len(values) < 3:
        return False
    return any(
        all(math.isclose(power, round(power), abs_tol=1e-6) for power in found)
        for found in ([math.log(value / low, base) for value in values] for base in (2, 10))
    )


def bars(cells: Sequence[Cell], *, of: str | Sequence[str] = "mean") -> Plot:
    """Dice by row, the first on top; several figures lie side by side.

    Args:
        cells: runs of a grid.
        of: classes, `mean` or `worst site`, one or several.

    Raises:
        ValueError: if no cell has such a Dice.
        SettingsError: if matplotlib is not installed.
    """
    groups, names = grouped(cells), [of] if isinstance(of, str) else list(of)
    rows = labels(groups)
    for name in names:
        if not any(spread(group.dice(name)) for group in groups):
            raise ValueError(f"no cell has a Dice of {name!r}: there is nothing to draw")
    with style():
        figure = new_figure(0.8 + 0.32 * len(groups))
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for name, axes in zip(names, panels, strict=True):
            _draw_bars(axes, groups, name)
            axes.set_xlabel(f"{_of(name)}, %")
        panels[0].set_yticks(range(len(rows)), rows)
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
    said = [
        f"{row}: " + ", ".join(f"{_of(name)} {interval_text(group.dice(name))}" for name in names)
        for row, group in zip(rows, groups, strict=True)
    ]
    return Plot(figure, f"{', '.join(map(_of, names))} by row", ". ".join(said))


def _draw_bars(axes: Axes, groups: Sequence[Group], name: str) -> None:
    furthest = 0.0
    for place, group in enumerate(groups):
        text, found = interval_text(group.dice(name)), spread(group.dice(name))
        low, high = bounds(found) if found else (0.0, 0.0)
        if found:
            axes.barh(place, 100 * found.mean, height=0.62, color=_SHADES[group.mode])
            axes.hlines(place, low, high, color=INK, linewidth=1.1)
        axes.annotate(text, (high, place), (5, 0), textcoords="offset points", va="center")
        furthest = max(furthest, high)
    axes.set_xlim(0, furthest * _ROOM)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def matrix(cells: Sequence[Cell]) -> Plot:
    """What was trained on what, and its mean Dice on its own test cases and on other sets.

    Args:
        cells: runs of a grid, some with `elsewhere`.

    Raises:
        ValueError: if no cell was scored on another test set.
        SettingsError: if matplotlib is not installed.
    """
    groups = grouped(cells)
    tests = list(dict.fromkeys(test for cell in cells for test in cell.get("elsewhere") or {}))
    if not tests:
        raise ValueError("no cell was scored on another test set: name some in test_on")
    rows, columns = labels(groups), ["own sites", *tests]
    found = [[group.dice("mean"), *(elsewhere(group, test) for test in tests)] for group in groups]
    with style():
        figure = new_figure(1.0 + 0.5 * len(rows))
        axes = figure.add_subplot()
        for y, row in enumerate(found):
            for x, values in enumerate(row):
                _draw_field(axes, x, y, values)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        axes.set_xlabel("tested on: mean Dice, %")
        axes.set_ylabel("trained on")
    said = [
        f"{row}: "
        + ", ".join(
            f"{interval_text(values)} on {column}"
            for column, values in zip(columns, fields, strict=True)
        )
        for row, fields in zip(rows, found, strict=True)
    ]
    return Plot(figure, "Mean Dice, trained on by tested on", ". ".join(said))


def _draw_field(axes: Axes, x: int, y: int, values: Sequence[float | None]) -> None:
    """One field of the matrix: from dark for 0 to light for 100 %, so that plots compare."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    found = spread(values)
    colour = "#F2F2F2" if found is None else colormaps["viridis"](found.mean)
    gap = 0.02
    axes.add_patch(
        Rectangle((x - 0.5 + gap, y - 0.5 + gap), 1 - 2 * gap, 1 - 2 * gap, color=colour)
    )
    # White reads better on viridis below some two thirds, black above.
    ink = "white" if found is not None and found.mean < 0.6 else "black"
    axes.text(x, y, interval_text(values), ha="center", va="center", color=ink)


def _of(name: str) -> str:
    """The figure in words."""
    return {"mean": "mean Dice", WORST: "mean Dice of the worst site"}.get(name, f"{name} Dice")
