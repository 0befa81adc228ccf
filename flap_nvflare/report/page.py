"""One run as one HTML file that needs nothing else: no script, no request, no other file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flap_nvflare.report import blocks, figures, scores, sections
from flap_nvflare.report.palette import heat_css
from flap_nvflare.report.pictures import pictures
from flap_nvflare.report.read import DATA, Run
from flap_nvflare.report.values import shown

_TEMPLATES = Path(__file__).parent / "templates"


def render_run(run: Run) -> str:
    """The page of a run."""
    spent = figures.seconds_by_site(run)
    found, missing = pictures(run)
    evaluated = scores.models(run)
    return render(
        "report.html",
        title=run.name,
        banner=data_banner([run.data]),
        lead=sections.lead(run),
        notes=sections.notes(run),
        tiles=sections.tiles(run),
        dice=sections.dice_chart(run),
        loss=sections.loss_chart(run),
        bytes=sections.bytes_chart(run),
        error=sections.error_chart(run),
        seconds=sections.seconds_chart(run),
        encrypted=run.setting("encryption") == "he",
        alone=run.alone,
        sites=sections.site_table(run),
        result=scores.result_model(run),
        matrix=sections.matrix(run),
        forest=blocks.forest(
            [(one.name, sections.trained_on(one), one.spread()) for one in evaluated]
        ),
        models=sections.model_table(run, evaluated),
        classes=sections.class_table(run, evaluated),
        gain=blocks.gain_bars(scores.gain(run).get("sites") or {}),
        gain_mean=sections.gain_line(run),
        evaluated=bool(evaluated),
        tolerance=sections.tolerance(run),
        bootstrap=sections.bootstrap(run),
        pictures=found,
        picture_faults=missing,
        faults=sections.fault_table(run),
        stacks=blocks.time_stacks(spent),
        stack_legend=blocks.timing_legend(spent),
        times=sections.time_table(spent),
        privacy=sections.privacy_table(run),
        privacy_notes=sections.privacy_notes(run),
        settings=sections.settings(run),
        provenance=sections.provenance(run),
    )


def data_banner(kinds: list[str]) -> tuple[str, str]:
    """The first line of every page, and its class: whether the scans were synthetic."""
    what = "this run" if len(kinds) == 1 else "these runs"
    if set(kinds) == {DATA[0]}:
        return (
            f"The scans of {what} are SYNTHETIC: a demonstration, no patient's data.",
            "synthetic",
        )
    if DATA[0] in kinds:
        return f"The scans of some of {what} are SYNTHETIC; the table says of which.", "synthetic"
    if set(kinds) == {DATA[1]}:
        return f"The scans of {what} are the sites' own.", "own"
    return f"Whether the scans of {what} were synthetic is not recorded.", "unknown"


def render(template: str, **values: Any) -> str:
    """Fills a template; every text is escaped, the style sheet alone is the package's own."""
    loader = FileSystemLoader(_TEMPLATES)
    rooms = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rooms.filters["short"] = shown
    css = (_TEMPLATES / "style.css").read_text(encoding="utf-8") + heat_css()
    return rooms.get_template(template).render(css=Markup(css), **values)


def write_page(path: Path, text: str) -> None:
    """Puts the page at `path`, whole or not at all.

    Raises:
        OSError: if it can't be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
