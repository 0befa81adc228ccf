"""Tables of what was scored on test cases: by site, by model, by class, and the matrix of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flap_nvflare.report import blocks, figures, scores
from flap_nvflare.report.charts import Table
from flap_nvflare.report.heat_map import HeatMap, heat_map
from flap_nvflare.report.read import Run
from flap_nvflare.report.units import NONE, bytes_text, dice_text, millimetres_text, signed_text
from flap_nvflare.report.values import mapping, number, shown, texts


def site_table(run: Run) -> Table | None:
    """Scores of the result by site, and what each sent and received."""
    found = scores.site_rows(run)
    if not found:
        return None
    classes = [*run.class_names, "mean"]
    figures_there = [name for name in ("nsd", "hd95") if any(row.figures[name] for row in found)]
    header = ["site", *(f"Dice {shown(name)}" for name in classes)]
    header += [{"nsd": "NSD", "hd95": "HD95, mm"}[name] for name in figures_there]
    header += ["cases"] + ([] if run.alone else ["sent", "received"])
    lines = []
    for row in found:
        cells = [shown(row.site) + (" (never trained)" if row.seen is False else "")]
        cells += [dice_text(row.figures["dice"].get(name)) for name in classes]
        if "nsd" in figures_there:
            cells.append(dice_text(row.figures["nsd"].get("mean")))
        if "hd95" in figures_there:
            cells.append(_distances(row.figures["hd95"].get(name) for name in run.class_names))
        sent = [] if run.alone else [bytes_text(one) for one in figures.site_bytes(run, row.site)]
        lines.append((*cells, str(row.cases) if row.cases else NONE, *sent))
    return Table(tuple(header), tuple(lines))


def matrix(run: Run) -> HeatMap | None:
    """Mean test Dice of every model on every site's test cases."""
    values = scores.matrix(run)
    named = {name: shown(scores.model_label(name), 32) for name in values}
    there = {site for row in values.values() for site in row}
    columns = [site for site in run.sites if site in there]
    columns += sorted(there - set(columns))
    return heat_map(values, columns, named, scores.home_of(run))


def model_table(run: Run, models: Sequence[scores.Model]) -> Table | None:
    """The evaluated models side by side, means over the classes, but of HD95."""
    if not models:
        return None
    header = ["model", "kind", "Dice", "worst site", "its Dice", "NSD", "HD95, mm"]
    others = [
        (name, title)
        for name, title in (("dice_paper", "Dice, paper"), ("dice_flamby", "Dice, FLamby"))
        if any(name in model.summary for model in models)
    ]
    header += [title for _, title in others]
    lines = []
    for model in models:
        dice = model.spread()
        lines.append(
            (
                shown(scores.model_label(model.name), 32),
                shown(model.kind).replace("_", " "),
                blocks.spread_text(dice),
                shown(dice.worst_site) or NONE,
                dice_text(dice.worst),
                dice_text(model.spread("nsd").mean),
                _distances(model.spread("hd95", name).mean for name in run.class_names),
                *(dice_text(model.spread(name).mean) for name, _ in others),
            )
        )
    return Table(tuple(header), tuple(lines), left=2)


def _distances(by_class: Iterable[float | None]) -> str:
    """HD95 by class: their mean would be the better for a class that is never predicted."""
    return " / ".join(map(millimetres_text, by_class)) or NONE


def class_table(run: Run, models: Sequence[scores.Model]) -> Table | None:
    """Each model and class."""
    header = ("model", "class", "Dice", "NSD", "HD95, mm", "worst site", "its Dice", "left out")
    lines = []
    for model in models:
        for name in (name for name in model.summary.get("dice", {}) if name != "mean"):
            dice = model.spread("dice", name)
            lines.append(
                (
                    shown(scores.model_label(model.name), 32),
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


def unseen_table(run: Run) -> Table | None:
    """Sites that a federation was trained without, beside the one that had them."""
    found = scores.unseen(run)
    if not found:
        return None
    header = ("site", "model", "Dice there", "with the site", "difference")
    lines = tuple(
        (
            shown(site),
            shown(name),
            dice_text(without),
            dice_text(with_it),
            NONE if without is None or with_it is None else signed_text(without - with_it),
        )
        for site, name, without, with_it in found
    )
    return Table(header, lines, left=2)


def notes(run: Run) -> list[str]:
    """What the evaluation says of itself."""
    return [shown(note, 400) for note in texts(run.evaluation.get("notes"))[:12]]


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


def gain_table(by_site: Mapping[str, object]) -> Table | None:
    """Every site's gain; None if the bars show all of them already."""
    if len(by_site) <= blocks.MOST_ROWS:
        return None
    lines = tuple((shown(site), signed_text(number(gain))) for site, gain in by_site.items())
    return Table(("site", "gain"), lines)
