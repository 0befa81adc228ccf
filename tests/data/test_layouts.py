"""Each official layout read as its data come, and what is wrong with a root named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kits_files import site_lines, write_table
from layout_files import (
    write_flamby_ixi,
    write_nnunet,
    write_own_ixi,
    write_prostate,
    write_torchio_ixi,
)

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.layouts import LAYOUTS, layout_of, list_cases, site_names
from flap_nvflare.data.source import read_cases
from flap_nvflare.data.volume import load_volume


def splits(root: Path, site: str) -> dict[str, str]:
    return {case.name: case.split for case in list_cases(root, site)}


def refused(root: Path, site: str = "") -> str:
    with pytest.raises(DataError) as caught:
        list_cases(root, site) if site else site_names(root)
    return str(caught.value)


def write_sites(root: Path, *lines: str) -> None:
    (root / "sites.csv").write_text("\n".join(["case,site,split", *lines]) + "\n")


@pytest.mark.parametrize("write", [write_flamby_ixi, write_torchio_ixi, write_own_ixi])
def test_ixi_as_it_is_unzipped(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    root = write(tmp_path)
    assert layout_of(root).name == "ixi"
    assert site_names(root) == ["Guys", "HH"]
    assert sorted(splits(root, "HH").values()) == ["test", "train"]
    for case in list_cases(root, "Guys"):
        volume = load_volume(case, 1)
        assert volume.image[volume.label == 1].mean() > 80
        assert volume.image[volume.label == 0].mean() < 5


def test_prostate_has_the_published_split_and_one_class(tmp_path: Path) -> None:
    root = write_prostate(tmp_path, {"RUNMC": [3, 4, 5], "BIDMC": [0, 1]})
    assert layout_of(root).name == "prostate"
    assert site_names(root) == ["BIDMC", "RUNMC"]
    expected = {"RUNMC-Case03": "test", "RUNMC-Case04": "train", "RUNMC-Case05": "train"}
    assert splits(root, "RUNMC") == expected
    for case in read_cases(root, "RUNMC", 0.0, 0).train:
        assert np.unique(load_volume(case, 1).label).tolist() == [0, 1]


def test_nnunet_needs_a_table_of_sites(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path, ["a", "b", "c"])
    assert layout_of(root).name == "nnunet"
    assert f"flap-nvflare prepare nnunet {root} --site NAME" in refused(root)
    write_sites(root, "a,munich,train", "b,munich,test", "c,basel,train")
    assert site_names(root) == ["basel", "munich"]
    assert splits(root, "munich") == {"a": "train", "b": "test"}
    assert "'basel' has no test case" in refused(root, "basel")


def test_kits_is_read_as_before(tmp_path: Path) -> None:
    write_table(tmp_path, site_lines(0, 2, 1))
    assert layout_of(tmp_path).name == "kits"
    assert site_names(tmp_path) == ["A"]
    assert [case.name for case in list_cases(tmp_path, 0)] == [
        case.name for case in list_cases(tmp_path, "a")
    ]


def test_an_unknown_root_is_told_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "scan.nii.gz").touch()
    said = refused(tmp_path)
    assert all(layout.looks_for in said for layout in LAYOUTS.values())
    shutil.rmtree(tmp_path)
    assert "no such folder" in refused(tmp_path)
