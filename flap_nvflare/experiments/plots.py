"""The plots that a grid may ask for, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flap_nvflare.experiments.drawing import Plot
from flap_nvflare.experiments.figure_one import figure_one
from flap_nvflare.experiments.groups import Cell, value_text
from flap_nvflare.experiments.lines import lines
from flap_nvflare.experiments.rows import bars, matrix

__all__ = ["PLOTS", "Plot", "bars", "draw", "figure_one", "lines", "matrix"]


def _figure_one(cells: Sequence[Cell], *, by: str = "", title: str = "ours") -> Plot:
    """`figure_one` with a panel for each value of the axis `by`, or a single one."""
    federations: dict[str, list[Cell]] = {}
    for cell in cells:
        if by and by not in cell["varied"]:
            raise ValueError(f"a cell has no axis {by!r}, only {sorted(cell['varied'])}")
        name = value_text(by, cell["varied"][by]) if by else title
        federations.setdefault(name, []).append(cell)
    return figure_one(federations)


PLOTS: Mapping[str, Callable[..., Plot]] = {
    "lines": lines,
    "bars": bars,
    "matrix": matrix,
    "figure_one": _figure_one,
}


def draw(kind: str, cells: Sequence[Cell], options: Mapping[str, Any]) -> Plot:
    """A plot of the cells as a grid's file asks for it.

    Args:
        kind: one of `PLOTS`.
        cells: runs of a grid.
        options: what the plot is told besides: `x`, `series`, `of` and `x_title` of lines; `of`
            of bars; `by` (the axis whose values have panels) or `title` of figure_one.

    Raises:
        ValueError: on an unknown kind or option, or if nothing can be drawn.
        SettingsError: if matplotlib is not installed.
    """
    if kind not in PLOTS:
        raise ValueError(f"plot {kind!r} is not known; expected one of {tuple(PLOTS)}")
    try:
        call = inspect.signature(PLOTS[kind]).bind(cells, **options)
    except TypeError as error:
        known = list(inspect.signature(PLOTS[kind]).parameters)[1:]
        raise ValueError(f"plot {kind}: {error}; its options are {known}") from error
    return PLOTS[kind](*call.args, **call.kwargs)
