"""Files of experiments: the cells that they stand for, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flap_nvflare.combinations import check
from flap_nvflare.data.phantoms import Phantoms
from flap_nvflare.experiments.grid import GRIDS, find_grid, read_grid
from flap_nvflare.settings import SettingsError


def written(folder: Path, **lines: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(lines, sort_keys=False))
    return path


def test_every_value_meets_every_other_and_what_follows(tmp_path: Path) -> None:
    grid = read_grid(
        written(
            tmp_path,
            settings={"rounds": 2},
            data={"test": 1},
            vary={"data.train": [4, 8], "method": ["flap", "full"], "mode": ["federated", "alone"]},
            follow={
                "method": {"full": {"learning_rate": 0.002}},
                "data.train": {8: {"local_epochs": 1, "data.seed": 5}},
            },
            seeds=[3, 1],
        )
    )
    assert grid.name == "mine"
    assert len(grid.cells) == 2 * 2 * 2 * 2
    assert [cell.federation.seed for cell in grid.cells] == [3] * 8 + [1] * 8
    last = grid.cells[-1]
    assert last.varied == {"data.train": 8, "method": "full", "mode": "alone"}
    assert (last.mode, last.engine) == ("alone", "process")
    assert (last.federation.learning_rate, last.federation.local_epochs) == (0.002, 1)
    assert last.data == Phantoms(train=8, test=1, seed=5)
    assert last.folder == "train=8_method=full_mode=alone_seed=1"
    first = grid.cells[0]
    assert (first.federation.learning_rate, first.federation.local_epochs) == (0.01, 2)
    assert all(cell.federation.rounds == 2 for cell in grid.cells)


def test_rows_have_their_own_settings_and_changes_hold_for_all(tmp_path: Path) -> None:
    rows = {"plain": None, "hostile": {"settings": {"rule": "median"}, "attacks": {"B": "flip"}}}
    path = written(tmp_path, rows=rows, seeds=[0])
    plain, hostile = read_grid(path, {"rounds": 1, "rule": "mean"}).cells
    assert (plain.name, plain.federation.rule, plain.federation.rounds) == ("plain", "mean", 1)
    assert (hostile.federation.rule, dict(hostile.attacks)) == ("median", {"B": "flip"})


def test_sites_that_are_numbers_are_names(tmp_path: Path) -> None:
    rows = {"hostile": {"attacks": {26: "flip"}}}
    (cell,) = read_grid(written(tmp_path, rows=rows, seeds=[0])).cells
    assert dict(cell.attacks) == {"26": "flip"}


def test_only_federations_go_through_the_simulator(tmp_path: Path) -> None:
    vary = {"mode": ["federated", "alone", "pooled"]}
    cells = read_grid(written(tmp_path, vary=vary, seeds=[0], engine="simulator")).cells
    assert [cell.engine for cell in cells] == ["simulator", "process", "process"]


def test_what_follows_is_found_by_value_not_by_its_writing(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: {}\nsettings:\nseeds: [0]\n"
        "vary: {data.difference: [0.0, 2], upload: [[int8], [int4]], augment: [yes, no]}\n"
        "follow:\n"
        "  data.difference: {0: {rounds: 7}, 2.0: {rounds: 8}}\n"
        "  augment: {true: {augment_views: 3}}\n"
    )
    cells = read_grid(path).cells
    assert [cell.federation.rounds for cell in cells] == [7] * 4 + [8] * 4
    assert [cell.federation.augment_views for cell in cells] == [3, 0] * 4
    assert cells[4].data == Phantoms(difference=2.0)


def test_folders_stay_short_and_apart(tmp_path: Path) -> None:
    ranks = [{f"site {place}": rank for place in range(40)} for rank in (4, 8)]
    cells = read_grid(written(tmp_path, vary={"site_ranks": ranks}, seeds=[0])).cells
    assert len({cell.folder for cell in cells}) == 2
    assert all(len(cell.folder) < 140 for cell in cells)


def test_scans_of_ones_own(tmp_path: Path) -> None:
    path = written(tmp_path, data={"root": "/scans/"}, test_on={"mr": {"seed": 4}}, seeds=[0])
    (cell,) = read_grid(path).cells
    assert cell.data == Path("/scans")
    assert cell.test_on == {"mr": Phantoms(seed=4)}
    assert cell.made_with()["data"] == {"root": "/scans"}


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ({"colour": 1}, "'colour' is not allowed; expected one of"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, 0]}, "seeds"),
        ({"seeds": 0}, "a value of type list"),
        ({"engine": "cloud"}, "engine: 'cloud'"),
        ({"vary": {"rank": 4}}, "vary: rank: '4'"),
        ({"vary": {"rank": []}}, "vary: rank"),
        ({"vary": {"rank": [4]}, "follow": {"rule": {}}}, "follow: 'rule'"),
        ({"vary": {"rank": [0]}}, "rank"),
        ({"vary": {"mode": ["together"]}}, "mode: 'together'"),
        ({"vary": {"data.colour": [1]}}, "data: 'colour'"),
        ({"data": {"root": "x", "seed": 1}}, "root alone"),
        ({"rows": {"a": {"colour": 1}}}, "rows: a"),
        ({"rows": {"a": {"attacks": {"B": "bomb"}}}}, "'bomb'"),
        ({"rows": {"a": {"mode": "alone", "attacks": {"B": "flip"}}}}, "mode federated"),
        ({"rows": {"a b": {}, "a/b": {}}}, "two cells are 'a_b_seed=0'"),
        ({"show": {"columns": ["beauty"]}}, "'beauty'"),
        ({"show": {"plots": {"x": {"kind": "pie"}}}}, "'pie'"),
        ({"show": {"colour": 1}}, "colour"),
        ({"settings": {"colour": 1}}, "colour"),
        ({"settings": 3}, "settings: '3'"),
        ({"vary": {"rank": [4, 4]}}, "vary: rank"),
        ({"vary": {"rank": [4]}, "follow": {"rank": {8: {}}}}, "follow: rank: '8'"),
        ({"vary": {"lora_blocks": [1]}, "follow": {"lora_blocks": {True: {}}}}, "'True'"),
        ({"vary": {"rank": [4]}, "follow": {"rank": {4: 3}}}, "follow: rank: 4: '3'"),
        ({"vary": {"rank": [4]}, "follow": {"rank": [4]}}, "follow: rank"),
        ({"vary": {True: [4]}}, "True"),
        ({"data": {"difference": "far"}}, "data: difference: 'far'"),
        ({"data": {"sites": 2.5}}, "data: sites"),
        ({"rows": {"a": {"settings": [1]}}}, "rows: a: settings"),
        ({"rows": {"a": {"attacks": ["B"]}}}, "rows: a: attacks"),
        # Under FLARE nobody would be hostile, and nothing scored on other data.
        ({"engine": "simulator", "rows": {"a": {"attacks": {"B": "flip"}}}}, "for attacks"),
        ({"engine": "simulator", "test_on": {"mr": {}}}, "for test_on"),
        ({"engine": "simulator", "curve": True}, "for curve"),
        ({"settings": {"encryption": "he"}}, "engine: simulator"),
        ({"test_on": {"mr": {}}, "rows": {"a": {"mode": "alone"}}}, "test_on: 'alone'"),
        ({"show": {"columns": "mean"}}, "show: columns: 'mean'"),
        ({"show": {"plots": {"../x": {"kind": "bars"}}}}, "'../x'"),
        ({"show": {"plots": {"x": {"kind": "lines"}}}}, "plot x: x: 'None'"),
        ({"show": {"plots": {"x": {"kind": "lines", "x": "size"}}}}, "plot x: x: 'size'"),
        ({"show": {"plots": {"x": {"kind": "figure_one", "by": "size"}}}}, "by: 'size'"),
        ({"show": {"plots": {"x": {"kind": "bars", "of": ["mean", "lung"]}}}}, "'lung'"),
        ({"show": {"plots": {"x": {"kind": "matrix"}}}}, "test_on"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(
    tmp_path: Path, lines: dict[str, Any], problem: str
) -> None:
    path = written(tmp_path, **lines)
    with pytest.raises(SettingsError, match=r"mine\.yaml") as caught:
        read_grid(path)
    assert problem in str(caught.value)


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("a: [")
    with pytest.raises(SettingsError, match="cannot be read as YAML"):
        read_grid(path)
    path.write_text("- a")
    with pytest.raises(SettingsError, match="lines of 'name: value'"):
        read_grid(path)


def test_what_stands_twice_is_not_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rows:\n  a: {settings: {rank: 4}}\n  a: {settings: {rank: 8}}\n")
    with pytest.raises(SettingsError, match=r"mine\.yaml: .*'a' stands here twice(.|\n)*line 3"):
        read_grid(path)


@pytest.mark.parametrize(
    "lines",
    [{"vary": {"rank": [2, 4]}}, {"rows": {"a": {"settings": {"rank": 2}}}}],
    ids=["axis", "row"],
)
def test_a_change_that_no_cell_would_take_is_refused(tmp_path: Path, lines: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"--set: 'rank'"):
        read_grid(written(tmp_path, **lines), {"rank": 8})


def test_the_packages_grids_are_found_by_name() -> None:
    assert find_grid("rules") == GRIDS / "rules.yaml"
    with pytest.raises(SettingsError, match=r"colours: no such file.*rules"):
        find_grid("colours")


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_grid_of_the_package_makes_sense(path: Path) -> None:
    grid = read_grid(path)
    assert grid.about.endswith((".", "?"))
    for cell in grid.cells:
        check(cell.federation)
