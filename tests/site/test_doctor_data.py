"""A site's scans: sound ones described, each broken one named."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from layout_files import write_prostate
from scan_files import write_sites

from flap_nvflare.settings import Federation
from flap_nvflare.site.doctor_data import Scans, check_cases, check_scans
from flap_nvflare.site.finding import Finding, guarded

SETTINGS = Federation()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sites A and B: of each two cases to train on, one held out, one to test on."""
    write_sites(tmp_path, ["A", "B"])
    return tmp_path


def look(
    root: Path, site: str = "A", least: int = 1, settings: Federation = SETTINGS
) -> tuple[list[Finding], Scans]:
    scans = Scans()
    findings = guarded("cases", lambda: check_cases(root, site, settings, least, scans))
    findings += guarded("scans", lambda: check_scans(settings, scans))
    return findings, scans


def mask(root: Path, number: int = 0) -> Path:
    return root / f"case_{number:05d}" / "segmentation.nii.gz"


def test_sound_scans(root: Path) -> None:
    findings, scans = look(root)
    assert [f.name for f in findings] == ["cases", "scans", "labels"]
    assert all(f.ok for f in findings)
    cases, read, labels = findings
    assert "2 training, 1 validation, 1 test" in cases.found
    assert "4 of 4 readable" in read.found
    assert "3 to 3 mm between slices, 1 to 1 mm across; axes of the files: SAR 4" in read.found
    assert labels.found == "kidney in 4 cases, tumour in 4 cases"
    assert scans.needs(7.0).slices == 16
    assert scans.needs(7.0).largest == 4 * 40 * 36
    assert scans.sample is not None


def test_all_sites_where_none_is_named(root: Path) -> None:
    findings, scans = look(root, site="")
    assert [f.found.split(":")[0] for f in findings[:2]] == ["site A", "site B"]
    assert len(scans.slices) == 8


def test_fewer_cases_than_the_site_asks_for(root: Path) -> None:
    findings, _ = look(root, least=3)
    assert findings[0].ok is False
    assert "min_cases asks for 3" in findings[0].found
    assert findings[1].ok is True  # the scans are read all the same


def test_no_table_and_no_such_site(root: Path, tmp_path: Path) -> None:
    findings, _ = look(root, site="Z")
    assert [f.ok for f in findings] == [False]
    assert "'Z'" in findings[0].found
    findings, _ = look(tmp_path / "nowhere", site="")
    assert findings[0].ok is False


def test_every_broken_case_is_named(root: Path) -> None:
    scan = root / "case_00000" / "imaging.nii.gz"
    scan.write_bytes(scan.read_bytes()[:200])
    image = nibabel.load(mask(root, 1))
    moved = image.affine.copy()
    moved[0, 3] += 50
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), moved), mask(root, 1))
    labels = np.asarray(image.dataobj).copy()
    labels[0, 0, 0] = 9
    nibabel.save(nibabel.Nifti1Image(labels, image.affine), mask(root, 2))

    findings, scans = look(root)
    wrong = {f.name: f for f in findings if f.ok is False}
    assert sorted(wrong) == ["case case_00000", "case case_00001", "case case_00002"]
    assert "damaged" in wrong["case case_00000"].found
    assert "corners lie 50 mm apart" in wrong["case case_00001"].found
    assert wrong["case case_00001"].mend.startswith("resample the mask onto the scan's grid, or")
    assert "unknown labels 9" in wrong["case case_00002"].found
    assert "1 of 4 readable" in findings[-2].found
    assert len(scans.slices) == 1


def test_masks_that_show_nothing(root: Path) -> None:
    for number in range(4):
        image = nibabel.load(mask(root, number))
        empty = np.zeros(image.shape, np.uint8)
        nibabel.save(nibabel.Nifti1Image(empty, image.affine), mask(root, number))
    findings, _ = look(root)
    assert findings[-1].name == "labels"
    assert findings[-1].ok is False
    assert findings[-1].found == "kidney in 0 cases, tumour in 0 cases"


def test_scans_in_another_layout(tmp_path: Path) -> None:
    root = write_prostate(tmp_path / "prostate", {"HK": [38, 39, 40], "UCL": [1, 2, 3]})
    settings = Federation(class_names=("prostate",), validation_fraction=0.0)
    scans = Scans()
    found = list(check_cases(root, "", settings, 1, scans)) + list(check_scans(settings, scans))
    assert [finding.ok for finding in found] == [True] * 4
    assert found[0].found.startswith("site HK: 2 training, 0 validation, 1 test")
    assert found[-1].found == "prostate in 6 cases"


def test_a_scan_that_has_no_window_of_its_own(root: Path) -> None:
    path = mask(root).with_name("imaging.nii.gz")
    label = nibabel.load(mask(root))
    drawn = (np.asarray(label.dataobj) > 0).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(drawn, label.affine), path)  # a mask in the scan's place
    assert all(f.ok for f in look(root)[0])
    findings, scans = look(root, settings=Federation(grey_values="scan"))
    (wrong,) = (f for f in findings if f.ok is False)
    assert wrong.name == "case case_00000"
    assert "all of it that is not air has one value, 1" in wrong.found
    assert len(scans.slices) == 3
