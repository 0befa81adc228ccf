"""Cells that run once: kept, gone on with, refused when they are others', shown again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from flap_nvflare import cli
from flap_nvflare.data.phantoms import Phantoms
from flap_nvflare.experiments import cells
from flap_nvflare.experiments.cells import CELL, FAILED, Desk
from flap_nvflare.experiments.commands import _command as made_by
from flap_nvflare.experiments.grid import GRIDS, Cell, read_grid
from flap_nvflare.experiments.run import read_results, run_grid
from flap_nvflare.in_process import run as train
from flap_nvflare.settings import SettingsError


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "out", tmp_path / "drawn")


def silent(done: int, total: int, cell: str) -> None:
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
        (
            {"federation": {**federation, "rounds": 9}},
            r"another federation: rounds, 9 and not 1; name another folder",
        ),
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


def test_a_cell_that_fails_leaves_the_others_their_turn(grid_file: Path, desk: Desk) -> None:
    # The official ViT-B asks for its file, which nobody has named.
    text = grid_file.read_text().replace("base: random, ", "")
    grid_file.write_text(text.replace("method: [flap, partial_decoder]", "arch: [vit_b, vit_t]"))
    grid, told = read_grid(grid_file), []
    with pytest.raises(RuntimeError, match=r"(?s)1 of 2 cells failed.*arch=vit_b_seed=0: "):
        run_grid(grid, desk, 1, lambda *progress: told.append(progress))
    assert told == [(0, 2, ""), (0, 2, "arch=vit_b_seed=0"), (1, 2, "arch=vit_t_seed=0")]
    assert cells.kept(grid.cells[1], desk)
    assert "Traceback" in (desk.folder(grid.cells[0]) / FAILED).read_text()
    assert not (desk.out / "cells.json").exists()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("{scans}", "{scans}/none", "flap_seed=0: .*none: no such folder"),
        ("rank: 2", "rule: ffa, site_ranks: {A: 4}", "flap_seed=0: setting site_ranks"),
        ("method: [flap, partial_decoder]", "site_ranks: [{Z: 2}]", r"site_ranks: no .* \['Z'\]"),
        ("seeds:", "rows: {a: {attacks: {Z: flip}}}\nseeds:", r"attacks: no scans of .*'Z'"),
    ],
)
def test_what_could_not_be_trained_is_said_before_anything_is(
    grid_file: Path, scans: Path, desk: Desk, old: str, new: str, problem: str
) -> None:
    old, new = (text.replace("{scans}", str(scans)) for text in (old, new))
    grid_file.write_text(grid_file.read_text().replace(old, new))
    with pytest.raises(SettingsError, match=problem):
        run_grid(read_grid(grid_file), desk, 1, silent)
    assert not (desk.out / "cells").exists()


def test_phantoms_of_other_knobs_have_another_folder(desk: Desk) -> None:
    knobs: list[dict[str, Any]] = [
        {},
        {"kind": "ixi"},
        *({name: number} for name in ("seed", "sites", "train", "test") for number in (1, 12)),
        {"seed": 1, "sites": 2},
        {"seed": 12, "train": 1},
        *({name: number} for name in ("difference", "labels") for number in (0.1, 1 / 3, 10.0)),
        {"modality": "mr"},
    ]
    roots = [desk.root(Phantoms(**one)) for one in knobs]
    assert len(set(roots)) == len(knobs)
    assert all(len(root.name) < 60 for root in roots)


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
    assert table.count("Made by `flap-nvflare experiment tiny.yaml`") == 1  # and no folder of ours

    # From the figures alone, elsewhere, without a cell's folder.
    kept = tmp_path / "kept" / "tiny.json"
    kept.parent.mkdir()
    kept.write_bytes((out / "cells.json").read_bytes())
    assert command((grid_file, "--results", kept, "--json")) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(kept.read_text())
    assert (kept.parent / "table.md").read_text() == (out / "table.md").read_text()
    kept.write_text('[{"name": ""}]')
    assert command((grid_file, "--results", kept)) == 1
    assert "no list of cells" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("colours",), "no such file"),
        (("rules", "--jobs", "0"), "--jobs"),
        (("rules", "--set", "colour=1"), "colour"),
        (("--set", "rounds=1", "mine.yaml"), "'mine.yaml' is not allowed; expected NAME=VALUE"),
        (("rules", "--set", "class_names=[a"), "class_names=[a"),
        ((), "--list"),
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
    assert command(("--list", "--json")) == 0
    found = {one["name"]: one["cells"] for one in json.loads(capsys.readouterr().out)}
    assert found["rules"] == 39


def test_the_command_in_the_caption_holds_no_folder() -> None:
    assert made_by(GRIDS / "rules.yaml", []) == "flap-nvflare experiment rules"
    made = made_by(Path("/home/me/rules.yaml"), ["class_names=[a, b]", "rank=2"])
    assert made == "flap-nvflare experiment rules.yaml --set 'class_names=[a, b]' rank=2"


def test_a_running_cell_ends_with_a_killed_command(grid_file: Path, tmp_path: Path) -> None:
    """Otherwise a second start would train the same cell beside it."""
    grid_file.write_text(grid_file.read_text().replace("rounds: 1", "rounds: 500"))
    words = ("experiment", grid_file, "--out", tmp_path / "out", "--scans", tmp_path / "drawn")
    started = [sys.executable, "-m", "flap_nvflare.cli", *map(str, words)]
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        folder = tmp_path / "out" / "cells"
        wait_until(lambda: folder.is_dir() and any(folder.iterdir()))
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert children
    assert not psutil.wait_procs(children, timeout=20)[1]


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)
