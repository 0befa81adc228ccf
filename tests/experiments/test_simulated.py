"""A cell under FLARE's simulator: the same figures as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flap_nvflare.experiments.cells import Desk
from flap_nvflare.experiments.grid import read_grid
from flap_nvflare.experiments.run import run_grid
from flap_nvflare.experiments.simulated import _begin, _environment, check_names, simulate
from flap_nvflare.settings import HOME_VARIABLE, RESUME_VARIABLE, Federation, SettingsError


def silent(done: int, total: int, cell: str) -> None:
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


@pytest.mark.parametrize("site", ["St. Mary", "a,b", "server", "-t", "Üb", ""])
def test_names_that_flare_does_not_take_are_refused(tmp_path: Path, site: str) -> None:
    check_names(["S001", "HH", "26", "site-1"], tmp_path)
    with pytest.raises(SettingsError, match="FLARE takes names"):
        simulate(Federation(), tmp_path, ["A", site], tmp_path, 1)


def test_a_command_line_that_flare_would_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no blanks"):
        check_names(["A"], tmp_path / "my results")
    with pytest.raises(SettingsError, match="101 sites"):
        check_names([f"S{number}" for number in range(101)], tmp_path)


def test_only_the_same_run_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESUME_VARIABLE, "last")  # of another run's, in the user's shell
    first, root = Federation(), tmp_path / "scans"
    home, left = tmp_path / "home", tmp_path / "workspace" / "local" / "resources.json"

    def begun(federation: Federation, root: Path, sites: list[str]) -> str | None:
        """What FLARE is told to go on with, after a run that ended in the middle."""
        _begin(federation, root, sites, tmp_path)
        assert not left.exists()
        told = _environment(home, root)
        assert told[HOME_VARIABLE] == str(home)
        for path in (left, home / "runs" / "cell" / "1" / "adapter_last.safetensors"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{")
        return told.get(RESUME_VARIABLE)

    assert begun(first, root, ["A"]) is None
    assert begun(first, root, ["A"]) == "last"
    # Rounds may change in FLARE, but not the schedule of a learning rate half-way.
    assert begun(Federation(rounds=9), root, ["A"]) is None
    assert begun(Federation(rounds=9), tmp_path / "others", ["A"]) is None
    assert begun(Federation(rounds=9), tmp_path / "others", ["A", "B"]) is None
    assert begun(Federation(rounds=9), tmp_path / "others", ["A", "B"]) == "last"
