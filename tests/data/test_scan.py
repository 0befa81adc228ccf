"""Slabs of a file are its values in order; damage is found; a mask keeps the scan's header."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.prepared import prepare_images
from flap_nvflare.data.scan import Scan, check_values, mask_image, open_scan
from flap_nvflare.data.window import KITS_WINDOWS

AFFINE = np.array([[-0.8, 0, 0, 10], [0, 0, -0.7, 20], [0, -2.5, 0, 30], [0, 0, 0, 1.0]])


def write(path: Path, voxels: np.ndarray, slope: float | None = None) -> Path:
    image = nib.Nifti1Image(voxels, AFFINE)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    if slope:  # as a scanner's converter writes it; nibabel itself always makes its own
        data = bytearray(gzip.decompress(path.read_bytes()))
        data[112:120] = np.array([slope, -7.25], "<f4").tobytes()
        path.write_bytes(gzip.compress(bytes(data)))
    return path


def noise(shape: tuple[int, ...] = (6, 9, 5)) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_slabs_together_are_the_whole(tmp_path: Path, name: str) -> None:
    scan = open_scan(write(tmp_path / name, noise()))
    assert scan.shape == (9, 5, 6)
    assert scan.spacing == pytest.approx((2.5, 0.7, 0.8))
    parts = [scan.slab(k, min(k + 4, 9)) for k in range(0, 9, 4)]
    assert np.array_equal(np.concatenate(parts), scan.whole())
    assert np.array_equal(scan.whole(), noise().transpose(1, 2, 0).astype(np.float32))
    assert isinstance(scan.stored, np.memmap) == (name == "a.nii")
    assert scan.stored.dtype == np.int16


def test_values_are_those_that_nibabel_gives(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", noise(), slope=0.123)
    scan = open_scan(path)
    expected = nib.load(path).get_fdata(dtype=np.float32).transpose(1, 2, 0)
    assert np.array_equal(scan.whole(), expected)
    assert np.array_equal(scan.slab(2, 3), expected[2:3])


def test_slices_are_prepared_alike_in_a_slab_and_in_the_whole(tmp_path: Path) -> None:
    scan = open_scan(write(tmp_path / "a.nii", noise((60, 7, 50))))
    whole = prepare_images(scan.whole(), KITS_WINDOWS["A"], 32)
    for first, last in ((0, 1), (1, 4), (4, 7)):
        slab = prepare_images(scan.slab(first, last), KITS_WINDOWS["A"], 32)
        assert slab.equal(whole[first:last])


def test_a_damaged_byte_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", noise((30, 30, 30)))
    whole = path.read_bytes()
    for place in range(2000, len(whole) - 9, len(whole) // 20):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.nii\.gz: damaged"):
            open_scan(path)
    path.write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"a\.nii\.gz: damaged"):
        open_scan(path)


def test_voxels_that_are_no_numbers(tmp_path: Path) -> None:
    colour = np.zeros((2, 2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for voxels in (colour, np.zeros((2, 2, 2), np.complex64)):
        with pytest.raises(DataError, match="expected one number a voxel"):
            open_scan(write(tmp_path / "a.nii.gz", voxels))


def test_values_are_checked_over_all_slabs() -> None:
    path, zeros, ones = Path("a.nii"), np.zeros((2, 3)), np.ones((2, 3))
    check_values(path, [zeros, ones])
    with pytest.raises(DataError, match=r"a\.nii: empty, every voxel is 1"):
        check_values(path, [ones, ones])
    bad = np.array([[np.nan, np.inf, -np.inf]])
    with pytest.raises(DataError, match=r"a\.nii: 4 voxels are NaN or infinite"):
        check_values(path, [ones, bad, np.array([np.nan, 1.0])])


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 1), (2, 0), (0, 3)])
def test_a_mask_keeps_the_geometry_and_nothing_else(
    tmp_path: Path, kind: type, codes: tuple[int, int]
) -> None:
    image = kind(noise(), AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(AFFINE, codes[0])
    image.set_qform(AFFINE, codes[1])
    for name in {"descrip", "aux_file", "intent_name", "db_name", "data_type"} & set(image.header):
        image.header[name] = b"Jane Doe"
    image.header["intent_code"] = 1002
    image.header["cal_max"] = 400
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nib.save(image, tmp_path / "scan.nii")
    scan = open_scan(tmp_path / "scan.nii")
    mask = (scan.whole() > 500).astype(np.uint8)
    nib.save(mask_image(mask, scan), tmp_path / "mask.nii")

    found = nib.load(tmp_path / "mask.nii")
    assert type(found) is kind
    assert (int(found.header["sform_code"]), int(found.header["qform_code"])) == codes
    assert found.header.get_xyzt_units() == ("mm", "sec")
    assert np.allclose(found.affine, scan.image.affine)
    assert found.header.get_zooms() == scan.image.header.get_zooms()
    assert found.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(found.dataobj), noise() > 500)
    assert b"Jane" not in (tmp_path / "mask.nii").read_bytes()
    assert float(found.header["cal_max"]) == 0
    assert int(found.header["intent_code"]) == 0
    with pytest.raises(DataError, match="give the mask of this case"):
        mask_image(mask[1:], scan)


def test_the_volume_of_a_voxel_is_that_of_the_sheared_grid(tmp_path: Path) -> None:
    scan = open_scan(write(tmp_path / "a.nii", noise()))
    assert scan.voxel_ml == pytest.approx(0.8 * 0.7 * 2.5 / 1000)
    sheared = AFFINE.copy()
    sheared[1, 0] = 0.4
    image = nib.Nifti1Image(noise(), sheared)
    assert Scan(scan.path, image, noise()).voxel_ml == pytest.approx(0.8 * 0.7 * 2.5 / 1000)
