"""No table and no link makes a site read a file outside its data."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from kits_files import HEADER, KITS_AFFINE, site_lines, write_table
from paths import TRAVERSALS
from watched import watched

from flap_nvflare.data.kits import DataError, read_kits
from flap_nvflare.data.volume import load_volume


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A site's data, and beside it a case that is none of its own."""
    write_table(tmp_path / "data", site_lines(0, 1, 1))
    for folder in ("data/case_00000", "data/case_00001", "secret"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("imaging", "segmentation"):
            values = np.arange(8, dtype=np.int16).reshape(2, 2, 2) % (2 if name[0] == "s" else 9)
            image = nibabel.Nifti1Image(values, KITS_AFFINE)
            nibabel.save(image, tmp_path / folder / f"{name}.nii.gz")
    return tmp_path / "data"


def read(root: Path) -> None:
    """Reads all that the table names; what is refused is not looked at."""
    cases = read_kits(root, "A", 0.0, 0)
    for case in (*cases.train, *cases.test):
        load_volume(case, 2)


def opened_outside(root: Path, act: Callable[[Path], None]) -> list[Path]:
    with watched() as seen:
        act(root)
    return [
        path
        for path in map(Path.resolve, seen.read)
        if path.suffix in (".gz", ".csv", ".nii") and not path.is_relative_to(root.resolve())
    ]


def test_what_is_watched_is_seen(root: Path) -> None:
    with watched() as seen:
        read(root)
    assert sum(path.suffix == ".gz" for path in seen.read) >= 4
    assert root.parent / "secret" / "x.gz" not in seen.read
    assert opened_outside(root / "case_00000", lambda _: read(root))


@pytest.mark.parametrize("name", TRAVERSALS, ids=range(len(TRAVERSALS)))
def test_no_name_of_a_case_leads_out(root: Path, name: str) -> None:
    with (root / "thresholded_sites.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER.split(","))
        writer.writerow([name, "0", "train", "train_0"])
        writer.writerow(["case_00001", "0", "test", "test_0"])

    def refused(folder: Path) -> None:
        with pytest.raises(DataError):
            read(folder)

    assert not opened_outside(root, refused)


@pytest.mark.parametrize("what", ["imaging.nii.gz", "segmentation.nii.gz", "folder", "table"])
@pytest.mark.parametrize("relative", [True, False])
def test_no_link_leads_out(root: Path, what: str, relative: bool) -> None:
    secret = root.parent / "secret"
    if what == "folder":
        link, target = root / "case_00000", secret
        link.rename(root.parent / "moved")
    elif what == "table":
        link, target = root / "thresholded_sites.csv", secret / "thresholded_sites.csv"
        link.rename(target)
    else:
        link, target = root / "case_00000" / what, secret / what
        link.unlink()
    up = "../" * (len(link.relative_to(root).parts))
    link.symlink_to(up + str(target.relative_to(root.parent)) if relative else target)
    assert link.exists()

    def refused(folder: Path) -> None:
        with pytest.raises(DataError, match=r"is a link out of .*; put the file itself there"):
            read(folder)

    assert not opened_outside(root, refused)


def test_a_folder_that_is_a_link_and_links_within_it_are_read(root: Path) -> None:
    image = root / "case_00000" / "imaging.nii.gz"
    image.rename(root / "scan_0.nii.gz")
    image.symlink_to("../scan_0.nii.gz")
    (root.parent / "mounted").symlink_to(root)
    read(root.parent / "mounted")


def test_a_link_to_itself_is_missing(root: Path) -> None:
    image = root / "case_00000" / "imaging.nii.gz"
    image.unlink()
    image.symlink_to(image)
    with pytest.raises(DataError, match="missing"):
        read(root)
