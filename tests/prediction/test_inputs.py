"""Which files of a folder are scans, and what their results are called."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_series

from flap_nvflare.data.errors import DataError
from flap_nvflare.prediction.inputs import find_inputs


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def test_a_file_and_what_is_none(tmp_path: Path) -> None:
    touch(tmp_path, "a.b.nii.gz", "notes.txt")
    (one,) = find_inputs(tmp_path / "a.b.nii.gz")
    assert (one.name, one.files) == ("a.b", (tmp_path / "a.b.nii.gz",))
    with pytest.raises(DataError, match=r"notes\.txt: is no NIfTI file by its name"):
        find_inputs(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="no such file or folder"):
        find_inputs(tmp_path / "none")
    for path in (tmp_path, tmp_path / "a.b.nii.gz"):
        with pytest.raises(DataError, match=r"--series 1\.2: .* is NIfTI"):
            find_inputs(path, "1.2")


def test_the_scans_below_a_folder(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b.nii",
        "a.nii.gz",
        "a_mask.nii.gz",
        ".a.tmp.nii.gz",
        ".cache/x.nii",
        "notes.txt",
        "case_00001/imaging.nii.gz",
        "case_00001/segmentation.nii.gz",
        "other/segmentation.nii.gz",
    )
    names = [one.name for one in find_inputs(tmp_path)]
    assert names == ["a", "b", "case_00001/imaging", "other/segmentation"]


def test_masks_of_a_known_layout_are_no_scans(tmp_path: Path) -> None:
    touch(tmp_path, "HK/Case38.nii.gz", "HK/Case38_segmentation.nii.gz")
    assert [one.name for one in find_inputs(tmp_path)] == ["HK/Case38"]


def test_two_scans_of_one_name_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "a.nii.gz")
    with pytest.raises(DataError, match=r"a\.nii\.gz: would share its mask with .*a\.nii"):
        find_inputs(tmp_path)


def test_folders_of_dicom(tmp_path: Path) -> None:
    root = tmp_path / "patient"
    write_series(root / "ct", np.zeros((2, 3, 3), np.int16), uid="1.5")
    write_series(root, np.zeros((2, 3, 3), np.int16))
    touch(root, "ct/readme")
    inputs = find_inputs(root, "1.5")
    assert [(one.name, len(one.files)) for one in inputs] == [("patient", 2), ("ct", 2)]
    assert inputs[1].open().shape == (2, 3, 3)
    with pytest.raises(DataError, match=r"no series 1\.5"):
        inputs[0].open()


def test_without_pydicom_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(tmp_path, np.zeros((2, 3, 3), np.int16))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"pip install 'flap_nvflare\[dicom\]'"):
        find_inputs(tmp_path)


def test_a_folder_without_scans(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(DataError, match="no NIfTI file"):
        find_inputs(tmp_path)


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii")
    (one,) = find_inputs(tmp_path / "a.nii")
    before = one.sha256()
    assert before == one.sha256()
    (tmp_path / "a.nii").write_bytes(b"b.nii")
    assert one.sha256() != before
