"""IXI in the three ways in which it comes, and FLamby's table."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from layout_files import (
    refused,
    splits,
    write_flamby_ixi,
    write_own_ixi,
    write_pair,
    write_scan,
    write_torchio_ixi,
)

from flap_nvflare.data.layouts import layout_of, list_cases, site_names
from flap_nvflare.data.volume import load_volume


def write_metadata(folder: Path, *lines: str) -> None:
    (folder / "metadata_tiny.csv").write_text(
        "\n".join(["Patient ID,Manufacturer,Split", *lines]) + "\n"
    )


@pytest.mark.parametrize("write", [write_flamby_ixi, write_torchio_ixi, write_own_ixi])
def test_as_it_is_unzipped(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    root = write(tmp_path)
    assert layout_of(root).name == "ixi"
    assert site_names(root) == ["Guys", "HH"]
    assert sorted(splits(root, "HH")) == ["IXI012-HH-1211", "IXI013-HH-1212"]
    assert sorted(splits(root, "HH").values()) == ["test", "train"]
    for case in list_cases(root, "Guys"):
        volume = load_volume(case, 1)
        assert volume.image[volume.label == 1].mean() > 80
        assert volume.image[volume.label == 0].mean() < 5


def test_other_weightings_and_hidden_files_are_left_alone(tmp_path: Path) -> None:
    root = write_own_ixi(tmp_path)
    write_scan(root / "IXI-T2" / "IXI012-HH-1211-T2.nii.gz")
    write_scan(root / "IXI-T1" / "IXI012-HH-1211-PD.nii.gz")
    (root / "IXI-T1" / "._IXI012-HH-1211-T1.nii.gz").touch()
    assert list_cases(root, "HH")[0].image.name == "IXI012-HH-1211-T1.nii.gz"


@pytest.mark.parametrize("beside", [False, True])
def test_flambys_table_gives_cases_and_split(tmp_path: Path, beside: bool) -> None:
    root = write_flamby_ixi(tmp_path)
    folder = root / "7kd5wj7v7p-3" / "IXI_sample" if beside else root
    # IXI016 is not among the published cases; of IOP nothing is here.
    write_metadata(folder, "2,0,test", "12,1,train", "13,1,test", "35,2,train")
    assert splits(root, "HH") == {"IXI012-HH-1211": "train", "IXI013-HH-1212": "test"}
    assert site_names(root) == ["Guys", "HH"]
    assert "'Guys' has no train case" in refused(root, "Guys")


def test_a_case_of_the_table_that_is_not_there(tmp_path: Path) -> None:
    root = write_flamby_ixi(tmp_path)
    write_metadata(root, "12,1,train", "13,1,test", "14,1,train")
    assert "case IXI014-HH has no scan" in refused(root, "HH")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["12,0,train"], "manufacturer 0 is Guys, but the files are IXI012-HH-1211"),
        (["12,1,train", "12,1,test"], "patient 12 is also in line 2"),
        (["12,3,train"], "expected a patient's number"),
        (["IXI012,1,train"], "expected a patient's number"),
        (["12,1,"], "'train' or 'test'"),
    ],
)
def test_a_table_that_cannot_be_used(tmp_path: Path, lines: list[str], said: str) -> None:
    root = write_flamby_ixi(tmp_path)
    write_metadata(root, *lines)
    assert said in refused(root)
    assert "metadata_tiny.csv, line" in refused(root)


def test_two_tables(tmp_path: Path) -> None:
    root = write_torchio_ixi(tmp_path)
    write_metadata(root, "12,1,train")
    write_metadata(root / "image", "12,1,train")
    assert "keep one of them" in refused(root)


def test_a_missing_mask_and_two_masks(tmp_path: Path) -> None:
    root = write_torchio_ixi(tmp_path)
    mask = root / "label" / "IXI012-HH-1211_label.nii.gz"
    mask.rename(root / "label" / "IXI012-HH-1211_seg.nii")
    write_scan(mask)
    said = refused(root, "HH")
    assert "IXI012-HH-1211 has 2 files as its mask" in said
    assert "label/IXI012-HH-1211_seg.nii" in said
    mask.unlink()
    (root / "label" / "IXI012-HH-1211_seg.nii").unlink()
    said = refused(root, "HH")
    assert "case IXI012-HH-1211 has no mask; expected IXI012-HH-1211*.nii.gz in" in said
    assert len(splits(root, "Guys")) == 2  # another hospital's fault is none of theirs


def test_a_patient_is_one_case(tmp_path: Path) -> None:
    """Two scans of one patient could come to be one for training and one for testing."""
    root = write_torchio_ixi(tmp_path)
    scan, mask = root / "image" / "IXI012-HH-1300.nii.gz", root / "label" / "IXI012-HH-1300.nii.gz"
    write_pair(scan, mask)
    assert "has 2 files as its scan" in refused(root, "HH")


def test_a_folder_that_may_not_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_torchio_ixi(tmp_path)
    listed = os.scandir

    def closed(place: str) -> object:
        if Path(place).name == "label":
            raise PermissionError(13, "Permission denied", place)
        return listed(place)

    monkeypatch.setattr(os, "scandir", closed)  # root may read all
    assert f"{root / 'label'}: cannot be looked into" in refused(root, "HH")


def test_an_unknown_hospital(tmp_path: Path) -> None:
    root = write_torchio_ixi(tmp_path, ["IXI012-XY-1211"])
    assert "unknown hospital 'XY'" in refused(root)
