"""The command `flap-nvflare experiment`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flap_nvflare.settings import own_home

if TYPE_CHECKING:
    from flap_nvflare.experiments.grid import Grid


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
    from flap_nvflare.experiments.grid import find_grid, read_grid
    from flap_nvflare.experiments.run import read_results
    from flap_nvflare.experiments.shown import check_drawing, write_shown

    settings = _settings(parsed.set)
    if parsed.list:
        _list(parsed.json)
        return 0
    if not parsed.grid:
        raise ValueError("name a YAML file, or one of the grids that --list shows")
    if parsed.jobs < 1 or parsed.threads < 1:
        raise ValueError("--jobs and --threads are whole numbers from 1")
    path = find_grid(parsed.grid)
    grid = read_grid(path, settings)
    home = own_home() / "experiments"
    out = parsed.out or home / grid.name
    if parsed.results:
        figures = read_results(parsed.results)
        out = parsed.out or parsed.results.parent
    else:
        check_drawing(grid.show)
        try:
            figures = _run(grid, out, parsed.scans or home / "scans", parsed.jobs, parsed.threads)
        except RuntimeError as error:  # of cells that failed
            print(f"flap-nvflare experiment: {error}", file=sys.stderr)
            return 1
    text = write_shown(figures, grid.show, out, _command(path, parsed.set))
    print(json.dumps(figures, indent=2) if parsed.json else f"{text}\nResults: {out}")
    return 0


def _list(as_json: bool) -> None:
    from flap_nvflare.experiments.grid import GRIDS, read_grid

    grids = [read_grid(path) for path in sorted(GRIDS.glob("*.yaml"))]
    if as_json:
        found = [{"name": one.name, "cells": len(one.cells), "about": one.about} for one in grids]
        print(json.dumps(found, indent=2))
        return
    for grid in grids:
        print(f"{grid.name} ({len(grid.cells)} cells): {grid.about}")


def _command(path: Path, changes: Sequence[str]) -> str:
    """How others make the cells again: no folder of this machine is in it."""
    from flap_nvflare.experiments.grid import GRIDS

    name = path.stem if path.parent == GRIDS else path.name
    return shlex.join(["flap-nvflare", "experiment", name, *(["--set", *changes] * bool(changes))])


def _run(grid: Grid, out: Path, scans: Path, jobs: int, threads: int) -> list[dict[str, Any]]:
    from flap_nvflare.experiments.cells import Desk
    from flap_nvflare.experiments.run import run_grid

    with _progress(grid.name) as told:
        return run_grid(grid, Desk(out, scans, threads), jobs, told)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal; elsewhere, as in the log of a night, a line for each cell."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:

        def write(done: int, total: int, cell: str) -> None:
            last = f", last {cell}" if cell else ""
            print(f"{name}: {done} of {total} cells{last}", file=sys.stderr, flush=True)

        yield write
        return
    ended = TextColumn("{task.fields[last]}", markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), ended, console=console) as bar:
        task = bar.add_task(name, total=None, last="")

        def show(done: int, total: int, cell: str) -> None:
            bar.update(task, completed=done, total=total, last=cell)

        yield show


def _settings(lines: Sequence[str]) -> Mapping[str, Any]:
    import yaml

    found = {}
    for text in lines:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"--set {text!r} is not allowed; expected NAME=VALUE")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {text!r}: the value is no YAML: {error}") from error
    return found
