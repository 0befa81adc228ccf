"""Series that pydicom has written: order, geometry, values, and what is refused."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import change, write_series
from pydicom.uid import JPEGLSLossless, RLELossless

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.scan import mask_image
from flap_nvflare.prediction.dicom import is_dicom, open_series

SHAPE = (5, 4, 3)  # slices from feet to head, rows, columns


def voxels(dtype: type = np.int16) -> np.ndarray:
    return np.arange(60).reshape(SHAPE).astype(dtype)


def opened(folder: Path, series: str = ""):  # type: ignore[no-untyped-def]
    return open_series(sorted(folder.iterdir()), series)


def test_slices_are_in_order_of_their_places_and_rescaled(tmp_path: Path) -> None:
    write_series(tmp_path, voxels(), slope=2.0, intercept=-1000.0)
    scan = opened(tmp_path)
    # From head to feet; an axial slice's rows run to the back and its columns to the left already.
    assert scan.whole().tolist() == (2.0 * voxels()[::-1] - 1000).tolist()
    assert scan.spacing == pytest.approx((3.0, 0.7, 0.8))
    assert scan.stored.dtype == np.int16
    assert scan.voxel_ml == pytest.approx(3.0 * 0.7 * 0.8 / 1000)


def test_each_voxel_of_a_mask_lies_where_its_pixel_lies(tmp_path: Path) -> None:
    paths = write_series(tmp_path, voxels())
    scan = opened(tmp_path)
    mask = np.zeros(scan.shape, np.uint8)
    mask[1, 2, 0] = 1  # second from the head, third row, first column
    image = mask_image(mask, scan)
    place = nib.affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj))[0])
    header = pydicom.dcmread(paths[-2])
    x, y, z = (float(mm) for mm in header.ImagePositionPatient)
    assert place == pytest.approx([-x, -(y + 2 * 0.7), z])
    assert image.header.get_xyzt_units()[0] == "mm"
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1


@pytest.mark.parametrize(
    ("cosines", "codes"),
    [
        (((0.0, 1.0, 0.0), (0.0, 0.0, -1.0)), "PI"),  # sagittal
        (((1.0, 0.0, 0.0), (0.0, 0.0, -1.0)), "LI"),  # coronal
        (((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0)), "RA"),  # prone: turned by half
    ],
)
def test_other_orientations(tmp_path: Path, cosines: tuple, codes: str) -> None:
    write_series(tmp_path, voxels(), cosines=cosines)
    image = opened(tmp_path).image
    assert "".join(nib.aff2axcodes(image.affine)[:2]) == codes
    row, column = (np.array(cosine) for cosine in cosines)
    across = np.diag([-1, -1, 1]) @ np.column_stack([row * 0.8, column * 0.7])
    assert np.allclose(image.affine[:3, :2], across)


def test_a_tilted_gantry_shears_the_grid(tmp_path: Path) -> None:
    write_series(tmp_path, voxels(), step=np.array([0.0, 0.5, 3.0]))
    scan = opened(tmp_path)
    assert np.allclose(scan.image.affine[:3, 2], [0, -0.5, 3.0])
    assert int(scan.image.header["qform_code"]) == 0
    assert scan.voxel_ml == pytest.approx(3.0 * 0.7 * 0.8 / 1000)


def test_slices_with_rescales_of_their_own(tmp_path: Path) -> None:
    paths = write_series(tmp_path, voxels(np.uint16), slope=1.0, intercept=0.0)
    change(paths[0], RescaleSlope=3.0)
    scan = opened(tmp_path)
    expected = voxels().astype(float)
    expected[0] *= 3
    assert scan.whole().tolist() == expected[::-1].tolist()


def test_one_of_several_series(tmp_path: Path) -> None:
    first = write_series(tmp_path / "a", voxels(), uid="1.2.3")
    second = write_series(tmp_path / "b", voxels() + 100, uid="1.2.4")
    with pytest.raises(DataError, match=r"2 series \['1.2.3', '1.2.4'\]; name one by --series"):
        open_series([*first, *second])
    found = open_series([*first, *second], "1.2.4")
    assert found.whole().min() == 100 - 1024
    with pytest.raises(DataError, match="no series 9"):
        open_series(first, "9")


def test_missing_doubled_and_uneven_slices(tmp_path: Path) -> None:
    paths = write_series(tmp_path, voxels())
    paths[2].unlink()
    with pytest.raises(DataError, match=r"IM0004 and IM0002 lie 6 mm apart, others 3 mm"):
        opened(tmp_path)
    paths = write_series(tmp_path, voxels())
    change(paths[2], ImagePositionPatient=[-10.0, -20.0, 33.0])
    with pytest.raises(DataError, match="lie at one place"):
        opened(tmp_path)
    change(paths[2], ImagePositionPatient=[-10.0, -20.0, 36.5])
    with pytest.raises(DataError, match=r"lie 3.5 mm apart"):
        opened(tmp_path)


def test_slices_of_unlike_grids(tmp_path: Path) -> None:
    paths = write_series(tmp_path, voxels())
    change(paths[1], PixelSpacing=[0.7, 0.9])
    with pytest.raises(DataError, match=r"IM0004: size, spacing or orientation differ"):
        opened(tmp_path)


def test_a_single_slice_needs_its_thickness(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, voxels()[:1])
    with pytest.raises(DataError, match="unknown thickness"):
        opened(tmp_path)
    change(path, SliceThickness=2.5)
    assert opened(tmp_path).spacing[0] == pytest.approx(2.5)


def test_compressed_pixels(tmp_path: Path) -> None:
    paths = write_series(tmp_path, voxels())
    for path in paths:
        header = pydicom.dcmread(path)
        header.compress(RLELossless)
        header.save_as(path)
    assert opened(tmp_path).whole().tolist() == (voxels()[::-1] - 1024.0).tolist()
    for path in paths:
        header = pydicom.dcmread(path)
        header.file_meta.TransferSyntaxUID = JPEGLSLossless
        header.save_as(path)
    if not pydicom.pixels.get_decoder(JPEGLSLossless).is_available:
        with pytest.raises(DataError, match=r"compressed as JPEG-LS.*install .*pylibjpeg"):
            opened(tmp_path)


def test_what_is_no_slice_is_named(tmp_path: Path) -> None:
    paths = write_series(tmp_path, voxels())
    paths[0].write_bytes(paths[0].read_bytes()[:-10])
    with pytest.raises(DataError, match="IM0005: its pixels are damaged"):
        opened(tmp_path)
    header = pydicom.dcmread(paths[1])
    del header.ImagePositionPatient
    header.save_as(paths[1])
    with pytest.raises(DataError, match=r"IM0004: no slice of a scan \(no ImagePositionPatient\)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        (0.8, r"no slice of a scan \(no PixelSpacing\)"),
        ([0, 0.8], r"PixelSpacing .* is not above 0 mm"),
        ([-0.8, 0.8], r"PixelSpacing .* is not above 0 mm"),
    ],
)
def test_a_spacing_that_is_none_is_named(tmp_path: Path, spacing: object, message: str) -> None:
    paths = write_series(tmp_path, voxels())
    change(paths[3], PixelSpacing=spacing)
    with pytest.raises(DataError, match=f"IM0002: {message}"):
        opened(tmp_path)


def test_a_report_in_the_folder_matters_only_if_it_is_asked_for(tmp_path: Path) -> None:
    paths = write_series(tmp_path, voxels())
    (picture,) = write_series(tmp_path / "report", voxels()[:1], uid="1.9", SamplesPerPixel=3)
    found = open_series([*paths, picture], "1.2.3")
    assert found.shape == SHAPE
    with pytest.raises(DataError, match=r"no slice of a scan \(colour\)"):
        open_series([*paths, picture], "1.9")


def test_slices_of_unlike_types_and_without_rescale(tmp_path: Path) -> None:
    paths = write_series(tmp_path, voxels())
    for path in paths:
        change(path, RescaleSlope=None, RescaleIntercept=None)
    assert opened(tmp_path).whole().tolist() == voxels()[::-1].tolist()
    change(paths[2], PixelRepresentation=0)
    with pytest.raises(DataError, match=r"IM0003: pixels of type uint16 among int16"):
        opened(tmp_path)


def test_what_is_dicom(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, voxels()[:1])
    (tmp_path / "notes.txt").write_text("no")
    assert is_dicom(path)
    assert not is_dicom(tmp_path / "notes.txt")
    assert not is_dicom(tmp_path)
