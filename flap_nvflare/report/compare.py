"""Several runs as one HTML file: what differs, Dice by round, scores, bytes and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flap_nvflare.report import blocks, figures, scores
from flap_nvflare.report.charts import Chart, Series, Table, coloured, line_chart
from flap_nvflare.report.page import data_banner, render
from flap_nvflare.report.read import Run
from flap_nvflare.report.summary import summary
from flap_nvflare.report.units import (
    NONE,
    bytes_text,
    dice_text,
    plain_text,
    seconds_text,
    times_text,
)
from flap_nvflare.report.values import mapping, shown


def render_runs(runs: Sequence[Run]) -> str:
    """The page of the runs side by side."""
    names = labels(runs)
    return render(
        "compare.html",
        title=f"{len(runs)} runs side by side",
        banner=data_banner([run.data for run in runs]),
        figures=figure_table(runs, names),
        forest=blocks.forest(
            [(name, "", scores.result_dice(run)[1]) for name, run in zip(names, runs, strict=True)]
        ),
        dice=_curves(runs, names),
        spent=_bytes_curves(runs, names),
        different=difference_table(runs, names),
        alike=sum(
            len({plain_text(run.setting(name)) for run in runs}) == 1 for name in _settings(runs)
        ),
    )


def labels(runs: Sequence[Run]) -> list[str]:
    """A short name of each: what tells it from the others."""
    names = [shown(run.name, 40) for run in runs]
    if len(set(names)) < len(names):
        names = [f"{place} {name}" for place, name in enumerate(names, start=1)]
    return names


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings, and facts about the runs, that are not the same in all: name, value by run."""
    facts: list[tuple[str, Callable[[Run], Any]]] = [
        ("data", lambda run: run.data),
        ("sites", lambda run: ", ".join(run.sites)),
        ("base, SHA-256", lambda run: shown(run.description.get("base_sha256"), 13)),
        ("parameters that travel", lambda run: run.description.get("parameters")),
    ]
    versions = [mapping(run.description.get("versions")) for run in runs]
    packages = dict.fromkeys(name for one in versions for name in one)
    found = [(name, [plain_text(read(run)) for run in runs]) for name, read in facts]
    found += [
        (f"version of {name}", [plain_text(one.get(name)) for one in versions]) for name in packages
    ]
    found += [(name, [plain_text(run.setting(name)) for run in runs]) for name in _settings(runs)]
    return [(name, values) for name, values in found if len(set(values)) > 1]


def difference_table(runs: Sequence[Run], names: Sequence[str]) -> Table | None:
    """`differences` as a table; None if all is the same."""
    found = differences(runs)
    lines = tuple((shown(name), *(shown(value, 80) for value in values)) for name, values in found)
    return Table(("setting", *names), lines, left=1 + len(names)) if found else None


def figure_table(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """One row a run: its headline."""
    header = (
        "run", "scans", "mean Dice", "cases", "worst site", "its Dice", "rounds",
        "bytes up", "bytes down", "fewer than full", "time", "refused",
    )  # fmt: skip
    lines = []
    for name, run in zip(names, runs, strict=True):
        said = summary(run)
        dice, sent = scores.result_dice(run)[1], said["bytes"]
        lines.append(
            (
                name,
                run.data,
                blocks.spread_text(dice),
                run.split,
                shown(dice.worst_site) or NONE,
                dice_text(dice.worst),
                f"{said['rounds_finished']} of {said['rounds']}",
                bytes_text(sent["up"]),
                bytes_text(sent["down"]),
                NONE if sent["times_fewer"] is None else f"{times_text(sent['times_fewer'])} times",
                seconds_text(said["seconds"]),
                str(said["refused"]),
            )
        )
    return Table(header, tuple(lines), left=2)


def _curves(runs: Sequence[Run], names: Sequence[str]) -> Chart | None:
    by_name = {
        name: figures.mean_of_sites(figures.dice_by_site(run))
        for name, run in zip(names, runs, strict=True)
    }
    return line_chart(
        coloured({name: points for name, points in by_name.items() if points}),
        key="dice",
        title="Validation Dice, mean of sites",
        unit="mean Dice of the classes",
        x_label="rounds trained",
        text=dice_text,
        limits=(0.0, 1.0),
    )


def _bytes_curves(runs: Sequence[Run], names: Sequence[str]) -> Chart | None:
    """Bytes so far, both ways."""
    by_name: dict[str, figures.Points] = {}
    for name, run in zip(names, runs, strict=True):
        so_far, points = 0, []
        for at, one in figures.traffic(run):
            so_far += one.total
            points.append((float(at), float(so_far)))
        by_name[name] = [(x, y) for x, y in points]
    series: list[Series] = coloured({name: points for name, points in by_name.items() if points})
    return line_chart(
        series,
        key="bytes",
        title="Bytes so far, both ways",
        unit="all sites, powers of ten",
        text=bytes_text,
        log=True,
    )


def _settings(runs: Sequence[Run]) -> list[str]:
    """Names of all settings, in the order of the runs."""
    return list(dict.fromkeys(name for run in runs for name in run.federation))
