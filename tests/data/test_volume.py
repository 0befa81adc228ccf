"""Reading one case: orientation, checks and the way back to the file's grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kits_files import KITS_AFFINE, write_case
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from flap_nvflare.data.kits import DataError
from flap_nvflare.data.scan import mask_image, open_scan
from flap_nvflare.data.volume import load_volume, orientation

SHAPE = (2, 3, 4)


def scan() -> tuple[np.ndarray, np.ndarray]:
    """Every voxel another value; one kidney voxel and one tumour voxel."""
    image = np.arange(24, dtype=np.int16).reshape(SHAPE)
    label = np.zeros(SHAPE, np.uint8)
    label[1, 0, 2], label[0, 2, 3] = 1, 2
    return image, label


def test_a_kits_file_is_taken_as_it_is(tmp_path: Path) -> None:
    image, label = scan()
    volume = load_volume(write_case(tmp_path / "case_00007", image, label), 2)
    assert volume.name == "case_00007"
    assert volume.image.dtype == np.float32
    assert volume.label.dtype == np.uint8
    assert volume.image.tolist() == image.tolist()
    assert volume.label.tolist() == label.tolist()
    assert tuple(volume.spacing) == (5.0, 2.0, 2.0)


def test_the_axes_of_a_file(tmp_path: Path) -> None:
    image, label = scan()
    assert orientation(write_case(tmp_path / "kits", image, label)) == "IPL"
    assert orientation(write_case(tmp_path / "ras", image, label, np.eye(4))) == "RAS"


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations([0, 1, 2]), flips=st.tuples(*[st.sampled_from([-1, 1])] * 3))
def test_the_affine_decides_not_the_order_of_the_file(
    tmp_path: Path, order: list[int], flips: tuple[int, int, int]
) -> None:
    """The same body stored in any of the 48 ways is the same volume, and masks go back."""
    image, label = scan()
    affine = np.diag([-5.0, -2.0, -1.5, 1.0])[[2, 1, 0, 3]]
    turn = np.array(list(zip(order, flips, strict=True)))
    stored, masked = apply_orientation(image, turn), apply_orientation(label, turn)
    case = write_case(tmp_path / "case", stored, masked, affine @ inv_ornt_aff(turn, SHAPE))
    volume = load_volume(case, 2)
    assert volume.image.tolist() == image.tolist()
    assert volume.label.tolist() == label.tolist()
    assert np.allclose(volume.spacing, (5.0, 2.0, 1.5))
    nib.save(mask_image(volume.label, open_scan(case.image)), tmp_path / "mask.nii.gz")
    back = nib.load(tmp_path / "mask.nii.gz")
    assert np.asarray(back.dataobj).tolist() == masked.tolist()
    assert np.allclose(back.affine, nib.load(case.image).affine)
    assert back.get_data_dtype() == np.uint8


def test_a_tilted_scan_goes_to_the_nearest_axes(tmp_path: Path) -> None:
    image, label = scan()
    c, s = np.cos(0.3), np.sin(0.3)
    tilt = np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]])
    volume = load_volume(write_case(tmp_path / "case", image, label, tilt @ KITS_AFFINE), 2)
    assert volume.image.tolist() == image.tolist()
    assert np.allclose(volume.spacing, (5, 2, 2))


def test_masks_and_slopes_of_other_tools_are_read(tmp_path: Path) -> None:
    """A mask may be stored as floats, an image with slope and intercept."""
    image, label = scan()
    case = write_case(tmp_path / "case", image, label.astype(np.float64))
    scaled = nib.Nifti1Image(image, KITS_AFFINE)
    scaled.header.set_slope_inter(2, -1024)
    nib.save(scaled, case.image)
    raw = nib.load(case.image)
    volume = load_volume(case, 2)
    assert volume.label.tolist() == label.tolist()
    assert np.allclose(volume.image, raw.get_fdata())


def broken(tmp_path: Path, **changes: np.ndarray) -> str:
    """What the reader says to a case with these changes."""
    image, label = scan()
    parts = {"image": image, "label": label, **changes}
    with pytest.raises(DataError) as caught:
        load_volume(write_case(tmp_path / "case_00003", **parts), 2)
    return str(caught.value)


def test_unknown_labels_are_listed(tmp_path: Path) -> None:
    label = scan()[1].astype(np.int16)
    label[0, 0, :2] = 3, 300
    said = broken(tmp_path, label=label)
    assert "segmentation.nii.gz" in said
    assert "3, 300" in said


@pytest.mark.parametrize("value", [0.5, -1.0, np.nan])
def test_a_mask_must_hold_whole_classes(tmp_path: Path, value: float) -> None:
    label = scan()[1].astype(np.float32)
    label[0, 0, 0] = value
    assert "segmentation.nii.gz" in broken(tmp_path, label=label)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(tmp_path: Path, value: float) -> None:
    image = scan()[0].astype(np.float32)
    image[1, 1, 1] = value
    said = broken(tmp_path, image=image)
    assert "imaging.nii.gz" in said
    assert "1 voxel" in said


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    image, label = scan()
    assert "segmentation.nii.gz" in broken(tmp_path, label=label[:1])
    assert "(2, 3, 4, 5)" in broken(tmp_path, image=np.zeros((2, 3, 4, 5), np.int16))
    assert "imaging.nii.gz" in broken(tmp_path, image=image[0])
    assert "empty" in broken(tmp_path, image=np.zeros(SHAPE, np.int16))


def test_a_shifted_or_scaled_mask_is_refused(tmp_path: Path) -> None:
    for place, change in (((0, 3), 3.0), ((2, 0), -1.0), ((1, 1), 0.2)):
        affine = KITS_AFFINE.copy()
        affine[place] += change
        said = broken(tmp_path, label_affine=affine)
        assert "segmentation.nii.gz" in said
        assert "affine" in said


def test_a_mask_whose_affine_is_rounded_is_accepted(tmp_path: Path) -> None:
    affine = KITS_AFFINE.copy()
    affine[0, 3] += 1e-4
    load_volume(write_case(tmp_path / "case", *scan(), label_affine=affine), 2)


def test_a_scan_without_geometry_is_refused(tmp_path: Path) -> None:
    case = write_case(tmp_path / "case", *scan())
    plain = nib.Nifti1Image(scan()[0], None)
    plain.set_sform(None, 0)
    plain.set_qform(None, 0)
    nib.save(plain, case.image)
    with pytest.raises(DataError, match=r"imaging\.nii\.gz.*spacing"):
        load_volume(case, 2)


@pytest.mark.parametrize("file", ["image", "label"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "gone"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, damage: str) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(-1000, 1000, (8, 32, 32)).astype(np.int16)
    case = write_case(tmp_path / "case", image, rng.integers(0, 3, image.shape).astype(np.uint8))
    path: Path = getattr(case, file)
    whole = path.read_bytes()
    contents = {"cut": whole[: len(whole) // 2], "text": b"no scan", "empty": b""}
    path.unlink()
    if damage in contents:
        path.write_bytes(contents[damage])
    with pytest.raises(DataError, match=path.name):
        load_volume(case, 2)


def test_the_turn_is_its_own_proof(tmp_path: Path) -> None:
    """The first axis of a volume runs to the feet, the second back, the third to the left."""
    image, label = scan()
    case = write_case(tmp_path / "case", image, label, np.eye(4))
    volume = load_volume(case, 2)
    turn = ornt_transform(io_orientation(np.eye(4)), np.array([[2, -1], [1, -1], [0, -1]]))
    assert volume.image.shape == (4, 3, 2)
    assert volume.image.tolist() == apply_orientation(image, turn).tolist()
    assert volume.image[0, 0, 0] == image[-1, -1, -1]


def test_a_binary_case_has_one_class(tmp_path: Path) -> None:
    """Whatever a mask tells apart is class 1; what is no label at all is still refused."""
    image, label = scan()
    label[0, 0, 0] = 200
    case = replace(write_case(tmp_path / "case", image, label), binary=True)
    assert load_volume(case, 1).label.tolist() == (label > 0).tolist()
    for value in (0.5, -1.0, np.nan, np.inf):
        broken = label.astype(np.float32)
        broken[0, 0, 0] = value
        case = replace(write_case(tmp_path / "case", image, broken), binary=True)
        with pytest.raises(DataError, match="unknown labels"):
            load_volume(case, 1)
