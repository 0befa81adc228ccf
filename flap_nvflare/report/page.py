"""One run as one HTML file that needs nothing else: no script, no request, no other file."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flap_nvflare.report import blocks, figures, run_charts, run_tables, score_tables, scores
from flap_nvflare.report.palette import heat_css
from flap_nvflare.report.pictures import pictures
from flap_nvflare.report.read import DATA, Run
from flap_nvflare.report.values import ReportError, mapping, shown

_TEMPLATES = Path(__file__).parent / "templates"


def render_run(run: Run) -> str:
    """The page of a run."""
    spent = figures.seconds_by_site(run)
    found, missing = pictures(run)
    evaluated = scores.models(run)
    gains = mapping(scores.gain(run).get("sites"))
    return render(
        "report.html",
        title=run.name,
        banner=data_banner([run.data]),
        lead=run_charts.lead(run),
        notes=run_charts.notes(run),
        tiles=run_charts.tiles(run),
        dice=run_charts.dice_chart(run),
        loss=run_charts.loss_chart(run),
        bytes=run_charts.bytes_chart(run),
        error=run_charts.error_chart(run),
        seconds=run_charts.seconds_chart(run),
        encrypted=run.setting("encryption") == "he",
        alone=run.alone,
        split=run.split,
        finished=run.finished,
        sites=score_tables.site_table(run),
        result=scores.result_model(run),
        matrix=score_tables.matrix(run),
        forest=blocks.forest(scores.side_by_side(run)),
        models=score_tables.model_table(run, evaluated),
        classes=score_tables.class_table(run, evaluated),
        classes_said=", ".join(shown(name) for name in run.class_names),
        unseen=score_tables.unseen_table(run),
        score_notes=score_tables.notes(run),
        gain=blocks.gain_bars(gains),
        gains=score_tables.gain_table(gains),
        gain_mean=score_tables.gain_line(run),
        tolerance=score_tables.tolerance(run),
        bootstrap=score_tables.bootstrap(run),
        pictures=found,
        picture_faults=missing,
        faults=run_tables.fault_table(run),
        stacks=blocks.time_stacks(spent),
        stack_legend=blocks.timing_legend(spent),
        times=run_tables.time_table(spent),
        privacy=run_tables.privacy_table(run),
        privacy_notes=run_tables.privacy_notes(run),
        settings=run_tables.settings(run),
        provenance=run_tables.provenance(run),
    )


def data_banner(kinds: list[str]) -> tuple[str, str]:
    """The first line of every page, and its class: whether the scans were synthetic."""
    what = "this run" if len(kinds) == 1 else "these runs"
    if set(kinds) == {DATA[0]}:
        return (
            f"The scans of {what} are SYNTHETIC: a demonstration.",
            "synthetic",
        )
    if DATA[0] in kinds:
        return f"The scans of some of {what} are SYNTHETIC; the table says of which.", "synthetic"
    if set(kinds) == {DATA[1]}:
        return f"The scans of {what} are the sites' own.", "own"
    return f"Whether the scans of {what} were synthetic is not recorded.", "unknown"


def render(template: str, **values: Any) -> str:
    """Fills a template; every text is escaped, the style sheet alone is the package's own."""
    css = (_TEMPLATES / "style.css").read_text(encoding="utf-8") + heat_css()
    return _environment().get_template(template).render(css=Markup(css), **values)


@functools.cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["short"] = shown
    return found


def write_page(path: Path, text: str) -> None:
    """Puts the page at `path`, whole or not at all.

    Only its owner may read a page with pictures, as is so of the pictures themselves.

    Raises:
        ReportError: if it can't be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.touch(0o600 if "<img " in text else 0o666)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise ReportError(
            f"{path}: cannot be written ({error.strerror}); give another file by --out"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
