"""The head of a run's page, and its charts."""

from __future__ import annotations

from collections.abc import Mapping

from flap_nvflare.report import figures, scores
from flap_nvflare.report.charts import Chart, Series, coloured, line_chart
from flap_nvflare.report.read import ROUNDS, Run
from flap_nvflare.report.units import (
    NONE,
    bytes_text,
    dice_text,
    digits,
    percent_text,
    seconds_text,
    times_text,
)
from flap_nvflare.report.values import mapping, number, shown

# Seconds of a unit, its sign, and from how many of it on an axis is in it.
_TIME_UNITS = ((3600, "h", 3), (60, "min", 5), (1, "s", 0))


def lead(run: Run) -> str:
    """The run in one line: method, network, size."""
    said = run.federation
    if not said:
        return "The settings are not recorded yet." if run.alone else "The settings are missing."
    parts = ["one site alone"] if run.alone else []
    parts += [
        f"{name} {shown(said[name])}"
        for name in ("method", "rank", "rule")
        if name in said and not (run.alone and name == "rule")
    ]
    if "arch" in said and "image_size" in said:
        parts.append(f"{shown(said['arch'])} at {shown(said['image_size'])} px")
    parts.append(f"classes {', '.join(shown(name) for name in run.class_names)}")
    if said.get("personal") not in (None, "none"):
        parts.append(f"personal {shown(said.get('personal'))}")
    if said.get("encryption") == "he":
        parts.append("encrypted")
    return " · ".join(parts)


def notes(run: Run) -> list[str]:
    """What a reader must know before the figures."""
    found = []
    if run.cut:
        found.append(
            f"The last line of {ROUNDS} is broken off, as a kill leaves it; the rounds before it "
            "are shown."
        )
    if not run.finished:
        found.append(
            f"This run has not come to its end: {len(run.rounds)} of {run.planned} rounds stand, "
            "and test cases were not scored by it."
        )
    if run.setting("personal") not in (None, "none"):
        found.append(
            f"Each site keeps a part to itself (personal: {shown(run.setting('personal'))}), and "
            "scores with it: its Dice is that of the model that it uses."
        )
    return found


def tiles(run: Run) -> list[tuple[str, str, list[str]]]:
    """The headline: label, figure, and lines below it."""
    name, dice = scores.result_dice(run)
    below = []
    if dice.low is not None and dice.high is not None:
        level = number(mapping(run.evaluation.get("bootstrap")).get("level"))
        percent = "" if level is None else f"{100 * level:g} % "
        below.append(f"{percent}interval {dice.low:.3f} to {dice.high:.3f}")
    if dice.worst_site and len(run.sites) > 1:
        below.append(f"worst site {shown(dice.worst_site)}: {dice_text(dice.worst)}")
    below.append(f"model: {shown(name)}" if name else "no case was scored")
    found = [(f"Mean {run.split} Dice", dice_text(dice.mean), below)]
    found.append(_bytes_tile(run))
    rounds = f"{len(run.rounds)} of {run.planned}"
    found.append(("Rounds", rounds, [f"{seconds_text(figures.total_seconds(run))} in all"]))
    known = figures.faults(run)
    refused = sum(len(one.rounds) for one in known if one.what == "refused")
    silent = sum(len(one.rounds) for one in known if one.what == "no answer")
    cases = sum(row.cases for row in scores.site_rows(run))
    lines = [f"{cases} {run.split} cases"] if cases else []
    if not run.alone:
        lines.append(f"{refused or 'no'} refused {'update' if refused == 1 else 'updates'}")
    if silent:
        lines.append(f"{silent} without an answer")
    found.append(("Sites", str(len(run.sites)), lines))
    if (spent := figures.epsilon(run)) is not None:
        found.append(("Privacy, largest ε", digits(spent), ["of any site, over all its jobs"]))
    return found


def _bytes_tile(run: Run) -> tuple[str, str, list[str]]:
    total = figures.total_traffic(run)
    if run.alone:
        return "Bytes, both ways", "0 B", ["a site alone sends nothing"]
    below = (
        [
            f"{times_text(total.fewer)} times fewer than the {bytes_text(total.full)} of full "
            "fine-tuning"
        ]
        if total.fewer
        else ["full fine-tuning's size is not recorded"]
    )
    if more := figures.evaluation_bytes(run):
        below.append(f"{bytes_text(more)} more for the last scores")
    return "Bytes, both ways", bytes_text(total.total), below


def dice_chart(run: Run) -> Chart | None:
    """Validation Dice by site, and their mean."""
    by_site = figures.dice_by_site(run)
    return line_chart(
        _with_mean(by_site),
        key="dice",
        title="Validation Dice by site",
        unit="mean Dice of the classes",
        x_label="rounds trained",
        text=dice_text,
        limits=(0.0, 1.0),
        table_of=_with_mean(by_site, every=True),
    )


def loss_chart(run: Run) -> Chart | None:
    """Training loss by site, and their mean."""
    by_site = figures.loss_by_site(run)
    return line_chart(
        _with_mean(by_site),
        key="loss",
        title="Training loss by site",
        unit="mean loss of the round's steps",
        text=lambda value: NONE if value is None else digits(value),
        table_of=_with_mean(by_site, every=True),
    )


def _with_mean(by_site: Mapping[str, figures.Points], every: bool = False) -> list[Series]:
    series = (
        [Series(site, points, "s0") for site, points in by_site.items()]
        if every
        else coloured(by_site)
    )
    if len(by_site) > 1:  # with one site its line is the mean's
        series.append(Series("mean of sites", figures.mean_of_sites(dict(by_site)), "mean"))
    return series


def bytes_chart(run: Run) -> Chart | None:
    """Bytes of each round by direction, against full fine-tuning; a scale of powers of ten."""
    each = figures.traffic(run)
    series = [
        Series("full fine-tuning, up", [(x, one.full_up) for x, one in each], "full"),
        Series("down, server to sites", [(x, one.down) for x, one in each], "s0"),
        Series("up, sites to server", [(x, one.up) for x, one in each], "s1"),
    ]
    return line_chart(
        [one for one in series if any(y for _, y in one.points)],
        key="bytes",
        title="Bytes by round and direction",
        unit="all sites, powers of ten",
        text=bytes_text,
        log=True,
        note="Serialised messages as measured; full fine-tuning is 4 bytes a number in as many "
        "messages.",
    )


def error_chart(run: Run) -> Chart | None:
    """Relative error of the aggregate."""
    return line_chart(
        [
            Series(
                "relative error",
                [(x, None if y is None else 100 * y) for x, y in figures.errors(run)],
                "s2",
            )
        ],
        key="error",
        title="Aggregation error by round",
        unit="relative to the exact mean",
        text=lambda value: NONE if value is None else percent_text(value / 100),
        tick_unit=" %",
        zero=True,
    )


def seconds_chart(run: Run) -> Chart | None:
    """Wall-clock of each round, of its slowest site, and of the server."""
    by_name = figures.seconds_by_round(run)
    longest = max((y or 0.0 for points in by_name.values() for _, y in points), default=0.0)
    size, unit = next(one for one in _TIME_UNITS if longest >= one[2] * one[0])[:2]
    return line_chart(
        [
            Series(name, [(x, None if y is None else y / size) for x, y in points], f"s{place}")
            for place, (name, points) in enumerate(by_name.items())
        ],
        key="seconds",
        title="Time by round",
        unit="wall-clock",
        text=lambda value: NONE if value is None else seconds_text(value * size),
        tick_unit=f" {unit}",
        zero=True,
    )
