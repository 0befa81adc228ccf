"""The command prepare: what it names, what it writes and what it leaves alone."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from layout_files import (
    AFFINE,
    splits,
    write_nnunet,
    write_prostate,
    write_table,
    write_torchio_ixi,
)
from PIL import Image
from scan_files import write_sites as write_kits

from flap_nvflare.cli import main
from flap_nvflare.data import preparation
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.layouts import LAYOUTS, site_names
from flap_nvflare.data.phantoms import Phantoms, write_phantoms
from flap_nvflare.data.prepare_commands import LAYOUTS as OFFERED

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pictures come to lie."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_prostate(tmp_path / "prostate", {"RUNMC": [3, 4, 5], "HK": [38, 40]})


class Said:
    """What the command said, and its exit code."""

    def __init__(self, capsys: Capture, *arguments: object) -> None:
        capsys.readouterr()
        self.code = main(["prepare", *map(str, arguments)])
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


def test_every_layout_is_offered() -> None:
    assert sorted(OFFERED) == sorted(LAYOUTS)


def test_a_sound_root_gets_its_table_and_picture(root: Path, here: Path, capsys: Capture) -> None:
    before = {site: splits(root, site) for site in site_names(root)}
    said = Said(capsys, "prostate", root, "--json")
    assert said.code == 0
    assert said.err == ""
    found = said.json
    assert found["ok"]
    assert not found["synthetic"]
    assert found["class_names"] == ["prostate"]
    site = found["sites"]["RUNMC"]
    assert site["train"] == ["RUNMC-Case04", "RUNMC-Case05"]
    assert site["test"] == ["RUNMC-Case03"]
    assert site["shapes"] == [[4, 10, 12]] * 3
    assert site["spacings_mm"] == [[3.0, 2.0, 2.0]] * 3
    assert (site["cases_read"], site["cases_with_class"]) == (1, {"prostate": 1})
    assert site["foreground_percentiles"][1] == pytest.approx(100, abs=5)
    lines = (root / "sites.csv").read_text().splitlines()
    assert lines[:2] == ["case,site,split", "HK-Case38,HK,test"]
    assert len(lines) == 6
    assert before == {site: splits(root, site) for site in site_names(root)}
    picture = here / "prostate_sites.png"
    assert found["picture"] == picture.name
    assert stat.S_IMODE(picture.stat().st_mode) == 0o600
    height = Image.open(picture).height
    write_table(root, "HK-Case38,HK,test", "HK-Case40,HK,train")
    Said(capsys, "prostate", root, "--picture", "one.png")
    assert height > 1.8 * Image.open(here / "one.png").height  # a row a site


def test_what_a_person_reads(root: Path, capsys: Capture) -> None:
    said = Said(capsys, "prostate", root)
    assert said.code == 0
    for part in ("RUNMC", "prostate in 1", 'class_names: ["prostate"]', "sites.csv"):
        assert part in said.out
    assert said.out.endswith("grey_values: scan\n")


def test_everything_wrong_is_named_at_once(root: Path, capsys: Capture) -> None:
    (root / "RUNMC" / "Case04_segmentation.nii.gz").unlink()
    (root / "RUNMC" / "Case03.nii.gz").write_bytes(b"no scan")
    moved = AFFINE.copy()
    moved[0, 3] = 40
    mask = root / "HK" / "Case40_segmentation.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(mask).dataobj), moved), mask)
    said = Said(capsys, "prostate", root)
    assert said.code == 1
    assert "RUNMC-Case04 has no mask; expected RUNMC/Case04_segmentation.nii.gz" in said.out
    assert "Case03.nii.gz: damaged or not NIfTI" in said.out
    assert "corners lie 40 mm apart" in said.out
    assert "--copy-geometry" in said.out
    assert "https://liuquande.github.io/SAML/" in said.out
    assert not (root / "sites.csv").exists()


def test_a_site_with_one_split_is_named(tmp_path: Path, capsys: Capture) -> None:
    said = Said(capsys, "prostate", write_prostate(tmp_path / "p", {"HK": [39, 40]}), "--json")
    assert said.code == 1
    (problem,) = said.json["problems"]
    assert "site 'HK' has no test case" in problem


def test_voxels_of_all_cases_are_read_if_asked(root: Path, capsys: Capture) -> None:
    path = root / "RUNMC" / "Case05.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])  # the header is whole
    assert Said(capsys, "prostate", root).code == 0
    said = Said(capsys, "prostate", root, "--deep", "--json")
    assert said.code == 1
    (problem,) = said.json["problems"]
    assert "Case05.nii.gz: damaged" in problem
    assert said.json["sites"]["RUNMC"]["cases_read"] == 2


def test_a_site_whose_masks_are_empty(tmp_path: Path, capsys: Capture) -> None:
    root = write_prostate(tmp_path / "p", {"HK": [38, 40]})
    for number in (38, 40):
        path = root / "HK" / f"Case{number}_segmentation.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.zeros((12, 10, 4), np.uint8), AFFINE), path)
    assert "--deep reads every case" in Said(capsys, "prostate", root).out
    said = Said(capsys, "prostate", root, "--deep")
    assert said.code == 1
    assert "problem: site HK: the 2 cases that were read show no foreground" in said.out


def test_a_table_that_is_there_is_kept(root: Path, capsys: Capture) -> None:
    write_table(root, "RUNMC-Case04,basel,train", "RUNMC-Case05,basel,test")
    text = (root / "sites.csv").read_text()
    said = Said(capsys, "prostate", root)
    assert said.code == 0
    assert (root / "sites.csv").read_text() == text
    assert "is kept" in said.out
    assert "3 cases are not in it and are left out: HK-Case38" in said.out
    assert "--force" in Said(capsys, "prostate", root, "--site", "munich").err
    assert (root / "sites.csv").read_text() == text
    assert Said(capsys, "prostate", root, "--force").code == 0
    assert site_names(root) == ["HK", "RUNMC"]


def test_nnunet_needs_a_site(tmp_path: Path, capsys: Capture) -> None:
    root = write_nnunet(tmp_path / "set", list("abcdef"), labels={"0": "background", "1": "liver"})
    said = Said(capsys, "nnunet", root)
    assert said.code == 1
    assert "--site NAME" in said.err
    assert said.err.count("\n") == 1
    said = Said(capsys, "nnunet", root, "--site", "munich")
    assert said.code == 0
    assert 'class_names: ["liver"]' in said.out
    assert sorted(splits(root, "munich").values()) == ["test"] + ["train"] * 5


def test_a_site_that_is_no_name(tmp_path: Path, capsys: Capture) -> None:
    root = write_nnunet(tmp_path / "set", list("ab"))
    said = Said(capsys, "nnunet", root, "--site", "A+B")
    assert said.code == 1
    assert "--site A+B" in said.err
    assert not (root / "sites.csv").exists()


def test_a_patient_with_several_cases_is_for_a_person_to_keep_together(
    tmp_path: Path, capsys: Capture
) -> None:
    root = write_nnunet(tmp_path / "set", ["p1_a", "p1_b"])
    said = Said(capsys, "nnunet", root, "--site", "munich")
    assert "of a patient with several cases, give all the same split" in said.out


def test_ixi_says_that_its_split_is_not_the_published_one(tmp_path: Path, capsys: Capture) -> None:
    said = Said(capsys, "ixi", write_torchio_ixi(tmp_path / "ixi"))
    assert said.code == 0
    assert "the published cases are those of FLamby's metadata_tiny.csv" in said.out


def test_kits_has_a_table_of_its_own(tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "kits"
    write_kits(root, ["A", "B"])
    said = Said(capsys, "kits", root, "--json")
    assert said.code == 0
    assert not (root / "sites.csv").exists()
    assert said.json["sites"]["B"]["cases_with_class"] == {"kidney": 1, "tumour": 1}
    (root / "case_00001" / "imaging.nii.gz").unlink()
    (root / "case_00005" / "segmentation.nii.gz").unlink()
    said = Said(capsys, "kits", root, "--json")
    assert said.code == 1
    assert [problem.rpartition("; ")[2] for problem in said.json["problems"]] == [
        "expected case_00001/imaging.nii.gz",
        "expected case_00005/segmentation.nii.gz",
    ]
    assert "table" in Said(capsys, "kits", root, "--site", "A").err


def test_a_root_that_cannot_be_written(
    root: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(preparation, "write_sites", full)
    said = Said(capsys, "prostate", root)
    assert said.code == 0
    assert "Read-only file system); training does without" in said.out
    other = write_nnunet(tmp_path / "set", ["a", "b"])
    said = Said(capsys, "nnunet", other, "--site", "munich")
    assert said.code == 1
    assert "Read-only file system" in said.err


def test_phantoms_are_named_and_left_as_they_are(root: Path, capsys: Capture) -> None:
    (root / "PHANTOM.json").write_text("{}")
    said = Said(capsys, "prostate", root)
    assert said.code == 0
    assert said.out.startswith("Synthetic scans")
    for options in (("--site", "munich"), ("--force",), ("--copy-geometry",)):
        said = Said(capsys, "prostate", root, *options)
        assert said.code == 1  # training would not follow
        assert f"nothing is added; leave out {options[0]}" in said.err
    assert not (root / "sites.csv").exists()


def test_what_was_prepared_is_no_place_for_phantoms(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert Said(capsys, "prostate", root).code == 0
    before = {path.relative_to(root) for path in root.rglob("*")}
    assert main(["phantom", str(root), "--kind", "prostate"]) == 1
    assert "not synthetic: HK, RUNMC, sites.csv; move it out" in capsys.readouterr().err
    assert {path.relative_to(root) for path in root.rglob("*")} == before
    drawn = write_phantoms(tmp_path / "drawn", Phantoms(kind="ixi"), only=[])
    write_table(drawn, "IXI001-Guys-0701,here,train")
    with pytest.raises(DataError, match=r"not synthetic: sites\.csv; move it out"):
        write_phantoms(drawn, Phantoms(kind="ixi"), only=[])


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_root_without_the_data_is_told_where_to_get_them(
    tmp_path: Path, capsys: Capture, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        said = Said(capsys, name, tmp_path / folder)
        assert said.code == 1
        assert LAYOUTS[name].origin in said.err
        assert LAYOUTS[name].looks_for in said.err
        assert said.err.count("\n") == 1


def test_a_root_that_training_would_read_otherwise(root: Path, capsys: Capture) -> None:
    write_nnunet(root, ["a"])
    assert "would be read as nnunet" in Said(capsys, "prostate", root).err


@pytest.mark.parametrize("wrong_affine", [np.diag([-1.0, -1.0, 1.0, 1.0]), None])
@pytest.mark.parametrize("links", [True, False])
def test_the_geometry_of_the_scan_is_copied_if_asked(
    root: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    wrong_affine: np.ndarray | None,
    links: bool,
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr("os.link", no_links)
    mask = root / "RUNMC" / "Case04_segmentation.nii.gz"
    values = np.asarray(nibabel.load(mask).dataobj)
    nibabel.save(nibabel.Nifti1Image(values, wrong_affine), mask)
    wrong, other = mask.read_bytes(), (root / "HK" / "Case40_segmentation.nii.gz").read_bytes()
    said = Said(capsys, "prostate", root)
    assert said.code == 1
    assert "--copy-geometry" in said.out
    said = Said(capsys, "prostate", root, "--copy-geometry", "--json")
    assert said.code == 0
    assert said.json["mended"] == [str(mask)]
    mended = nibabel.load(mask)
    assert np.asarray(mended.dataobj).tolist() == values.tolist()
    assert mended.affine.tolist() == AFFINE.tolist()
    assert mask.with_name(f"{mask.name}.orig").read_bytes() == wrong
    assert (root / "HK" / "Case40_segmentation.nii.gz").read_bytes() == other
    assert len(splits(root, "RUNMC")) == 3  # the mask as it was is no second one
    assert not [path for path in mask.parent.iterdir() if path.name.startswith(".")]
