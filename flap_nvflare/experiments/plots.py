"""The plots that a grid may ask for: each takes the cells and what the grid says of it."""

from __future__ import annotations

from collections.abc import Sequence

from flap_nvflare.experiments.drawing import Plot
from flap_nvflare.experiments.figure_one import figure_of
from flap_nvflare.experiments.groups import Cell, value_text
from flap_nvflare.experiments.lines import lines
from flap_nvflare.experiments.rows import bars, matrix

__all__ = ["Plot", "bars", "figure_one", "lines", "matrix"]


def figure_one(cells: Sequence[Cell], *, by: str = "data.kind") -> Plot:
    """The paper's figure 1 beside ours, a panel for each federation.

    Args:
        cells: runs of a grid, those of the sites alone among them, from which the gain comes.
        by: the axis whose values are federations; cells without it share a panel.

    Raises:
        ValueError: if no cell has bytes and a Dice.
        SettingsError: if matplotlib is not installed.
    """
    federations: dict[str, list[Cell]] = {}
    for cell in cells:
        varied = cell["varied"]
        name = value_text(by, varied[by]) if by in varied else "ours"
        federations.setdefault(name, []).append(cell)
    return figure_of(federations)
