"""Synthetic heads and pelves: files as the public sets have them, anatomy, seeds, refusals."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import label as components

from flap_nvflare.cli import main
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.layouts import site_names
from flap_nvflare.data.phantom_files import Drawn
from flap_nvflare.data.phantom_ixi import HEAD_SITES, head_case
from flap_nvflare.data.phantom_ixi import phantom_folder as head_folder
from flap_nvflare.data.phantom_prostate import PELVIS_SITES, pelvis_case, phantom_folder
from flap_nvflare.data.phantoms import FIRST_TEST, Phantoms, phantom_sites, write_phantoms
from flap_nvflare.data.scan import open_scan
from flap_nvflare.data.source import read_cases
from flap_nvflare.data.volume import load_volume


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Site IOP with one training and one test case, by the command."""
    root = tmp_path_factory.mktemp("ixi")
    knobs = ["--kind", "ixi", "--train", "1", "--test", "1", "--sites", "IOP"]
    assert main(["phantom", str(root), *knobs]) == 0
    return root


@cache
def pelvis(site: str) -> Drawn:
    return pelvis_case(site, 1, 0)


@pytest.fixture(scope="module")
def pelves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Site UCL with one training and two test cases."""
    knobs = Phantoms("prostate", train=1)
    return write_phantoms(tmp_path_factory.mktemp("prostate"), knobs, ["UCL"])


def best_threshold(image: np.ndarray, mask: np.ndarray) -> float:
    """The best Dice of any 'brighter than' or 'darker than' with the mask."""
    order = np.argsort(image, axis=None)
    found = np.cumsum(mask.ravel()[order])
    taken = np.arange(1, mask.size + 1)
    below = 2 * found / (taken + found[-1])
    above = 2 * (found[-1] - found) / (mask.size - taken + found[-1])
    return float(max(below.max(), above.max()))


def test_heads_lie_as_in_ixi_tiny(heads: Path) -> None:
    lines = (heads / "metadata_tiny.csv").read_text().splitlines()
    assert lines[0] == "Patient ID,Manufacturer,Split"
    assert lines[-2:] == ["5,2,train", "6,2,test"]
    folders = sorted((heads / "IXI_sample").iterdir())
    assert [folder.name for folder in folders] == ["IXI005-IOP-0705", "IXI006-IOP-0706"]
    for folder in folders:
        name = folder.name
        image, mask = (
            open_scan(folder / part / f"{name}-{part}.nii.gz") for part in ("T1", "label")
        )
        # The file has IXI's own axes; read, the slices come first.
        assert nib.aff2axcodes(image.image.affine) == ("P", "S", "R")
        assert image.stored.shape == (112, 26, 112)
        assert image.shape == mask.shape == (26, 112, 112)
        assert set(np.unique(mask.stored)) == {0, 1}
    assert json.loads((heads / "PHANTOM.json").read_text())["kind"] == "ixi"


def test_pelves_lie_as_in_saml(pelves: Path) -> None:
    files = sorted(path.name for path in (pelves / "UCL").iterdir())
    numbers = ("00", "01", "32")  # the published test cases are 01, 32 and 34
    assert files == [f"Case{n}{end}.nii.gz" for n in numbers for end in ("", "_segmentation")]
    scan = open_scan(pelves / "UCL" / "Case32.nii.gz")
    assert nib.aff2axcodes(scan.image.affine) == ("L", "P", "S")
    assert scan.stored.shape == (112, 112, scan.shape[0])
    assert 20 <= scan.shape[0] <= 26
    cases = phantom_folder(Phantoms("prostate")).cases
    names = [path for case in cases for path in (case.image, case.label)]
    assert "BMC/Case08_Segmentation.nii.gz" in names
    assert "RUNMC/Case08_segmentation.nii.gz" in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("site", HEAD_SITES)
def test_a_brain_is_one_piece_of_a_brains_size_and_no_threshold_finds_it(site: str) -> None:
    image, mask, affine = head_case(site, 0, 0)
    millilitres = (mask > 0).sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
    assert 850 < millilitres < 1700
    pieces = np.bincount(components(mask)[0].ravel())[1:]
    assert pieces.max() > 0.97 * pieces.sum()
    assert not mask[[0, -1]].any()  # the vertex and the neck
    assert best_threshold(image, mask > 0) < 0.9


@pytest.mark.parametrize("site", PELVIS_SITES)
def test_a_prostate_is_one_piece_of_a_prostates_size_and_no_threshold_finds_it(site: str) -> None:
    image, mask, affine = pelvis(site)
    millilitres = (mask > 0).sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
    assert 12 < millilitres < 110
    pieces = np.bincount(components(mask)[0].ravel())[1:]
    assert pieces.max() > 0.9 * pieces.sum()
    assert not mask[[0, -1]].any()
    assert best_threshold(image, mask > 0) < 0.6
    zones = {0, 1, 2} if site in ("RUNMC", "BMC") else {0, 1}
    assert set(np.unique(mask)) == zones


def test_only_a_coil_makes_the_gland_much_brighter_than_the_hips() -> None:
    shares = {}
    for site in PELVIS_SITES:
        image, mask, _ = pelvis(site)
        shares[site] = np.median(image[mask > 0]) / np.median(image)
    coils = {site: share for site, share in shares.items() if site in ("BMC", "BIDMC")}
    assert min(coils.values()) > 2
    assert max(share for site, share in shares.items() if site not in coils) < 2


def test_the_same_seed_gives_the_same_bytes_and_more_cases_move_none(
    pelves: Path, tmp_path: Path
) -> None:
    again = write_phantoms(tmp_path, Phantoms("prostate", train=2), ["UCL"])
    assert len(list((again / "UCL").iterdir())) == 8
    for path in (pelves / "UCL").iterdir():
        assert (again / "UCL" / path.name).read_bytes() == path.read_bytes()
    other = pelvis_case("UCL", FIRST_TEST, 1)[1]
    same = pelvis_case("UCL", FIRST_TEST, 0)[1]
    assert other.shape != same.shape or (other != same).any()


def test_the_scanner_is_not_the_patient() -> None:
    """With scanners further apart the same heads are seen otherwise."""
    image, mask, _ = head_case("HH", 0, 0)
    far, same, _ = head_case("HH", 0, 0, difference=2.0)
    assert (mask == same).all()
    assert (image != far).mean() > 0.5


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"kind": "ixi", "sites": 4}, "sites is 4"),
        ({"kind": "ixi", "train": 167}, "train is 167"),
        ({"kind": "prostate", "sites": 4}, "sites is 4"),
        ({"kind": "prostate", "test": 4}, "UCL has at most"),
        ({"kind": "prostate", "train": 81}, "train is 81"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(knobs: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=named):
        write_phantoms(tmp_path / "out", Phantoms(**knobs))
    assert not (tmp_path / "out").exists()


def test_sites_and_counts_are_as_described() -> None:
    assert phantom_sites(Phantoms("ixi")) == ("Guys", "HH", "IOP")
    assert phantom_sites(Phantoms("prostate")) == ("RUNMC", "BMC", "I2CVB", "UCL", "BIDMC", "HK")
    lines = head_folder(Phantoms("ixi")).tables["metadata_tiny.csv"].decode().splitlines()
    counts = Counter(line.partition(",")[2] for line in lines[1:])
    assert counts == {
        **{"0,train": 5, "0,test": 3},
        **{"1,train": 4, "1,test": 2},
        **{"2,train": 3, "2,test": 2},
    }


def test_sites_are_read_in_their_layouts(heads: Path, pelves: Path) -> None:
    """Those that are there, though the table lists more."""
    head, pelvis_cases = read_cases(heads, "IOP", 0.0, 0), read_cases(pelves, "UCL", 0.0, 0)
    assert [case.name for case in head.train] == ["IXI005-IOP-0705"]
    assert [case.name for case in head.test] == ["IXI006-IOP-0706"]
    assert [case.name for case in pelvis_cases.test] == ["UCL-Case01", "UCL-Case32"]
    drawn, label, _ = head_case("IOP", 0, 0)
    volume = load_volume(head.train[0], 1)
    assert (volume.image == drawn).all()
    assert (volume.label == label).all()
    for root, site in ((heads, "IOP"), (pelves, "UCL")):
        assert site_names(root) == [site]


def test_zones_are_one_prostate_to_a_federation(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path, Phantoms("prostate", train=1, test=1), ["BMC"])
    cases = read_cases(root, "BMC", 0.0, 0)
    label = pelvis_case("BMC", 0, 0)[1]
    assert label.max() == 2
    assert (load_volume(cases.train[0], 1).label == (label > 0)).all()
