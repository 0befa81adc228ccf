"""Table and plots of a grid, written beside its cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flap_nvflare.experiments import tables
from flap_nvflare.experiments.groups import Cell
from flap_nvflare.experiments.show import Show

TABLE = "table.md"
PLOT = ".svg"


def write_shown(cells: Sequence[Cell], show: Show, out: Path, command: str) -> str:
    """Writes `table.md` and a file for each plot into `out`.

    Args:
        cells: the cells of the grid.
        show: columns and plots.
        out: folder, made if missing.
        command: how to make the cells again.

    Returns:
        The table with its caption.

    Raises:
        SettingsError: if there are plots and matplotlib is not installed.
        ValueError: if a column or a plot finds nothing in the cells.
    """
    check_drawing(show)
    text = tables.table(cells, show.columns, spread_as=show.spread, command=command)
    if any("history" in cell for cell in cells):
        text += "\n\n" + tables.curve_table(cells, spread_as=show.spread)
    out.mkdir(parents=True, exist_ok=True)
    (out / TABLE).write_text(text + "\n", encoding="utf-8")
    if show.plots:
        from flap_nvflare.experiments import plots

        for name, plot in show.plots.items():
            draw = getattr(plots, plot.kind)
            draw(cells, **plot.options).save(out / f"{name}{PLOT}")
    return text


def check_drawing(show: Show) -> None:
    """Refuses plots where nothing can draw them, best before the training.

    Raises:
        SettingsError: if there are plots and matplotlib is not installed.
    """
    if show.plots:
        from flap_nvflare.experiments.drawing import style

        with style():
            pass
