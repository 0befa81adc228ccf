"""The cells of a grid as a table in Markdown, with a caption that says how it came about."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flap_nvflare.experiments.groups import (
    FEDERATED,
    MODE,
    MODES,
    PROCESS,
    SIMULATOR,
    WORST,
    Cell,
    Group,
    axes,
    axis_title,
    elsewhere,
    grouped,
    labels,
    seeds_text,
    synthetic,
    value_text,
)
from flap_nvflare.experiments.show import SPREADS
from flap_nvflare.experiments.spread import Spread, spread
from flap_nvflare.report.units import NONE, digits, percent_text, seconds_text

CLASSES, ELSEWHERE = "classes", "elsewhere"  # as many columns as there are
_SPREAD_SAID = {
    "interval": "mean ± half of its 95 % confidence interval (Student's t) over the seeds",
    "deviation": "mean ± standard deviation over the seeds",
}


@dataclass(frozen=True)
class _Column:
    title: str
    text: Callable[[Group], str]
    right: bool = True


def table(
    cells: Sequence[Cell],
    columns: Sequence[str],
    *,
    spread_as: str = "interval",
    command: str = "",
) -> str:
    """One row for all seeds of a name, mode and point of the grid, in the order of the cells.

    Args:
        cells: what the grid's `cell.json` hold, of one run each; at least one.
        columns: what is shown behind the row's name and values, in this order: `parameters`, a
            class, `classes` (all of them), `mean`, `worst site`, `gain` (of a federation over its
            sites alone, paired by seed), `up`, `down` (bytes of a site and round), `total` (of
            the whole federation), `of full` (times fewer bytes than full fine-tuning), `error`,
            `server seconds` (of the rule, once the last update is in), `seconds` (of the whole
            cell), `elsewhere` (mean Dice on each other test set). The seeds are last.
        spread_as: what stands behind `±`, one of `SPREADS`.
        command: how to make the cells again, for the caption.

    Raises:
        ValueError: on no cells, a column or a spread that is not known, or twins among the cells.
    """
    if spread_as not in SPREADS:
        raise ValueError(f"spread {spread_as!r} is not known; expected one of {SPREADS}")
    groups = grouped(cells)
    shown = [*_who(groups), *_figures(cells, columns, spread_as), _Column("seeds", _seeds)]
    lines = [
        _line([column.title for column in shown]),
        "|" + "|".join("---:" if column.right else "---" for column in shown) + "|",
        *(_line([column.text(group) for column in shown]) for group in groups),
    ]
    return "\n".join(lines) + "\n\n" + caption(cells, columns, spread_as, command)


def curve_table(cells: Sequence[Cell], *, spread_as: str = "interval") -> str:
    """Dice on the validation cases after each round, with the seconds of training it took.

    Seconds are of one machine, the sites one after another. Cells without `history` are left out.
    """
    lines = ["| run | round | seconds | validation Dice | seeds |", "|---|---:|---:|---:|---:|"]
    groups = grouped([cell for cell in cells if "history" in cell])
    for name, group in zip(labels(groups), groups, strict=True):
        for points in zip(*(cell["history"] for cell in group.cells), strict=True):
            seconds = statistics.fmean(point["seconds"] for point in points)
            dice = dice_text([point["dice"]["mean"] for point in points], spread_as)
            number = points[0]["round"] + 1
            shown = (name, str(number), f"{seconds:.1f}", dice, str(len(points)))
            lines.append(_line(shown))
    return "\n".join(lines)


def caption(
    cells: Sequence[Cell], columns: Sequence[str], spread_as: str = "interval", command: str = ""
) -> str:
    """What the figures are, and with which command, versions and engine they came about."""
    said = [f"Dice in percent, {_SPREAD_SAID[spread_as]}"]
    if "gain" in columns:
        said.append("gain: points of mean Dice over the sites alone, paired by seed")
    if {"up", "down"} & set(columns):
        said.append(f"bytes up and down: of one site and round, {_envelope(cells)}")
    if "total" in columns:
        said.append("total: of all sites and rounds, both ways")
    if "of full" in columns:
        said.append("of full: times fewer bytes than full fine-tuning, both ways")
    count = len(cells)
    seconds = seconds_text(sum(cell["seconds"] or 0.0 for cell in cells))
    sentences = [
        "; ".join(said) + ".",
        "Synthetic scans." if synthetic(cells) else "",
        f"{count} {'cell' if count == 1 else 'cells'} of {seeds_text(cells)} in {seconds}"
        + f", engine {_engines(cells)}, {_versions(cells)}.",
        f"Made by `{command}`." if command else "",
    ]
    return " ".join(filter(None, sentences))


def _who(groups: Sequence[Group]) -> list[_Column]:
    """Name, mode and values: what tells the rows from each other."""
    found = []
    if any(group.name for group in groups):
        found.append(_Column("run", lambda group: group.name or NONE, right=False))
    found += [_Column(axis_title(name), _axis_text(name), right=False) for name in axes(groups)]
    # A name such as "flap, each site alone" says it already.
    unsaid = any(group.mode != FEDERATED and group.mode not in group.name for group in groups)
    if MODE not in axes(groups) and (unsaid or not found):
        found.append(_Column("trained", lambda group: MODES[group.mode], right=False))
    return found


def _axis_text(name: str) -> Callable[[Group], str]:
    return lambda group: value_text(name, group.varied.get(name))


def _figures(cells: Sequence[Cell], columns: Sequence[str], spread_as: str) -> list[_Column]:
    classes = _names(cell["mean"] for cell in cells)
    tests = _names(cell.get("elsewhere") or {} for cell in cells)
    fixed = _fixed(cells, spread_as)
    found: list[_Column] = []
    for name in columns:
        if name == CLASSES:
            found += [_dice_column(one, spread_as) for one in classes]
        elif name == ELSEWHERE:
            found += [_elsewhere_column(one, spread_as) for one in tests]
        elif name in ("mean", WORST) or name in classes:
            found.append(_dice_column(name, spread_as))
        elif name in fixed:
            found.append(fixed[name])
        else:
            known = (*fixed, CLASSES, *classes, "mean", WORST, ELSEWHERE)
            raise ValueError(f"column {name!r} is not known; expected some of {known}")
    return found


def _dice_column(name: str, spread_as: str) -> _Column:
    return _Column(name, lambda group: dice_text(group.dice(name), spread_as))


def _elsewhere_column(test: str, spread_as: str) -> _Column:
    return _Column(f"on {test}", lambda group: dice_text(elsewhere(group, test), spread_as))


def _fixed(cells: Sequence[Cell], spread_as: str) -> dict[str, _Column]:
    """The columns that do not depend on classes or tests."""
    return {
        "parameters": _Column("parameters", lambda group: _whole(_mean(group, _parameters))),
        "gain": _Column("gain", lambda g: dice_text(g.gains(cells), spread_as, signed=True)),
        "up": _Column("bytes up", lambda group: _whole(_mean(group, lambda c: _wire(c, "up")))),
        "down": _Column("bytes down", lambda g: _whole(_mean(g, lambda c: _wire(c, "down")))),
        "total": _Column("total MB", lambda group: _digits(_mean(group, total_megabytes))),
        "of full": _Column("of full", lambda group: _one_digit(_mean(group, reduction))),
        "error": _Column("error", lambda g: percent_text(_mean(g, lambda c: _wire(c, "error")))),
        "server seconds": _Column(
            "server s", lambda group: _digits(_mean(group, lambda c: _wire(c, "seconds")))
        ),
        "seconds": _Column("time", lambda g: seconds_text(_mean(g, lambda c: c.get("seconds")))),
    }


def dice_text(values: Sequence[float | None], spread_as: str, signed: bool = False) -> str:
    """Shares as percent: "36.0 ± 0.4"; how many seeds have a value in brackets if not all have."""
    found = spread(values)
    if found is None:
        return NONE
    mean = points_text(100 * found.mean) if signed else f"{100 * found.mean:.1f}"
    width = _width(found, spread_as)
    half = "" if width is None else f" ± {100 * width:.1f}"
    return mean + half + ("" if len(found.values) == len(values) else f" ({len(found.values)})")


def points_text(value: float) -> str:
    """A difference with its sign and one decimal; a true minus, and none before 0.0."""
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")


def interval_text(values: Sequence[float | None]) -> str:
    """`dice_text` with the interval."""
    return dice_text(values, "interval")


def reduction(cell: Cell) -> float | None:
    """How many times fewer bytes than full fine-tuning's, both ways; None without a wire."""
    full, up, down = (_wire(cell, name) for name in ("full", "up", "down"))
    return None if full is None or not up or not down else 2 * full / (up + down)


def total_megabytes(cell: Cell) -> float | None:
    """MB of all sites and rounds, both ways; None without a wire."""
    up, down = _wire(cell, "up"), _wire(cell, "down")
    settings = cell["federation"]
    if up is None or down is None or not settings.get("rounds"):
        return None
    sites = min(settings.get("sites_per_round") or len(cell["sites"]), len(cell["sites"]))
    return float((up + down) * sites * settings["rounds"] / 1e6)


def _width(found: Spread, spread_as: str) -> float | None:
    return found.half if spread_as == "interval" else found.deviation


def _wire(cell: Cell, name: str) -> float | None:
    value: float | None = (cell.get("wire") or {}).get(name)
    return value


def _parameters(cell: Cell) -> float | None:
    value: float | None = cell.get("parameters")
    return value


def _mean(group: Group, figure: Callable[[Cell], float | None]) -> float | None:
    known = [value for value in map(figure, group.cells) if value is not None]
    return statistics.fmean(known) if known else None


def _whole(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def _digits(value: float | None) -> str:
    return NONE if value is None else digits(value)


def _one_digit(value: float | None) -> str:
    return NONE if value is None else f"{value:,.1f}"


def _seeds(group: Group) -> str:
    return str(len(group.cells))


def _engines(cells: Sequence[Cell]) -> str:
    return " and ".join(dict.fromkeys(str(cell.get("engine") or "not known") for cell in cells))


def _envelope(cells: Sequence[Cell]) -> str:
    """Whether the bytes are of FLARE's messages, or of what is in them."""
    known = {str(cell.get("engine")) for cell in cells if cell.get("wire")}
    return {
        frozenset({SIMULATOR}): "with FLARE's envelope",
        frozenset({SIMULATOR, PROCESS}): "in the simulator with FLARE's envelope, else without",
    }.get(frozenset(known), "without FLARE's envelope")


def _versions(cells: Sequence[Cell]) -> str:
    """Each package with all its versions: a grid may be gone on with after an update."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        for package, version in (cell.get("versions") or {}).items():
            found.setdefault(package, {})[str(version)] = None
    said = [f"{package} {' and '.join(versions)}" for package, versions in found.items()]
    return ", ".join(said) or "versions not known"


def _names(mappings: Any) -> list[str]:
    """All their names but the mean's, as they first come."""
    return [name for name in dict.fromkeys(n for one in mappings for n in one) if name != "mean"]


def _line(texts: Sequence[str]) -> str:
    inside = [" ".join(text.split()).replace("|", "\\|") for text in texts]
    return "| " + " | ".join(inside) + " |"
