"""Cells that run once: kept, gone on with, refused when they are others', shown again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from flap_nvflare import cli
from flap_nvflare.experiments import cells
from flap_nvflare.experiments.cells import CELL, Desk
from flap_nvflare.experiments.grid import Cell, read_grid
from flap_nvflare.experiments.run import read_results, run_grid
from flap_nvflare.in_process import run as train
from flap_nvflare.settings import SettingsError


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "out", tmp_path / "drawn")


def silent(done: int, total: int, cell: Cell) -> None:
    """Progress that nobody watches."""


def without_times(figures: dict[str, Any]) -> dict[str, Any]:
    return {**figures, "seconds": 0, "wire": {**figures["wire"], "seconds": 0}}


def changed(desk: Desk, cell: Cell, **values: Any) -> None:
    path = desk.folder(cell) / CELL
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def done(grid_file: Path, desk: Desk) -> list[dict[str, Any]]:
    """The figures of the grid, each as if it had trained."""
    return run_grid(read_grid(grid_file), desk, 2, silent)


def test_a_cell_is_the_run_that_its_settings_say(
    grid_file: Path, desk: Desk, scans: Path, done: list[dict[str, Any]]
) -> None:
    grid = read_grid(grid_file)
    outcome = train("federated", grid.cells[0].federation, scans, ["A", "B"]).to_dict()
    assert done[0]["sites"] == outcome["sites"]
    assert [one["varied"] for one in done] == [{"method": "flap"}, {"method": "partial_decoder"}]
    assert set(done[0]["versions"]) == {"flap_nvflare", "torch", "monai", "nvflare", "python"}
    assert read_results(desk.out / "cells.json") == done

    # What is there is not trained again, and a cell that was cut off is.
    changed(desk, grid.cells[0], seconds=-1)
    (desk.folder(grid.cells[1]) / CELL).write_text('{"name": "", "mo')
    again = run_grid(grid, desk, 1, silent)
    assert again[0]["seconds"] == -1
    assert without_times(again[1]) == without_times(done[1])

    # A setting that came after the cell was made has its default there.
    federation = dict(done[0]["federation"])
    del federation["tracking"]
    changed(desk, grid.cells[0], federation=federation)
    assert cells.kept(grid.cells[0], desk)

    for wrong, problem in (
        ({"federation": {**federation, "rounds": 9}}, "another federation"),
        ({"data": {"root": "/elsewhere"}}, "another data"),
        ({"federation": {"colour": 1}}, "holds no cell"),
        ({"test_on": None}, "holds no cell"),
    ):
        changed(desk, grid.cells[0], **{"federation": federation, "test_on": {}, **wrong})
        with pytest.raises(SettingsError, match=problem):
            run_grid(grid, desk, 1, silent)
        changed(desk, grid.cells[0], data={"root": str(scans)})


def test_a_folder_in_use_is_left_alone(grid_file: Path, desk: Desk) -> None:
    desk.out.mkdir()
    with FileLock(desk.out / ".lock"), pytest.raises(SettingsError, match="another command"):
        run_grid(read_grid(grid_file), desk, 1, silent)


def test_a_cell_that_fails_is_named(tmp_path: Path, desk: Desk) -> None:
    path = tmp_path / "lost.yaml"
    (tmp_path / "empty").mkdir()
    path.write_text(f"data: {{root: {tmp_path / 'empty'}}}\nseeds: [0]\n")
    with pytest.raises(RuntimeError, match=r"seed=0: DataError: .*empty"):
        run_grid(read_grid(path), desk, 1, silent)


def command(words: Sequence[object]) -> int:
    return cli.main(["experiment", *map(str, words)])


def test_the_command_shows_what_it_ran(
    grid_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, scans = tmp_path / "out", tmp_path / "drawn"
    run = (grid_file, "--out", out, "--scans", scans)
    assert command((*run, "--set", "rounds=1", "seed=0")) == 1  # `seeds` says the seed
    assert "seed" in capsys.readouterr().err
    assert command(run) == 0
    table = capsys.readouterr().out
    assert (out / "table.md").read_text().strip() in table
    assert "| partial_decoder | " in table
    assert f"flap-nvflare experiment {grid_file}" in table

    # From the figures alone, elsewhere, without a cell's folder.
    kept = tmp_path / "kept" / "tiny.json"
    kept.parent.mkdir()
    kept.write_bytes((out / "cells.json").read_bytes())
    assert command((grid_file, "--results", kept)) == 0
    assert (kept.parent / "table.md").read_text() == (out / "table.md").read_text()
    kept.write_text("{}")
    assert command((grid_file, "--results", kept)) == 1
    assert "no list of cells" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("colours",), "no such file"),
        (("rules", "--jobs", "0"), "--jobs"),
        (("rules", "--set", "colour=1"), "colour"),
    ],
)
def test_bad_words_are_refused(
    words: Sequence[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(words) == 1
    assert problem in capsys.readouterr().err


def test_the_packages_grids_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(("--list",)) == 0
    assert "rules (39 cells): Every rule" in capsys.readouterr().out
