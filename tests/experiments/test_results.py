"""The figures that the page shows are those that are kept, and those of the grids as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from flap_nvflare.experiments.cells import same
from flap_nvflare.experiments.grid import GRIDS, read_grid
from flap_nvflare.experiments.run import read_results
from flap_nvflare.experiments.shown import write_shown

ROOM = Path(__file__).parents[2] / "flap_nvflare" / "experiments"  # not what is installed of it
RESULTS = ROOM / "results"
PAGE = (ROOM / "README.md").read_text(encoding="utf-8")
KEPT = sorted(RESULTS.glob("*.json"))


def test_there_are_results() -> None:
    assert len(KEPT) >= 8


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_the_page_shows_what_is_kept(path: Path, tmp_path: Path) -> None:
    grid = read_grid(GRIDS / path.name.replace(".json", ".yaml"))
    cells = read_results(path)
    assert [cell["varied"] for cell in cells] == [cell.varied for cell in grid.cells]
    for one, cell in zip(cells, grid.cells, strict=True):
        assert same(one, cell) is None, cell.folder
    text = write_shown(cells, grid.show, tmp_path, f"flap-nvflare experiment {grid.name}")
    assert text in PAGE
    for plot in grid.show.plots:
        kept = RESULTS / f"{grid.name}_{plot}.svg"
        assert f"results/{kept.name}" in PAGE
        assert kept.is_file()


def test_a_dice_stands_on_three_seeds() -> None:
    for path in KEPT:
        cells = read_results(path)
        if not path.stem.startswith("tuning_") and cells[0]["engine"] == "process":
            assert len({cell["seed"] for cell in cells}) >= 3, path
