"""A cell under FLARE's simulator: the same figures as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flap_nvflare.experiments.cells import Desk
from flap_nvflare.experiments.grid import Cell, read_grid
from flap_nvflare.experiments.run import run_grid
from flap_nvflare.experiments.simulated import simulate
from flap_nvflare.settings import Federation


def silent(done: int, total: int, cell: Cell) -> None:
    """Progress that nobody watches."""


@pytest.mark.slow
def test_the_simulator_gives_the_same_dice(grid_file: Path, tmp_path: Path) -> None:
    text = grid_file.read_text().replace("[flap, partial_decoder]", "[flap]")
    grid_file.write_text(text)
    (here,) = run_grid(read_grid(grid_file), Desk(tmp_path / "here", tmp_path), 1, silent)
    grid_file.write_text(text + "engine: simulator\n")
    grid = read_grid(grid_file)
    (there,) = run_grid(grid, Desk(tmp_path / "there", tmp_path), 1, silent)
    assert (here["engine"], there["engine"]) == ("process", "simulator")
    for same in ("sites", "mean", "parameters", "varied"):
        assert there[same] == here[same]
    for way in ("up", "down"):  # FLARE's envelope comes on top
        assert here["wire"][way] < there["wire"][way] < 1.2 * here["wire"][way]
    assert there["wire"]["full"] == here["wire"]["full"]
    assert there["wire"]["error"] == pytest.approx(here["wire"]["error"], abs=1e-4)
    assert [one["round"] for one in there["rounds"]] == [0]
    assert run_grid(grid, Desk(tmp_path / "there", tmp_path), 1, silent) == [there]


def test_a_run_that_fails_says_how_its_log_ends(tmp_path: Path, scans: Path) -> None:
    settings: dict[str, Any] = {"optimizer": "fednova", "rule": "stack"}  # no sense together
    with pytest.raises(RuntimeError, match="does not go with rule"):
        simulate(Federation.from_dict(settings), scans, ["A"], tmp_path, 1)
