"""The matrix of models and sites as a table of coloured cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flap_nvflare.report.palette import STEPS
from flap_nvflare.report.units import NONE


@dataclass(frozen=True)
class Cell:
    """Text on a colour; `own` marks a site's own model on its own cases."""

    text: str
    role: str
    own: bool


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells.

    Attributes:
        columns: the sites.
        rows: name of a model, its cells, and their mean.
        low, high: what the scale runs from and to.
        scale: classes of its colours in order.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...], Cell], ...]
    low: str
    high: str
    scale: tuple[str, ...] = tuple(f"h{step}" for step in range(STEPS))


def heat_map(
    values: Mapping[str, Mapping[str, float | None]],
    columns: Sequence[str],
    labels: Mapping[str, str],
    own: Mapping[str, str],
) -> HeatMap | None:
    """Colours from the lowest to the highest figure, rounded outwards to twentieths.

    Args:
        values: Dice by model and site.
        columns: the sites in the order to show.
        labels: what to call the models.
        own: the site whose own a model is, where it is one's.
    """
    known = [one for row in values.values() for one in row.values() if one is not None]
    if not known:
        return None
    low = math.floor(20 * min(known) + 1e-9) / 20
    high = max(math.ceil(20 * max(known) - 1e-9) / 20, low + 0.05)

    def cell(value: float | None, mine: bool = False) -> Cell:
        if value is None:
            return Cell(NONE, "none", mine)
        step = round((value - low) / (high - low) * (STEPS - 1))
        return Cell(f"{value:.2f}", f"h{min(max(step, 0), STEPS - 1)}", mine)

    rows = []
    for name, row in values.items():
        there = [one for one in row.values() if one is not None]
        middle = sum(there) / len(there) if there else None
        cells = tuple(cell(row.get(site), own.get(name) == site) for site in columns)
        rows.append((labels[name], cells, cell(middle)))
    return HeatMap(tuple(columns), tuple(rows), f"{low:.2f}", f"{high:.2f}")
