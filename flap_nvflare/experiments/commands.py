"""The command `flap-nvflare experiment`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flap_nvflare.settings import HOME_VARIABLE


def add_experiment(commands: argparse._SubParsersAction) -> None:
    """Adds `experiment` to the command line."""
    command = commands.add_parser(
        "experiment", help="run a grid of federations and baselines, then its table and plots"
    )
    command.description = (
        "Runs every cell of a grid that is not there yet, in FLARE's simulator or in this "
        "process, and writes table and plots of all of them. A command that was cut off goes on "
        "where it stopped."
    )
    command.add_argument(
        "grid", nargs="?", default="", help="YAML file, or the name of one of the package's grids"
    )
    command.add_argument("--list", action="store_true", help="the package's grids, and no more")
    command.add_argument("--out", type=Path, help="folder for cells, table and plots")
    command.add_argument("--scans", type=Path, help="folder for phantoms and prepared scans")
    command.add_argument("--jobs", type=int, default=1, help="cells at a time, a process each")
    command.add_argument(
        "--threads", type=int, default=2, help="sites at a time in FLARE's simulator"
    )
    command.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings for every cell"
    )
    command.add_argument(
        "--results", type=Path, metavar="FILE", help="run nothing; show the cells of this file"
    )
    command.add_argument("--json", action="store_true", help="print the cells as JSON")
    command.set_defaults(run=_experiment)


def _experiment(parsed: argparse.Namespace) -> int:
    from flap_nvflare.experiments.grid import GRIDS, find_grid, read_grid
    from flap_nvflare.experiments.run import read_results
    from flap_nvflare.experiments.shown import write_shown

    if parsed.list or not parsed.grid:
        for path in sorted(GRIDS.glob("*.yaml")):
            grid = read_grid(path)
            print(f"{grid.name} ({len(grid.cells)} cells): {grid.about}")
        return 0 if parsed.list else 1
    grid = read_grid(find_grid(parsed.grid), _settings(parsed.set))
    if parsed.jobs < 1 or parsed.threads < 1:
        raise ValueError("--jobs and --threads are whole numbers from 1")
    home = Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".flap_nvflare") / "experiments"
    out = parsed.out or home / grid.name
    if parsed.results:
        figures = read_results(parsed.results)
        out = parsed.out or parsed.results.parent
    else:
        figures = _run(grid, out, parsed.scans or home / "scans", parsed.jobs, parsed.threads)
    command = f"flap-nvflare experiment {parsed.grid}"
    if parsed.set:
        command += f" --set {' '.join(parsed.set)}"
    text = write_shown(figures, grid.show, out, command)
    print(json.dumps(figures, indent=2) if parsed.json else f"{text}\nResults: {out}")
    return 0


def _run(grid: Any, out: Path, scans: Path, jobs: int, threads: int) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    from flap_nvflare.experiments.cells import Desk
    from flap_nvflare.experiments.run import run_grid

    with Progress(console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task(grid.name, total=len(grid.cells))

        def told(done: int, total: int, cell: Any) -> None:
            progress.update(bar, completed=done, total=total, description=cell.folder)

        return run_grid(grid, Desk(out, scans, threads), jobs, told)


def _settings(lines: list[str]) -> Mapping[str, Any]:
    import yaml

    return {
        name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in lines)
    }
