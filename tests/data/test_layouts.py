"""How a layout is recognised, what `sites.csv` decides, and what holds for the cases of any."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kits_files import site_lines
from kits_files import write_table as write_kits
from layout_files import (
    refused,
    splits,
    write_nnunet,
    write_prostate,
    write_table,
    write_torchio_ixi,
)

from flap_nvflare.data.entries import Entry, assigned
from flap_nvflare.data.layouts import LAYOUTS, layout_of, list_cases, site_names
from flap_nvflare.data.source import read_cases


def entries(site: str, count: int) -> list[Entry]:
    names = (f"{site}{number:03d}" for number in range(count))
    return [Entry(name, site, "", (), (), "", "") for name in names]


def test_an_unknown_root_is_told_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "scan.nii.gz").touch()
    said = refused(tmp_path)
    assert all(layout.looks_for in said for layout in LAYOUTS.values())
    shutil.rmtree(tmp_path)
    assert "no such folder" in refused(tmp_path)


def test_kits_is_read_as_before(tmp_path: Path) -> None:
    write_kits(tmp_path, site_lines(0, 2, 1))
    assert layout_of(tmp_path).name == "kits"
    assert site_names(tmp_path) == ["A"]
    assert splits(tmp_path, "0") == splits(tmp_path, "a")
    assert [case.name for case in read_cases(tmp_path, "A", 0.0, 0).test] == ["case_00002"]
    (tmp_path / "thresholded_sites.csv").unlink()
    assert "copy FLamby's table" in refused(tmp_path)


def test_a_fifth_gives_the_published_sizes_and_is_the_same_anywhere() -> None:
    sizes = {"Guys": (311, 62), "HH": (181, 36), "IOP": (74, 15)}
    found = assigned([one for site, (count, _) in sizes.items() for one in entries(site, count)])
    for site, (_, test) in sizes.items():
        assert sum(one.split == "test" for one in found if one.site == site) == test
    names = [one.name for one in assigned(entries("Guys", 10)) if one.split == "test"]
    assert names == ["Guys004", "Guys006"]


def test_a_case_that_joins_moves_few_others() -> None:
    before, after = assigned(entries("HH", 100)), assigned(entries("HH", 105))
    test = [{one.name for one in found if one.split == "test"} for found in (before, after)]
    assert len(test[0]) == 20
    assert len(test[0] - test[1]) <= 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_small_site_keeps_a_training_case(count: int) -> None:
    found = [one.split for one in assigned(entries("HH", count))]
    assert found.count("train") == max(1, count - 1)


def test_a_table_of_sites_decides_in_every_layout(tmp_path: Path) -> None:
    ixi = write_torchio_ixi(tmp_path / "ixi")
    write_table(ixi, "IXI012-HH-1211,london,test", " IXI016-Guys-0697 , london, train")
    assert site_names(ixi) == ["london"]
    assert splits(ixi, "london") == {"IXI012-HH-1211": "test", "IXI016-Guys-0697": "train"}
    prostate = write_prostate(tmp_path / "prostate", {"UCL": [1, 32]})
    write_table(prostate, "UCL-Case01,UCL,train", "UCL-Case32,UCL,test")
    assert splits(prostate, "UCL") == {"UCL-Case01": "train", "UCL-Case32": "test"}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["UCL-Case09,UCL,test"], "line 2: no case 'UCL-Case09'"),
        (["UCL-Case01,UCL,test", "UCL-Case01,UCL,train"], "line 3: 'UCL-Case01' is also in line 2"),
        (["UCL-Case01,UCL,validation"], "split is 'validation'; give 'train' or 'test'"),
        (["UCL-Case01,UCL,"], "split is ''; give 'train' or 'test'"),
        (["UCL-Case01,,train"], "site is ''"),
        (["UCL-Case01,A+B,train"], "site is 'A+B'"),
        ([], "lists no case"),
    ],
)
def test_a_table_that_cannot_be_used(tmp_path: Path, lines: list[str], said: str) -> None:
    root = write_prostate(tmp_path, {"UCL": [1, 2]})
    write_table(root, *lines)
    assert said in refused(root)
    assert str(root / "sites.csv") in refused(root)


def test_a_table_without_a_column(tmp_path: Path) -> None:
    root = write_prostate(tmp_path, {"UCL": [1, 2]})
    (root / "sites.csv").write_text("case,site\nUCL-Case01,UCL\n")
    assert "no column ['split']" in refused(root)
    (root / "sites.csv").write_text("case;site;split\nUCL-Case01;UCL;train\n")
    assert "['case;site;split'], which must be separated by commas" in refused(root)


def test_a_table_that_is_a_link_to_nowhere_is_no_missing_one(tmp_path: Path) -> None:
    root = write_prostate(tmp_path, {"UCL": [1, 2]})
    (root / "sites.csv").symlink_to(tmp_path / "gone.csv")
    assert "sites.csv: missing" in refused(root)


def test_a_site_without_test_cases_and_an_unknown_one(tmp_path: Path) -> None:
    root = write_prostate(tmp_path, {"UCL": [2, 3], "HK": [38, 40]})
    assert "site 'UCL' has no test case" in refused(root, "UCL")
    assert splits(root, "HK") == {"HK-Case38": "test", "HK-Case40": "train"}
    assert "no case of site 'ucl'; it holds ['HK', 'UCL']" in refused(root, "ucl")


@pytest.mark.parametrize("layout", ["prostate", "nnunet", "ixi"])
def test_no_link_leads_out_of_the_root(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "root"
    if layout == "prostate":
        write_prostate(root, {"UCL": [1, 2]})
    elif layout == "nnunet":
        write_nnunet(root, ["a"], ["b"])
        write_table(root, "a,UCL,train", "b,UCL,test")
    else:
        write_torchio_ixi(root)
        write_table(root, "IXI012-HH-1211,UCL,train", "IXI013-HH-1212,UCL,test")
    assert len(splits(root, "UCL")) == 2
    mask = list_cases(root, "UCL")[0].label
    mask.rename(tmp_path / "outside.nii.gz")
    mask.symlink_to(tmp_path / "outside.nii.gz")
    assert "is a link out of" in refused(root, "UCL")
    mask.unlink()
    shutil.move(tmp_path / "outside.nii.gz", mask.with_name(f"kept{mask.name}"))
    mask.symlink_to(mask.with_name(f"kept{mask.name}"))  # within the root it is no one's concern
    if layout != "nnunet":
        assert len(splits(root, "UCL")) == 2


@pytest.mark.parametrize("folder", ["UCL", "imagesTr", "label"])
def test_no_folder_that_is_a_link_leads_out(tmp_path: Path, folder: str) -> None:
    root = tmp_path / "root"
    if folder == "UCL":
        write_prostate(root, {"UCL": [1, 2]})
    elif folder == "imagesTr":
        write_nnunet(root, ["a"])
    else:
        write_torchio_ixi(root)
    shutil.move(root / folder, tmp_path / "outside")
    (root / folder).symlink_to(tmp_path / "outside")
    assert "is a link out of" in refused(root)
