"""An evaluation as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_COMPARED = ("federated", "pooled", "left_out")
_OTHERS = ("dice_paper", "dice_flamby", "nsd")


def show(found: Mapping[str, Any], console: Console) -> None:
    """Prints models side by side, the cross-site matrix, and what the federation gains.

    Args:
        found: what `evaluate.evaluate` returns.
        console: where to.
    """
    if found["synthetic"]:
        console.print("The scans are SYNTHETIC: a demonstration.")
    for note in found["notes"]:
        console.print(note)
    console.print(_side_by_side(found))
    console.print(
        f"Mean over cases, then over sites, of the {found['split']} cases, with the "
        f"{found['bootstrap']['level']:.0%} interval of a bootstrap over cases within sites. "
        "'paper': Dice with both masks empty as 1. 'FLamby': of all foreground and of the other "
        "classes, both empty as 0. 'HD95': in mm by class; in brackets the cases where a mask is "
        "empty, which have none and are left out."
    )
    if left_out := _left_out(found):
        console.print(left_out)
    console.print("Mean Dice of every model at every site (* of a site that it has not seen)")
    console.print(_matrix(found))
    for line in (*_unseen(found), _gain(found)):
        console.print(line)


def _side_by_side(found: Mapping[str, Any]) -> Table:
    from rich.table import Table

    classes = found["class_names"]
    table = Table(title=f"{found['split'].capitalize()} Dice", title_justify="left")
    table.add_column("model", no_wrap=True)
    surface = (f"NSD {found['tolerance_mm']:g} mm", "HD95")
    for name in (*classes, "mean", "interval", "worst site", "paper", "FLamby", *surface):
        table.add_column(name, justify="right", no_wrap=True)
    for name, summary in _rows(found):
        dice = summary["dice"]
        worst = dice["mean"]
        table.add_row(
            name,
            *(_shown(dice[column]["mean"]) for column in (*classes, "mean")),
            "-" if worst["low"] is None else f"{worst['low']:.3f} - {worst['high']:.3f}",
            "-" if worst["worst"] is None else f"{worst['worst_site']} {worst['worst']:.3f}",
            *(_shown(summary[name]["mean"]["mean"]) for name in _OTHERS),
            # Not their mean: a model that never predicts a class would look the better for it.
            " / ".join(_distance(summary["hd95"][column]) for column in classes),
        )
    return table


def _rows(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The models that are compared; those of single sites stand in the matrix alone."""
    models = found["models"]
    rows = [
        (name, model["summary"])
        for name, model in models.items()
        if model["kind"] in _COMPARED or len(models) == 1
    ]
    if found["local_only"]:
        rows.insert(1, ("each site alone", found["local_only"]["summary"]))
    return rows


def _matrix(found: Mapping[str, Any]) -> Table:
    from rich.table import Table

    sites = list(next(iter(found["models"].values()))["sites"])
    table = Table()
    table.add_column("model", no_wrap=True)
    for site in sites:
        table.add_column(site, justify="right", no_wrap=True)
    for name, model in found["models"].items():
        cells = []
        for site in sites:
            score = model["sites"][site]
            dice = score["dice"]["mean"]
            mark = "*" if score["seen"] is False else " "
            cells.append("-" if dice is None else f"{dice:.3f}{mark}")
        table.add_row(name, *cells)
    return table


def _unseen(found: Mapping[str, Any]) -> list[str]:
    """For each site that was left out, what the models score there."""
    lines = []
    for name, model in found["models"].items():
        unseen = [site for site, score in model["sites"].items() if score["seen"] is False]
        if model["kind"] == "left_out":
            for site in unseen:
                others = ("federated", f"local_{site}", "pooled")
                known = [other for other in others if other in found["models"]]
                said = ", ".join(
                    f"{other} {_shown(found['models'][other]['sites'][site]['dice']['mean'])}"
                    for other in (name, *known)
                )
                lines.append(f"Mean Dice at {site}, which {name} has not seen: {said}")
    return lines


def _gain(found: Mapping[str, Any]) -> str:
    gain = found["collaborative_gain"]
    if gain is None:
        return "Collaborative gain: not known without --local."
    sites = ", ".join(f"{site} {_points(value)}" for site, value in gain["sites"].items())
    return (
        f"Collaborative gain (federated less the site alone, points of mean Dice): "
        f"{_points(gain['mean'])} in the mean of the sites ({sites})"
    )


def _left_out(found: Mapping[str, Any]) -> str:
    """How many cases do not count for which class, in the Dice of the first model."""
    name, model = next(iter(found["models"].items()))
    dice = model["summary"]["dice"]
    counts = {column: dice[column]["left_out"] for column in found["class_names"]}
    said = ", ".join(f"{column} {count}" for column, count in counts.items() if count)
    return said and f"Neither there nor predicted by {name}, and left out of its Dice: {said}."


def _distance(figure: Mapping[str, Any]) -> str:
    without = f" ({figure['left_out']})" if figure["left_out"] else ""
    return _shown(figure["mean"], digits=1) + without


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"
