"""Dice along an axis of a grid, such as rank, size or shift.

Means over seeds, with the 95 % interval of Student's t as a shade where there are two or more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flap_nvflare.experiments.drawing import (
    COLOURS,
    MARKERS,
    Plot,
    about,
    bounds,
    dice_limits,
    dice_title,
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
    Cell,
    Group,
    axis_title,
    grouped,
    labels,
    value_label,
    value_text,
)
from flap_nvflare.experiments.spread import Spread, spread
from flap_nvflare.experiments.tables import interval_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = {FEDERATED: "-", ALONE: ":", POOLED: "--"}
_MOST_TICKS = 10  # values of an axis that all have a label


@dataclass(frozen=True)
class _Line:
    label: str
    mode: str
    points: tuple[tuple[float, Spread], ...]


def lines(
    cells: Sequence[Cell],
    x: str,
    series: str | None = None,
    *,
    of: str = "mean",
    x_title: str = "",
) -> Plot:
    """Dice along an axis of the grid, one line for each value of another and each mode.

    Args:
        cells: runs of a grid.
        x: the axis from left to right: numbers, on a logarithmic scale if they are powers, or
            names, in the order of the cells.
        series: the axis whose values are lines; None takes all the others together.
        of: a class, `mean` or `worst site`.
        x_title: what the axis is, where its name does not say it.

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
    x_title = x_title or axis_title(x)
    title = f"{dice_title(of)} by {x_title}"
    with style():
        figure = new_figure(4.2, about(cells))
        axes = figure.add_subplot()
        for place, line in enumerate(drawn):
            _draw_line(axes, line, _colour_of(drawn, line), MARKERS[place % len(MARKERS)])
        _x_axis(axes, places, numeric)
        axes.set_xlabel(x_title)
        axes.set_ylabel(f"{dice_title(of)}, %")
        axes.set_ylim(*dice_limits([bounds(found) for line in drawn for _, found in line.points]))
        if len(drawn) > 1:
            figure.draw_without_rendering()
            ends = [(line.points[-1][0], 100 * line.points[-1][1].mean) for line in drawn]
            end_labels(axes, [line.label for line in drawn], ends)
    names = {place: name for name, place in places.items()}
    said = [
        f"{line.label}: "
        + "; ".join(
            f"{interval_text(found.values)} at {x_title} {names[place]}"
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
        value_label(series, group.varied[series])
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
    axes.plot(xs, means, color=colour, marker=marker, ls=_DASHES[line.mode], clip_on=False)
    if len(xs) == 1:
        axes.vlines(xs, lows, highs, color=colour, alpha=0.4)
    else:
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.14, linewidth=0)


def _x_axis(axes: Axes, places: Mapping[str, float], numeric: bool) -> None:
    if numeric and powers(list(places.values())):
        axes.set_xscale("log")
        axes.minorticks_off()
    if not numeric or len(places) <= _MOST_TICKS:
        axes.set_xticks(list(places.values()), list(places))
    axes.grid(visible=False, axis="x")


def powers(values: Sequence[float]) -> bool:
    """Whether three values or more are each the smallest times a power of two, or of ten."""
    low = min(values)
    if low <= 0 or len(values) < 3:
        return False
    return any(
        all(math.isclose(power, round(power), abs_tol=1e-6) for power in found)
        for found in ([math.log(value / low, base) for value in values] for base in (2, 10))
    )
