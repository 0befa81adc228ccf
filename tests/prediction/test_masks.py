"""A mask is whole or not there, and knows what it was made from."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.scan import Scan, open_scan
from flap_nvflare.data.window import Window
from flap_nvflare.prediction import masks
from flap_nvflare.prediction.masks import is_done, read_mask, stamp_of, write_mask

WINDOW = Window(-100, 200, 50, 60)
STAMP = stamp_of("a", "b", WINDOW, "c")


@pytest.fixture
def scan(tmp_path: Path) -> Scan:
    voxels = np.arange(40 * 3 * 4, dtype=np.int16).reshape(3, 4, 40)
    nib.save(nib.Nifti1Image(voxels, np.diag([-1, -1, 2, 1])), tmp_path / "scan.nii.gz")
    return open_scan(tmp_path / "scan.nii.gz")


def test_the_stamp_changes_with_everything() -> None:
    others = {
        stamp_of("x", "b", WINDOW, "c"),
        stamp_of("a", "x", WINDOW, "c"),
        stamp_of("a", "b", Window(-100, 200, 50, 61), "c"),
        stamp_of("a", "b", WINDOW, "x"),
    }
    assert len(others | {STAMP}) == 5


def test_a_mask_is_read_as_it_was_written(tmp_path: Path, scan: Scan) -> None:
    mask = np.random.default_rng(0).integers(0, 3, scan.shape, dtype=np.uint8)
    path = tmp_path / "new" / "folder" / "a_mask.nii.gz"
    write_mask(path, mask, scan, STAMP)
    assert np.array_equal(read_mask(path), mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["a_mask.nii.gz"]


def test_what_is_done_and_what_is_another(tmp_path: Path, scan: Scan) -> None:
    path = tmp_path / "a_mask.nii.gz"
    assert not is_done(path, STAMP)
    write_mask(path, np.zeros(scan.shape, np.uint8), scan, STAMP)
    assert is_done(path, STAMP)
    for wrong in (stamp_of("x", "b", WINDOW, "c"), ""):
        with pytest.raises(DataError, match=r"a_mask\.nii\.gz: is no mask of this scan"):
            is_done(path, wrong)
    with pytest.raises(DataError, match="--overwrite"):
        is_done(scan.path, STAMP)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(DataError, match="--overwrite"):
        is_done(path, STAMP)


def test_a_full_disk_leaves_the_old_mask(
    tmp_path: Path, scan: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a_mask.nii.gz"
    write_mask(path, np.zeros(scan.shape, np.uint8), scan, STAMP)
    before, files = path.read_bytes(), sorted(tmp_path.iterdir())

    def full(image: object, file: Path) -> None:
        file.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(masks.nib, "save", full)
    with pytest.raises(DataError, match=r"a_mask.nii.gz: cannot be written \(No space left"):
        write_mask(path, np.ones(scan.shape, np.uint8), scan, STAMP)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == files
