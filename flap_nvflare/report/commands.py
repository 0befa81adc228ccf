"""The command `flap-nvflare report`: a page of a run, or of several side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_report(commands: argparse._SubParsersAction) -> None:
    """Adds the command `report`."""
    command = commands.add_parser(
        "report", help="one HTML file of a run, or of several side by side"
    )
    command.description = (
        "Writes one HTML file that opens without a network: Dice, loss, bytes, errors, scores, "
        "refused updates, times, privacy and settings of a run, from the files in its folder."
    )
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("run_folder", type=Path, nargs="?", metavar="RUN", help="the run's folder")
    which.add_argument(
        "--compare", type=Path, nargs="+", metavar="RUN", help="two or more runs side by side"
    )
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="default RUN/report.html, or compare.html here"
    )
    command.add_argument("--json", action="store_true", help="print the summary figures as JSON")
    command.set_defaults(run=_report)


def _report(parsed: argparse.Namespace) -> None:
    from flap_nvflare.report.compare import render_runs
    from flap_nvflare.report.page import render_run, write_page
    from flap_nvflare.report.read import read_run
    from flap_nvflare.report.summary import summary
    from flap_nvflare.report.values import ReportError

    if parsed.compare:
        if len(parsed.compare) < 2:
            raise ReportError("--compare takes two or more runs; name another")
        runs = [read_run(path) for path in parsed.compare]
        out, text = parsed.out or Path("compare.html"), render_runs(runs)
    else:
        runs = [read_run(parsed.run_folder)]
        out, text = parsed.out or parsed.run_folder / "report.html", render_run(runs[0])
    write_page(out, text)
    if parsed.json:
        found = [summary(run) for run in runs]
        print(json.dumps({"report": str(out), "runs": found}, indent=2, allow_nan=False))
        return
    print(f"Report: {out} ({len(text.encode()) / 1e6:.2f} MB)")
