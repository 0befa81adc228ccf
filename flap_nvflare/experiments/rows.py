"""Dice by row of a grid: as bars, and as a matrix of what was trained and tested on what.

Means over seeds, with the 95 % interval of Student's t where there are two or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flap_nvflare.experiments.drawing import (
    COLOURS,
    INK,
    Plot,
    about,
    bounds,
    dice_title,
    new_figure,
    style,
)
from flap_nvflare.experiments.groups import (
    ALONE,
    FEDERATED,
    POOLED,
    Cell,
    Group,
    elsewhere,
    grouped,
    labels,
)
from flap_nvflare.experiments.spread import spread
from flap_nvflare.experiments.tables import interval_text
from flap_nvflare.report.palette import STEPS, contrast, heat_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHADES = {FEDERATED: COLOURS[0], ALONE: COLOURS[5], POOLED: COLOURS[2]}
_UNKNOWN = (242, 242, 242)


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
        figure = new_figure(1.0 + 0.3 * len(groups), about(cells))
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        panels[0].set_yticks(range(len(rows)), rows)
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
        for name, axes in zip(names, panels, strict=True):
            axes.set_title(name)
            _draw_bars(axes, groups, name)
        figure.supxlabel("Dice, %", fontsize="medium")
        figure.draw_without_rendering()  # how wide the panels are
        for name, axes in zip(names, panels, strict=True):
            _make_room(axes, groups, name)
    said = [
        f"{row}: "
        + ", ".join(f"{dice_title(name)} {interval_text(group.dice(name))}" for name in names)
        for row, group in zip(rows, groups, strict=True)
    ]
    return Plot(figure, f"{', '.join(map(dice_title, names))} by row", ". ".join(said))


def _draw_bars(axes: Axes, groups: Sequence[Group], name: str) -> None:
    for place, group in enumerate(groups):
        text, found = interval_text(group.dice(name)), spread(group.dice(name))
        low, high = bounds(found) if found else (0.0, 0.0)
        if found:
            axes.barh(place, 100 * found.mean, height=0.62, color=_SHADES[group.mode])
            axes.hlines(place, low, high, color=INK, linewidth=1.1)
        shown = axes.annotate(text, (high, place), (4, 0), textcoords="offset points", va="center")
        shown.set_in_layout(False)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _make_room(axes: Axes, groups: Sequence[Group], name: str) -> None:
    """An axis from 0 on which the figures behind the bars find their place."""
    known = [found for found in (spread(group.dice(name)) for group in groups) if found]
    furthest = max(bounds(found)[1] for found in known) or 1.0
    written = max(text.get_window_extent().width for text in axes.texts)
    share = written / axes.get_window_extent().width + 0.06
    axes.set_xlim(0, furthest / max(0.2, 1 - share))
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= min(100, axes.get_xlim()[1])])


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
        figure = new_figure(1.0 + 0.5 * len(rows), about(cells))
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
    """One field of the matrix: dark for 0, light for 100 %, so that matrices compare."""
    from matplotlib.patches import Rectangle

    found = spread(values)
    colour = _UNKNOWN if found is None else heat_colour(round(found.mean * (STEPS - 1)))
    ink = max((0, 0, 0), (255, 255, 255), key=lambda grey: contrast(grey, colour))
    field = Rectangle((x - 0.49, y - 0.48), 0.98, 0.96, color=[part / 255 for part in colour])
    axes.add_patch(field)
    axes.text(x, y, interval_text(values), ha="center", va="center", color=[c / 255 for c in ink])
