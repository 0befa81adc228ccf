"""All cells of a grid: those that are there are taken, the others run, several at a time."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flap_nvflare.data.errors import DataError
from flap_nvflare.experiments import cells
from flap_nvflare.experiments.cells import Desk
from flap_nvflare.experiments.grid import Cell, Grid
from flap_nvflare.parents import end_with_parent
from flap_nvflare.settings import SettingsError

RESULTS = "cells.json"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
Told = Callable[[int, int, str], None]  # cells done, cells in all, the last one's folder
# Of a cell, what its table and plots cannot do without.
_NEEDED = {"name", "mode", "varied", "seed", "federation", "seconds", "mean", "sites"}


def run_grid(grid: Grid, desk: Desk, jobs: int, told: Told) -> list[dict[str, Any]]:
    """Runs what was not run before.

    Args:
        grid: the cells.
        desk: where they lie; another command on the same folder is refused.
        jobs: cells at work at a time, each in a process of its own.
        told: called before the first cell and after each.

    Returns:
        The figures of every cell, in the grid's order; they are also in `cells.json` of the folder.

    Raises:
        SettingsError: before anything is trained: if a cell was made with other settings or can
            not be trained, or the folder is in use.
        RuntimeError: naming the cells that failed, after all the others. Those are kept.
    """
    with _alone(desk.out):
        found = {cell.folder: cells.kept(cell, desk) for cell in grid.cells}
        todo = [cell for cell in grid.cells if found[cell.folder] is None]
        told(len(grid.cells) - len(todo), len(grid.cells), "")
        if todo:
            _prepare(todo, desk)
            _run(todo, found, desk, min(jobs, len(todo)), told)
        figures = [found[cell.folder] for cell in grid.cells]
        whole = [one for one in figures if one is not None]
        write_results(desk.out / RESULTS, whole)
    return whole


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
    whole = isinstance(figures, list) and all(
        isinstance(one, dict) and one.keys() >= _NEEDED for one in figures
    )
    if not whole:
        raise SettingsError(f"{path}: holds no list of cells; name the {RESULTS} of a grid")
    return list(figures)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
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


def _prepare(todo: Sequence[Cell], desk: Desk) -> None:
    """Refuses before the first training what would end a later one, and writes all phantoms.

    Thus two cells never write the same ones at a time.
    """
    from flap_nvflare.combinations import check

    sites: dict[Path, list[str]] = {}
    for cell in todo:
        with _named(cell):
            check(cell.federation)
    for cell in todo:
        with _named(cell):
            for data in (cell.data, *cell.test_on.values()):
                root = desk.root(data)
                sites[root] = sites.get(root) or cells.prepare(data, desk)
            cells.check_sites(cell, sites[desk.root(cell.data)], desk)


@contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """Names the cell that an error is about."""
    try:
        yield
    except (SettingsError, DataError) as error:
        raise SettingsError(f"{cell.folder}: {error}") from error


def _run(
    todo: Sequence[Cell],
    found: dict[str, dict[str, Any] | None],
    desk: Desk,
    jobs: int,
    told: Told,
) -> None:
    """Trains the cells; one that fails does not keep the others from theirs."""
    waiting, failed = list(todo), list[str]()
    running: dict[Future[dict[str, Any]], Cell] = {}
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_begin_process) as pool:
        while waiting or running:
            # No more than are at work: what a pool has taken it trains, whatever happens here.
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running[pool.submit(cells.run, cell, desk)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    found[cell.folder] = future.result()
                except BrokenProcessPool as error:
                    names = ", ".join(one.folder for one in (cell, *running.values()))
                    raise RuntimeError(
                        f"{names}: a process was ended from outside, as for want of memory; start "
                        "the command again, with fewer --jobs"
                    ) from error
                except Exception as error:
                    failed.append(_failure(cell, desk, error))
                told(sum(one is not None for one in found.values()), len(found), cell.folder)
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(found)} cells failed, the others are kept; start the command "
            "again to go on:\n" + "\n".join(failed)
        )


def _failure(cell: Cell, desk: Desk, error: Exception) -> str:
    """What went wrong in a cell, in a line or few; all of it in a file in the cell's folder."""
    path = desk.folder(cell) / cells.FAILED
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"{cell.folder}: {type(error).__name__}: {error} ({path})"


def _begin_process() -> None:
    """Makes a process ready for cells, before torch is loaded in it."""
    parent = parent_process()
    end_with_parent(signal.SIGKILL, parent.pid or 0 if parent else 0)
    os.dup2(2, 1)  # what a library prints is none of the command's answer
    os.environ.update({name: os.environ.get(name, one) for name, one in _ONE_THREAD.items()})
