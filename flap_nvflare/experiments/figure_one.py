"""The paper's figure 1 beside our own: Dice against how much less travels, by method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flap_nvflare.experiments.drawing import (
    COLOURS,
    INK,
    MARKERS,
    SMALL,
    Plot,
    about,
    bounds,
    dice_limits,
    new_figure,
    style,
)
from flap_nvflare.experiments.groups import FEDERATED, Cell, Group, grouped
from flap_nvflare.experiments.paper import FEDERATION, PAPER, PaperRow
from flap_nvflare.experiments.spread import spread
from flap_nvflare.experiments.tables import interval_text, points_text, reduction
from flap_nvflare.settings import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {
    "lora": "LoRA",
    "lora_decoder": "LoRA + decoder (SAMed)",
    "flap": "FLAP-SAM (LoRA + partial decoder)",
}
_METHODS = METHODS[::-1]  # the paper's own method, their last, has the first colour
_MOST_ACROSS = 2  # panels
_LEGEND = "number at a point: gain over\ntraining alone, points of Dice"
# Where a gain may stand at its point: offset in points, and which of its ends is there.
_SIDES = (
    ((7, 0), "left", "center"),
    ((-7, 0), "right", "center"),
    ((5, 3), "left", "bottom"),
    ((5, -3), "left", "top"),
    ((-5, 3), "right", "bottom"),
    ((-5, -3), "right", "top"),
)


@dataclass(frozen=True)
class _Point:
    """A method of a panel; Dice and gain in percent."""

    method: str
    reduction: float
    dice: float
    low: float
    high: float
    gain: float | None
    said: str


@dataclass(frozen=True)
class _Panel:
    title: str
    points: tuple[_Point, ...]
    left_out: tuple[str, ...] = ()


def figure_of(federations: Mapping[str, Sequence[Cell]], paper: Sequence[PaperRow] = PAPER) -> Plot:
    """Dice against the reduction of bytes, with the gain over training alone at each point.

    Args:
        federations: cells by the federation's name, those of the sites alone among them, from
            which the gain comes.
        paper: the paper's rows, a panel of their own; what is in doubt there is left out.

    Raises:
        ValueError: if no federation has a cell whose bytes and Dice are known.
        SettingsError: if matplotlib is not installed.
    """
    ours = [_own_panel(name, cells) for name, cells in federations.items()]
    if not any(panel.points for panel in ours):
        raise ValueError("no federated cell has bytes and a Dice: there is nothing to draw")
    panels = [_paper_panel(paper), *ours] if paper else ours
    across = min(_MOST_ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    note = about([cell for cells in federations.values() for cell in cells])
    with style():
        figure = new_figure(2.9 * down + 1.2, f"ours: {note}" if paper else note)
        places = list(figure.subplots(down, across, sharex=True, squeeze=False).flat)
        for panel, axes in zip(panels, places, strict=False):
            _draw(axes, panel)
        _axis_titles(places[: len(panels)], across)
        _legend(figure, panels, places[len(panels) :])
        figure.draw_without_rendering()  # where the points are
        for panel, axes in zip(panels, places, strict=False):
            _write_gains(axes, panel)
    said = [f"{panel.title}: " + "; ".join(_said(panel)) for panel in panels]
    return Plot(figure, "Dice against the reduction of bytes", ". ".join(said))


def _paper_panel(rows: Sequence[PaperRow]) -> _Panel:
    points, left_out = [], []
    for row in rows:
        if row.sure_dice is None:
            left_out.append(row.method)
            continue
        gain = "not known" if row.sure_gain is None else f"{row.sure_gain:+.2f}"
        said = f"{row.sure_dice:.1f}, gain {gain}"
        dice = row.sure_dice
        points.append(_Point(row.method, row.reduction, dice, dice, dice, row.sure_gain, said))
    return _Panel(f"{FEDERATION}, as the paper prints it", tuple(points), tuple(left_out))


def _own_panel(name: str, cells: Sequence[Cell]) -> _Panel:
    points, left_out = [], []
    for group in grouped(cells):
        if group.mode == FEDERATED:
            point = _own_point(group, cells)
            if point is None:
                left_out.append(_method(group))
            else:
                points.append(point)
    return _Panel(name, tuple(points), tuple(left_out))


def _own_point(group: Group, cells: Sequence[Cell]) -> _Point | None:
    dice, times = spread(group.dice("mean")), spread([reduction(cell) for cell in group.cells])
    if dice is None or times is None:
        return None
    gains = group.gains(cells)
    gain = spread(gains)
    said = f"{interval_text(group.dice('mean'))}, gain {interval_text(gains)}"
    low, high = bounds(dice)
    points = None if gain is None else 100 * gain.mean
    return _Point(_method(group), times.mean, 100 * dice.mean, low, high, points, said)


def _method(group: Group) -> str:
    return str(group.cells[0]["federation"].get("method"))


def _draw(axes: Axes, panel: _Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_title(panel.title)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    for point in panel.points:
        colour, marker = _look(point.method)
        axes.vlines(point.reduction, point.low, point.high, color=colour, linewidth=1.2)
        # Not cut off at the axis where the Dice is 0.
        axes.plot(
            point.reduction, point.dice, color=colour, marker=marker, markersize=8, clip_on=False
        )
    if panel.points:
        axes.set_ylim(*dice_limits([(point.low, point.high) for point in panel.points]))
    if panel.left_out:
        names = ", ".join(map(_title, panel.left_out))
        axes.text(0.02, 0.02, f"not known: {names}", transform=axes.transAxes, fontsize=SMALL)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def _axis_titles(places: Sequence[Axes], across: int) -> None:
    """Below each column's lowest panel and left of each row."""
    for place, axes in enumerate(places):
        if place + across >= len(places):
            axes.set_xlabel("times fewer bytes than full fine-tuning")
            axes.tick_params(labelbottom=True)
        if place % across == 0:
            axes.set_ylabel("mean Dice, %")


def _write_gains(axes: Axes, panel: _Panel) -> None:
    """The gain beside each point, on the first side where it covers no point and no other gain."""
    from matplotlib.transforms import Bbox

    def box(reduction: float, low: float, high: float, half: float) -> Bbox:
        """Around a point, or an upright line of the plot; `half` a width in points."""
        by = half * axes.figure.dpi / 72
        x, bottom = axes.transData.transform((reduction, low))
        top = axes.transData.transform((reduction, high))[1]
        return Bbox([[x - by, bottom - by], [x + by, top + by]])

    taken = [box(p.reduction, p.dice, p.dice, 4) for p in panel.points]
    taken += [box(p.reduction, p.low, p.high, 1) for p in panel.points]
    for point in panel.points:
        text = "gain ?" if point.gain is None else points_text(point.gain)
        shown = axes.annotate(
            text,
            (point.reduction, point.dice),
            _SIDES[0][0],
            textcoords="offset points",
            fontsize=SMALL,
        )
        for offset, across, up in (*_SIDES, _SIDES[0]):
            shown.set(position=offset, ha=across, va=up)
            if not any(shown.get_window_extent().overlaps(other) for other in taken):
                break
        taken.append(shown.get_window_extent())


def _legend(figure: Figure, panels: Sequence[_Panel], free: Sequence[Axes]) -> None:
    """One legend, in the order of the paper's methods: where a panel is free, or below all."""
    from matplotlib.lines import Line2D

    drawn = {point.method for panel in panels for point in panel.points}
    handles = []
    for name in [*(name for name in METHODS if name in drawn), *sorted(drawn - set(METHODS))]:
        colour, marker = _look(name)
        handles.append(Line2D([], [], ls="", marker=marker, color=colour, label=_title(name)))
    if free:
        free[0].set_axis_off()
        free[0].legend(handles=handles, loc="center left", title=_LEGEND, alignment="left")
    else:
        figure.legend(
            handles=handles, loc="outside lower center", title=_LEGEND.replace("\n", " "), ncols=3
        )


def _look(method: str) -> tuple[str, str]:
    """Colour and marker, the same in every panel and figure."""
    place = _METHODS.index(method) if method in _METHODS else None
    return (INK, "*") if place is None else (COLOURS[place], MARKERS[place])


def _title(method: str) -> str:
    return _TITLES.get(method, method.replace("_", " "))


def _said(panel: _Panel) -> list[str]:
    found = [f"{_title(p.method)} {p.said}, {p.reduction:.1f} times fewer" for p in panel.points]
    return found + [f"{_title(name)} left out" for name in panel.left_out]
