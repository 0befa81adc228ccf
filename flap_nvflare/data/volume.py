"""One case read into memory: axial slices first, always in the same orientation.

KiTS19 files are slices x height x width with an affine whose first axis runs along the body;
files from other tools put the slices last. The affine decides, never the shape.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flap_nvflare.data.kits import Case, DataError

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

# Slices rise from inferior to superior, rows run to posterior, columns to the patient's left:
# the usual view of a CT, from the feet.
AXES = ("S", "P", "L")
# Relative to a voxel's size: masks saved by other tools round the affine a little.
AFFINE_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan and its mask in memory; two volumes are equal only if they are the same object.

    Attributes:
        name: the case's name.
        image: (S, H, W) float32 in Hounsfield units, axes as in `AXES`.
        label: (S, H, W) uint8, 0 background, then the classes in order.
        spacing: (3,) float64, mm between neighbours along each of those axes.
    """

    name: str
    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    spacing: NDArray[np.float64]


def load_volume(case: Case, class_count: int = 2) -> Volume:
    """Reads, checks and orients a case.

    Args:
        case: where the files lie.
        class_count: number of foreground classes; labels run from 0 to it.

    Raises:
        DataError: naming the file, if it cannot be read, is not 3D, is empty, has no place in
            the body or no spacing, holds NaN or infinity or an unknown label, or if image and
            mask do not lie on the same grid.
    """
    image, label = _open(case.image), _open(case.label)
    _require_same_grid(case, image, label)
    intensities = _voxels(case.image, image)
    if intensities.dtype.kind == "f" and not np.isfinite(intensities).all():
        count = int((~np.isfinite(intensities)).sum())
        raise DataError(
            f"{case.image}: {count} voxels are NaN or infinite; replace them by air (-1000)"
        )
    classes = _classes(case.label, _voxels(case.label, label), class_count)
    return Volume(
        name=case.name,
        image=np.ascontiguousarray(_to_axes(intensities, image.affine), dtype=np.float32),
        label=np.ascontiguousarray(_to_axes(classes, image.affine)),
        spacing=_spacing(image.affine),
    )


def native_mask(mask: NDArray[np.uint8], affine: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A mask in `AXES` order turned back to the axes of the file whose affine is given.

    Args:
        mask: (S, H, W) as in `Volume.label`.
        affine: (4, 4) affine of the scan's file.
    """
    from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

    back = ornt_transform(axcodes2ornt(AXES), io_orientation(affine))
    return np.ascontiguousarray(apply_orientation(mask, back))


def _open(path: Path) -> Nifti1Image:
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError

    try:
        image: Any = nib.load(path)
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as NIfTI: {error}; copy the file again") from error
    if len(image.shape) != 3:
        raise DataError(f"{path}: has shape {image.shape}; expected one 3D volume")
    if 0 in image.shape:
        raise DataError(f"{path}: is empty, shape {image.shape}; export the scan again")
    placed = not hasattr(image.header, "get_sform") or (
        int(image.header["sform_code"]) > 0 or int(image.header["qform_code"]) > 0
    )
    sizes = np.linalg.norm(image.affine[:3, :3], axis=0)
    zooms = np.asarray(image.header.get_zooms()[:3], dtype=float)
    usable = np.isfinite(image.affine).all() and (sizes > 0).all() and (zooms > 0).all()
    if not placed or not usable or abs(np.linalg.det(image.affine[:3, :3] / sizes)) < 1e-3:
        raise DataError(
            f"{path}: no spacing or orientation: affine {image.affine.tolist()}, voxel size "
            f"{zooms.tolist()}; export the scan with its geometry"
        )
    return image


def _voxels(path: Path, image: Nifti1Image) -> NDArray[Any]:
    try:
        return np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: voxels cannot be read: {error}; copy the file again") from error


def _require_same_grid(case: Case, image: Nifti1Image, label: Nifti1Image) -> None:
    if image.shape != label.shape:
        raise DataError(
            f"{case.label}: shape {label.shape} differs from {image.shape} of {case.image}; "
            "resample the mask to the scan's grid"
        )
    tolerance = AFFINE_TOLERANCE * _spacing(image.affine).min()
    # The far corner shows a wrong spacing, the origin a wrong place.
    corners = np.array([[0, 0, 0, 1], [*(n - 1 for n in image.shape), 1]], dtype=float).T
    if np.abs(image.affine @ corners - label.affine @ corners).max() > max(
        tolerance, 1e-6 * np.abs(image.affine).max()
    ) or not np.allclose(image.affine[:3, :3], label.affine[:3, :3], atol=tolerance):
        raise DataError(
            f"{case.label}: affine {label.affine.tolist()} differs from {image.affine.tolist()} "
            f"of {case.image}; resample the mask to the scan's grid"
        )


def _classes(path: Path, label: NDArray[Any], class_count: int) -> NDArray[np.uint8]:
    """The mask as uint8, if it holds nothing but 0 to `class_count`."""
    finite = label.dtype.kind != "f" or bool(np.isfinite(label).all())
    if finite and label.min() >= 0 and label.max() <= class_count:
        classes: NDArray[np.uint8] = label.astype(np.uint8)
        if label.dtype.kind != "f" or np.array_equal(classes, label):
            return classes
    allowed = range(class_count + 1)
    unknown = [value for value in np.unique(label).tolist() if value not in allowed]
    raise DataError(
        f"{path}: unknown label {', '.join(f'{value:g}' for value in unknown[:8])}; expected "
        f"whole numbers from 0 to {class_count}"
    )


def _to_axes(array: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

    there = ornt_transform(io_orientation(affine), axcodes2ornt(AXES))
    oriented: NDArray[Any] = apply_orientation(array, there)
    return oriented


def _spacing(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3,) mm along `AXES`."""
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    there = ornt_transform(io_orientation(affine), axcodes2ornt(AXES))
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    spacing = np.empty(3)
    spacing[there[:, 0].astype(int)] = sizes
    return spacing
