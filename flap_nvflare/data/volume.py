"""One case from its files: HU and mask with the slices first, the right way round.

The array of a scan says nothing about its directions; the affine does. KiTS19 stores slices x
height x width, most other sets width x height x slices. Whatever the file holds, a `Volume` runs
from head to feet, from front to back and from the patient's right to the left (codes I, P, L),
which is the order of KiTS19 and the usual way to look at a slice.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.kits import Case

# Head to feet, front to back, right to left, in nibabel's numbering of the RAS axes.
_ORIENTATION = np.array([[2, -1], [1, -1], [0, -1]])
# Two grids are one if no corner lies further apart than this share of the smallest voxel side.
_GRID_TOLERANCE = 0.1
_BROKEN = (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError, ValueError, TypeError)


@dataclass(frozen=True, eq=False)
class Volume:
    """One scan in memory; S slices from head to feet, H rows, W columns.

    Attributes:
        name: name of the case.
        image: (S, H, W) float32, HU.
        label: (S, H, W) uint8, 0 is background.
        spacing: mm between neighbouring voxels along (S, H, W).
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, float, float]


def load_volume(case: Case, class_count: int) -> Volume:
    """Reads and checks scan and mask.

    Args:
        case: the files.
        class_count: number of foreground classes C; labels run from 0 to C.

    Raises:
        DataError: if a file is missing, damaged, not 3D, empty, without spacing or direction,
            if the two grids differ, if a scan holds NaN or infinity, or a mask other labels.
    """
    scan, mask = _open(case.image), _open(case.label)
    _check_same_grid(case, scan, mask)
    image = _read(case.image, scan)
    finite = np.isfinite(image)
    if not finite.all():
        raise DataError(
            f"{case.image}: {int((~finite).sum())} voxels are NaN or infinite; "
            f"write the scan again with finite HU"
        )
    if image.min() == image.max():
        raise DataError(
            f"{case.image}: empty, every voxel is {image.flat[0]:g}; export the scan again"
        )
    label = _labels(case.label, _read(case.label, mask), class_count)
    turn = ornt_transform(io_orientation(scan.affine), _ORIENTATION)
    spacing = np.empty(3)
    spacing[turn[:, 0].astype(int)] = np.linalg.norm(scan.affine[:3, :3], axis=0)
    return Volume(
        name=case.name,
        image=np.ascontiguousarray(apply_orientation(image, turn)),
        label=np.ascontiguousarray(apply_orientation(label, turn)),
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
    )


def orientation(case: Case) -> str:
    """Where the axes of the scan's file run to, such as `IPL`: the header alone is read.

    Raises:
        DataError: as `load_volume` does about the header.
    """
    return "".join(nib.aff2axcodes(_open(case.image).affine))


def write_mask(path: Path | str, mask: np.ndarray, case: Case) -> Path:
    """Writes a mask in `Volume` order as NIfTI on the grid of the case's scan.

    Args:
        path: file to write, `.nii` or `.nii.gz`.
        mask: (S, H, W) class indices.
        case: the case whose scan gives order of axes and affine.

    Raises:
        DataError: if the scan cannot be read or has another shape.
    """
    scan = _open(case.image)
    own = io_orientation(scan.affine)
    back = ornt_transform(_ORIENTATION, own)
    turned = apply_orientation(np.asarray(mask, dtype=np.uint8), back)
    if turned.shape != scan.shape:
        raise DataError(
            f"{case.image}: has shape {scan.shape}, the mask {turned.shape} in the same order of "
            f"axes; give the mask of this case"
        )
    image = nib.Nifti1Image(turned, scan.affine, scan.header)
    image.set_data_dtype(np.uint8)
    image.header.set_slope_inter(1, 0)
    nib.save(image, path)
    return Path(path)


def _open(path: Path) -> Any:
    """The NIfTI image behind a path with its header checked, its voxels not yet read."""
    try:
        image = nib.load(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except _BROKEN as error:
        raise DataError(f"{path}: damaged or not NIfTI ({error}); copy the file again") from error
    if len(image.shape) != 3:
        raise DataError(
            f"{path}: has {len(image.shape)} dimensions {image.shape}; expected one 3D volume"
        )
    if 0 in image.shape:
        raise DataError(f"{path}: empty, its shape is {image.shape}; export the file again")
    _check_affine(path, image)
    return image


def _check_affine(path: Path, image: Any) -> None:
    """Refuses a header that does not say how far apart the voxels lie and in which direction."""
    header, affine = image.header, image.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    unset = "sform_code" in header and not (header["sform_code"] or header["qform_code"])
    if unset or not np.isfinite(affine).all() or not (spacing > 0).all():
        raise DataError(
            f"{path}: no usable spacing and direction (affine {affine.tolist()}, sform and qform "
            f"{'unset' if unset else 'set'}); convert the scan again with its geometry"
        )
    if np.isnan(io_orientation(affine)).any():
        raise DataError(f"{path}: its affine {affine.tolist()} is flat; convert the scan again")


def _check_same_grid(case: Case, scan: Any, mask: Any) -> None:
    if scan.shape != mask.shape:
        raise DataError(
            f"{case.label}: shape {mask.shape} differs from {scan.shape} of {case.image}; "
            f"take the mask of this scan"
        )
    last = np.array(scan.shape) - 1
    corners = np.array([[*(last * np.array(bits)), 1] for bits in np.ndindex(2, 2, 2)])
    apart = np.linalg.norm((corners @ (scan.affine - mask.affine).T)[:, :3], axis=1).max()
    smallest = np.linalg.norm(scan.affine[:3, :3], axis=0).min()
    if apart > _GRID_TOLERANCE * smallest:
        raise DataError(
            f"{case.label}: its affine differs from that of {case.image}, corners lie "
            f"{apart:.3g} mm apart; resample the mask onto the scan's grid"
        )


def _read(path: Path, image: Any) -> np.ndarray:
    try:
        return np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    except _BROKEN as error:
        raise DataError(f"{path}: damaged ({error}); copy the file again") from error


def _labels(path: Path, values: np.ndarray, class_count: int) -> np.ndarray:
    """Masks as (…) uint8 with nothing but 0 to `class_count`."""
    labels = np.clip(np.nan_to_num(values, nan=-1.0), -1, 255).astype(np.uint8)
    wrong = (labels != values) | (labels > class_count)
    if wrong.any():
        found = np.unique(values[wrong])
        shown = ", ".join(f"{value:g}" for value in found[:8])
        raise DataError(
            f"{path}: unknown labels {shown}{' …' if len(found) > 8 else ''}; expected whole "
            f"numbers from 0 to {class_count}"
        )
    return labels
