"""What each section of a run's page shows, as text, charts and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flap_nvflare.report import blocks, figures, scores
from flap_nvflare.report.charts import Chart, Series, Table, coloured, line_chart
from flap_nvflare.report.heat_map import HeatMap, heat_map
from flap_nvflare.report.read import ROUNDS, Run
from flap_nvflare.report.units import (
    DASH,
    NONE,
    bytes_text,
    dice_text,
    digits,
    millimetres_text,
    percent_text,
    plain_text,
    seconds_text,
    signed_text,
    times_text,
)
from flap_nvflare.report.values import mapping, number, shown

_MOST_FAULTS = 200
_MOST_SITES_OF_MEAN = 1  # with one site its line is the mean's


def lead(run: Run) -> str:
    """The run in one line: method, network, size."""
    said = mapping(run.federation)
    if not said:
        return "a site that trained alone; its settings stand in scores.json at its end"
    kind = "one site alone" if run.alone else f"rule {shown(said.get('rule'))}"
    parts = [
        f"method {shown(said.get('method'))}",
        f"rank {shown(said.get('rank'))}",
        kind,
        f"{shown(said.get('arch'))} at {shown(said.get('image_size'))} px",
        f"classes {', '.join(shown(name) for name in run.class_names)}",
    ]
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
    below.append(f"model: {shown(name)}" if name else "no test case was scored")
    found = [("Mean test Dice", dice_text(dice.mean), below)]
    found.append(_bytes_tile(run))
    rounds = f"{len(run.rounds)} of {run.planned}"
    found.append(("Rounds", rounds, [f"{seconds_text(figures.total_seconds(run))} in all"]))
    known = figures.faults(run)
    refused = sum(len(one.rounds) for one in known if one.what == "refused")
    silent = sum(len(one.rounds) for one in known if one.what == "no answer")
    cases = sum(row.cases for row in scores.site_rows(run))
    lines = [f"{cases} test cases"] if cases else []
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
            f"{times_text(total.fewer)} times fewer than full fine-tuning",
            f"which is {bytes_text(total.full)}",
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
    if len(by_site) > _MOST_SITES_OF_MEAN:
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
        [Series("relative error", figures.errors(run), "s2")],
        key="error",
        title="Aggregation error by round",
        unit="relative to the exact mean",
        text=percent_text,
        zero=True,
    )


def seconds_chart(run: Run) -> Chart | None:
    """Wall-clock of each round, of its slowest site, and of the server."""
    by_name = figures.seconds_by_round(run)
    return line_chart(
        [Series(name, points, f"s{place}") for place, (name, points) in enumerate(by_name.items())],
        key="seconds",
        title="Time by round",
        unit="wall-clock",
        text=seconds_text,
        zero=True,
    )


def site_table(run: Run) -> Table | None:
    """Test scores of the result by site, and what each sent and received."""
    found = scores.site_rows(run)
    if not found:
        return None
    classes = [*run.class_names, "mean"]
    figures_there = [name for name in ("nsd", "hd95") if any(row.figures[name] for row in found)]
    header = ["site", *(f"Dice {shown(name)}" for name in classes)]
    header += [{"nsd": "NSD", "hd95": "HD95, mm"}[name] for name in figures_there]
    header += ["test cases"] + ([] if run.alone else ["sent", "received"])
    lines = []
    for row in found:
        cells = [shown(row.site) + (" (never trained)" if row.seen is False else "")]
        cells += [dice_text(row.figures["dice"].get(name)) for name in classes]
        for name in figures_there:
            text = dice_text if name == "nsd" else millimetres_text
            cells.append(text(row.figures[name].get("mean")))
        sent = [] if run.alone else [bytes_text(one) for one in figures.site_bytes(run, row.site)]
        lines.append((*cells, str(row.cases) if row.cases else NONE, *sent))
    return Table(tuple(header), tuple(lines))


def matrix(run: Run) -> HeatMap | None:
    """Mean test Dice of every model on every site's test cases."""
    values = scores.matrix(run)
    named = {name: shown(scores.model_label(name), 32) for name in values}
    own = {name: scores.own_site(name) for name in values}
    there = {site for row in values.values() for site in row}
    columns = [site for site in run.sites if site in there]
    columns += sorted(there - set(columns))
    return heat_map(values, columns, named, own)


def trained_on(model: scores.Model) -> str:
    """Whose data a model saw."""
    if not model.trained_on:
        return ""
    if len(model.trained_on) > 6:
        return f"{len(model.trained_on)} sites"
    return "trained on " + ", ".join(shown(site) for site in model.trained_on)


def model_table(run: Run, models: Sequence[scores.Model]) -> Table | None:
    """The evaluated models side by side, means over the classes."""
    if not models:
        return None
    header = ("model", "kind", "Dice", "worst site", "its Dice", "NSD", "HD95, mm", "Dice, paper")
    lines = []
    for model in models:
        dice = model.spread()
        lines.append(
            (
                shown(model.name),
                shown(model.kind).replace("_", " "),
                blocks.spread_text(dice),
                shown(dice.worst_site) or NONE,
                dice_text(dice.worst),
                dice_text(model.spread("nsd").mean),
                millimetres_text(model.spread("hd95").mean),
                dice_text(model.spread("dice_paper").mean),
            )
        )
    return Table(header, tuple(lines), left=2)


def class_table(run: Run, models: Sequence[scores.Model]) -> Table | None:
    """Each model and class."""
    header = ("model", "class", "Dice", "NSD", "HD95, mm", "worst site", "its Dice", "left out")
    lines = []
    for model in models:
        for name in (name for name in model.summary.get("dice", {}) if name != "mean"):
            dice = model.spread("dice", name)
            lines.append(
                (
                    shown(model.name),
                    shown(name),
                    blocks.spread_text(dice),
                    dice_text(model.spread("nsd", name).mean),
                    millimetres_text(model.spread("hd95", name).mean),
                    shown(dice.worst_site) or NONE,
                    dice_text(dice.worst),
                    str(dice.left_out),
                )
            )
    return Table(header, tuple(lines), left=2) if lines else None


def gain_line(run: Run) -> str:
    """The mean collaborative gain in words; empty without one."""
    found = scores.gain(run)
    if not found:
        return ""
    against = f"{shown(found.get('model'))} minus {shown(found.get('reference'))}"
    return f"mean over sites {signed_text(number(found.get('mean')))} Dice, {against}"


def tolerance(run: Run) -> str:
    """The surface tolerance of NSD; empty if none is said."""
    value = number(run.evaluation.get("tolerance_mm"))
    return "" if value is None else f"NSD with a tolerance of {value:g} mm."


def bootstrap(run: Run) -> str:
    """How the intervals were made; empty if there are none."""
    said = mapping(run.evaluation.get("bootstrap"))
    level, samples = number(said.get("level")), number(said.get("samples"))
    if level is None or samples is None:
        return ""
    return f"{100 * level:g} % bootstrap intervals over cases, {samples:,.0f} samples."


def fault_table(run: Run) -> tuple[Table, int] | None:
    """Answers that did not count, and how many lines of them are not shown."""
    found = figures.faults(run)
    if not found:
        return None
    lines = tuple(
        (
            shown(one.site),
            one.what,
            shown(one.reason, 200),
            shown(one.key, 80) or NONE,
            _rounds_text(one.rounds),
        )
        for one in found[:_MOST_FAULTS]
    )
    header = ("site", "what", "reason", "tensor", "rounds")
    return Table(header, lines, left=5), max(0, len(found) - _MOST_FAULTS)


def _rounds_text(rounds: Sequence[int]) -> str:
    """Rounds as ranges: "1-3, 7"."""
    parts: list[list[int]] = []
    for one in sorted(rounds):
        if parts and one == parts[-1][1] + 1:
            parts[-1][1] = one
        else:
            parts.append([one, one])
    text = ", ".join(str(a) if a == b else f"{a}{DASH}{b}" for a, b in parts[:12])
    return text + (", …" if len(parts) > 12 else "")


def time_table(spent: Mapping[str, Mapping[str, float]]) -> Table | None:
    """Mean seconds of a round by site and part."""
    if not spent:
        return None
    header = ("site", *blocks.TIMING_NAMES.values(), "all")
    lines = tuple(
        (
            shown(site),
            *(seconds_text(parts.get(name)) for name in blocks.TIMING_NAMES),
            seconds_text(sum(parts.values())),
        )
        for site, parts in spent.items()
    )
    return Table(header, lines)


def privacy_table(run: Run) -> Table | None:
    """Each site's budget; None without differential privacy."""
    found = figures.privacy(run)
    if not found:
        return None
    header = ("site", "ε, replace", "ε, zero-out", "δ", "clip", "noise", "messages")
    names = ("epsilon_replace", "epsilon_zero_out", "delta", "clip", "noise", "releases")
    lines = tuple(
        (
            shown(site),
            *(
                NONE if (value := number(said.get(name))) is None else digits(value)
                for name in names
            ),
        )
        for site, said in found.items()
    )
    return Table(header, lines)


def privacy_notes(run: Run) -> list[str]:
    """What holds of privacy and encryption."""
    found = []
    budget = figures.privacy(run)
    if budget:
        found.append(
            "The unit is the data of one site; messages are counted over all jobs on its data."
        )
        open_noise = sorted(site for site, said in budget.items() if said.get("secret") is False)
        if open_noise:
            names = ", ".join(shown(site) for site in open_noise[:12])
            found.append(f"The noise of {names} is drawn from a known seed: it protects NOTHING.")
    else:
        found.append("Differential privacy: none.")
    if run.setting("encryption") == "he":
        found.append(
            "Encryption: homomorphic. The server adds what it cannot read, so it measures no "
            "aggregation error."
        )
    elif not run.alone:
        found.append("Encryption of updates: none; the transport's own is FLARE's matter.")
    return found


def settings(run: Run) -> list[tuple[str, str]]:
    """Every setting of the federation."""
    return [(shown(name), shown(plain_text(value), 120)) for name, value in run.federation.items()]


def provenance(run: Run) -> list[tuple[str, str]]:
    """What makes the run repeatable: seed, base, parameters, versions."""
    said = run.description
    parameters, full = number(said.get("parameters")), number(said.get("full_parameters"))
    found = [
        ("seed", shown(plain_text(said.get("seed", run.setting("seed"))))),
        ("base, SHA-256", shown(said.get("base_sha256"), 64) or NONE),
        ("parameters that travel", NONE if parameters is None else f"{parameters:,.0f}"),
        ("parameters of full fine-tuning", NONE if full is None else f"{full:,.0f}"),
    ]
    versions = mapping(said.get("versions"))
    return found + [(shown(name), shown(version, 40)) for name, version in versions.items()]
