"""What an evaluation leaves: JSON with everything, CSV by case and by summary for other tools."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flap_nvflare.adapter.update import write_atomic
from flap_nvflare.training.scores import FIGURES

EVALUATION, CASES, SUMMARY = "evaluation.json", "evaluation.csv", "evaluation_summary.csv"


def write_files(folder: Path, found: Mapping[str, Any]) -> None:
    """Writes the three files, each whole or not at all.

    Args:
        folder: where they are put; made if it is not there.
        found: what `evaluate.evaluate` returns.

    Raises:
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    for name, content in (
        (CASES, _csv(_case_rows(found))),
        (SUMMARY, _csv(_summary_rows(found))),
        (EVALUATION, text),
    ):
        write_atomic(folder / name, content.encode(), 0o600)  # cases have names in two of them


def _case_rows(found: Mapping[str, Any]) -> Iterator[list[Any]]:
    """One row a model, site, case and class; a figure that there is not stays empty."""
    yield ["model", "kind", "site", "seen", "case", "class", *FIGURES]
    for name, model in found["models"].items():
        for site, score in model["sites"].items():
            for case in score["cases"]:
                for index, column in enumerate(found["class_names"]):
                    figures = [
                        case[figure][index] if case.get(figure) else None for figure in FIGURES
                    ]
                    seen = {True: "true", False: "false", None: ""}[score["seen"]]
                    yield [name, model["kind"], site, seen, case["case"], column, *figures]


def _summary_rows(found: Mapping[str, Any]) -> Iterator[list[Any]]:
    """One row a model, figure and class."""
    values = ("mean", "low", "high", "worst_site", "worst", "left_out")
    yield ["model", "kind", "figure", "class", *values]
    summaries = [(name, model["kind"], model["summary"]) for name, model in found["models"].items()]
    if found["local_only"]:
        summaries.append(("local_only", "local", found["local_only"]["summary"]))
    for name, kind, summary in summaries:
        for figure, by_class in summary.items():
            for column, one in by_class.items():
                yield [name, kind, figure, column, *(one[value] for value in values)]


def _csv(rows: Iterator[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
