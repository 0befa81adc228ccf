"""All cells of a grid: those that are there are taken, the others run, several at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flap_nvflare.experiments import cells
from flap_nvflare.experiments.cells import Desk
from flap_nvflare.experiments.grid import Cell, Grid
from flap_nvflare.settings import SettingsError

RESULTS = "cells.json"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
Told = Callable[[int, int, Cell], None]  # cells done, cells in all, the last one


def run_grid(grid: Grid, desk: Desk, jobs: int, told: Told) -> list[dict[str, Any]]:
    """Runs what was not run before.

    Args:
        grid: the cells.
        desk: where they lie; another command on the same folder is refused.
        jobs: cells at work at a time, each in a process of its own.
        told: called after each cell.

    Returns:
        The figures of every cell, in the grid's order; they are also in `cells.json` of the folder.

    Raises:
        SettingsError: if a cell was made with other settings, or the folder is in use.
        RuntimeError: naming the cell, if one fails. Those that have ended are kept.
    """
    with _alone(desk.out):
        found = {cell.folder: cells.kept(cell, desk) for cell in grid.cells}
        todo = [cell for cell in grid.cells if found[cell.folder] is None]
        _write_scans(todo, desk)
        _run(todo, found, desk, min(jobs, max(1, len(todo))), told)
        figures = [found[cell.folder] or {} for cell in grid.cells]
        write_results(desk.out / RESULTS, figures)
    return figures


def write_results(path: Path, figures: Sequence[dict[str, Any]]) -> None:
    """All cells in one file of JSON, a line each."""
    from flap_nvflare.adapter.update import write_atomic

    lines = ",\n".join(json.dumps(one) for one in figures)
    write_atomic(path, f"[\n{lines}\n]\n".encode())


def read_results(path: Path) -> list[dict[str, Any]]:
    """What `write_results` wrote.

    Raises:
        SettingsError: if the file holds anything else.
    """
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(figures, list) or not all(isinstance(one, dict) for one in figures):
        raise SettingsError(f"{path}: holds no list of cells; name the {RESULTS} of a grid")
    return figures


@contextmanager
def _alone(out: Path) -> Any:
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SettingsError(
            f"{out}: another command runs cells in it; wait for it, or name another folder by --out"
        ) from error
    with lock:
        yield


def _write_scans(todo: Sequence[Cell], desk: Desk) -> None:
    """All phantoms before the first training, so that two cells never write the same ones."""
    done = set()
    for cell in todo:
        for data in (cell.data, *cell.test_on.values()):
            if desk.root(data) not in done:
                done.add(cells.prepare(data, desk))


def _run(
    todo: Sequence[Cell],
    found: dict[str, dict[str, Any] | None],
    desk: Desk,
    jobs: int,
    told: Told,
) -> None:
    os.environ.update({name: os.environ.get(name, one) for name, one in _ONE_THREAD.items()})
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures: dict[Future[dict[str, Any]], Cell] = {
            pool.submit(cells.run, cell, desk): cell for cell in todo
        }
        done = len(found) - len(todo)
        for future in as_completed(futures):
            cell = futures[future]
            try:
                found[cell.folder] = future.result()
            except BrokenProcessPool as error:
                raise RuntimeError(
                    f"{cell.folder}: its process was ended from outside, as for want of memory; "
                    "start the command again, with fewer --jobs"
                ) from error
            except Exception as error:
                pool.shutdown(wait=True, cancel_futures=True)
                raise RuntimeError(f"{cell.folder}: {type(error).__name__}: {error}") from error
            done += 1
            told(done, len(found), cell)
