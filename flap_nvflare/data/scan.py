"""A NIfTI file opened but not converted: slabs of slices in a fixed order, and masks on its grid.

The array of a scan says nothing about its directions; the affine does. KiTS19 stores slices x
height x width, most other sets width x height x slices. Whatever the file holds, slices run from
head to feet, rows from front to back and columns from the patient's right to the left (codes I, P,
L), which is the order of KiTS19 and the usual way to look at a slice.

Voxels stay in the type that the file has: an uncompressed file is mapped and read where a slab
needs it; a compressed one can be read only from its beginning, so it is decompressed once, which
takes 2 bytes a voxel for CT (315 MB for 600 slices of 512 x 512). Only slabs become float32.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling, array_from_file

from flap_nvflare.data.errors import DataError

# Head to feet, front to back, right to left, in nibabel's numbering of the RAS axes.
ORIENTATION = np.array([[2, -1], [1, -1], [0, -1]])
_BROKEN = (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError, ValueError, TypeError)
_SLAB = 16  # slices in memory at once where all are looked at
_NUMBERS = "iufb"  # numpy's kinds of numbers with an order
# Free text of a header; the first two are left of Analyze, and hold names of patients there.
_TEXTS = ("data_type", "db_name", "descrip", "aux_file")


@dataclass(frozen=True, eq=False)
class Scan:
    """An opened scan or mask; S slices from head to feet, H rows, W columns.

    Attributes:
        path: where it comes from, for messages.
        image: nibabel's image with its geometry, checked.
        stored: the voxels in the file's order of axes and in its type, not scaled.
        slope, intercept: a voxel's value is slope x stored + intercept.
    """

    path: Path
    image: Any
    stored: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0

    @cached_property
    def turn(self) -> np.ndarray:
        """How the axes of the file go over into (S, H, W), as nibabel writes it."""
        return np.asarray(ornt_transform(io_orientation(self.image.affine), ORIENTATION))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, H, W)."""
        slices, height, width = self._in_order(self.stored.shape)
        return slices, height, width

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm between neighbouring voxels along (S, H, W)."""
        steps = np.linalg.norm(self.image.affine[:3, :3], axis=0)
        along, down, across = (float(step) for step in self._in_order(steps))
        return along, down, across

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres, of a sheared grid as well."""
        return float(abs(np.linalg.det(self.image.affine[:3, :3]))) / 1000

    def slab(self, first: int, last: int) -> np.ndarray:
        """Slices `first` to before `last` as (n, H, W) float32, in values, not as stored."""
        axis = int(np.flatnonzero(self.turn[:, 0] == 0)[0])
        if self.turn[axis, 1] < 0:
            count = self.stored.shape[axis]
            first, last = count - last, count - first
        index = [slice(None)] * 3
        index[axis] = slice(first, last)
        values = apply_read_scaling(self.stored[tuple(index)], self.slope, self.intercept)
        turned = apply_orientation(values, self.turn)
        return np.ascontiguousarray(turned, dtype=np.float32)

    def slabs(self) -> Iterator[np.ndarray]:
        """All slices in order, (n, H, W) float32 of a few at once."""
        count = self.shape[0]
        for first in range(0, count, _SLAB):
            yield self.slab(first, min(first + _SLAB, count))

    def whole(self) -> np.ndarray:
        """All slices, (S, H, W) float32."""
        return self.slab(0, self.shape[0])

    def _in_order(self, of_axes: Iterable[Any]) -> list[Any]:
        by_target = dict(zip(self.turn[:, 0].astype(int).tolist(), of_axes, strict=True))
        return [by_target[axis] for axis in range(3)]


def open_scan(path: Path, placed: bool = True) -> Scan:
    """Opens a NIfTI file and reads what a slab cannot be taken from otherwise.

    Args:
        path: the file.
        placed: whether its header must say how far apart the voxels lie and in which direction.

    Raises:
        DataError: if the file is missing, damaged, not 3D, empty, without spacing or direction, or
            holds no numbers.
    """
    image = open_image(path, placed)
    try:
        stored = _stored(path, image.dataobj)
        slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    except (*_BROKEN, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); copy the file again") from error
    if stored.dtype.kind not in _NUMBERS:
        raise DataError(
            f"{path}: its voxels are of type {stored.dtype}; expected one number a voxel"
        )
    return Scan(path, image, stored, slope, intercept)


def open_image(path: Path, placed: bool = True) -> Any:
    """The NIfTI image behind a path with its header checked, its voxels not yet read.

    Args:
        path, placed: see `open_scan`.

    Raises:
        DataError: as `open_scan` does about the header.
    """
    try:
        image: Any = nib.load(path)
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
    if placed:
        _check_affine(path, image)
    return image


def check_values(path: Path, slabs: Iterable[np.ndarray]) -> None:
    """Refuses a scan whose values cannot be those of a body.

    Args:
        path: of the scan.
        slabs: all of its values in any number of parts.

    Raises:
        DataError: if a value is NaN or infinite, or all are the same.
    """
    broken, low, high = 0, np.inf, -np.inf
    for slab in slabs:
        # One pass where all is well: a sum with NaN or infinity in it is not finite.
        with np.errstate(invalid="ignore"):
            if not np.isfinite(slab.sum(dtype=np.float64)):
                broken += int((~np.isfinite(slab)).sum())
        low, high = min(low, float(slab.min())), max(high, float(slab.max()))
    if broken:
        raise DataError(
            f"{path}: {broken} voxels are NaN or infinite; write the scan again with finite values"
        )
    if low == high:
        raise DataError(f"{path}: empty, every voxel is {low:g}; export the scan again")


def mask_image(mask: np.ndarray, scan: Scan) -> Any:
    """A mask as nibabel's image on the scan's grid: its affine, codes and units, as uint8.

    What else the header says is about the scan and is left out: range of grey values, free text,
    extensions.

    Args:
        mask: (S, H, W) class indices.
        scan: the scan that it is of.

    Raises:
        DataError: if the scan has another shape.
    """
    if mask.shape != scan.shape:
        raise DataError(
            f"{scan.path}: has shape {scan.shape}, the mask {mask.shape} in the same order of "
            f"axes; give the mask of this case"
        )
    back = ornt_transform(ORIENTATION, io_orientation(scan.image.affine))
    turned = apply_orientation(np.asarray(mask, dtype=np.uint8), back)
    kind = nib.Nifti2Image if isinstance(scan.image, nib.Nifti2Image) else nib.Nifti1Image
    image: Any = kind(turned, scan.image.affine, scan.image.header)
    header = image.header
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0
    for name in _TEXTS:
        if name in header:
            header[name] = b""
    header.extensions.clear()
    return image


def _stored(path: Path, proxy: Any) -> np.ndarray:
    """The voxels as stored: mapped, or of a compressed file decompressed.

    A compressed file is read to its end, where the checksum of its content stands. nibabel stops
    at the last voxel, so that a damaged byte would be taken for a grey value.
    """
    if not path.name.endswith(".gz"):
        return np.asanyarray(proxy.get_unscaled())
    with gzip.open(path) as file:
        stored: np.ndarray = array_from_file(
            proxy.shape, proxy.dtype, file, proxy.offset, proxy.order
        )
        while file.read(1 << 20):
            pass
    return stored


def _check_affine(path: Path, image: Any) -> None:
    """Refuses a header that does not say how far apart the voxels lie and in which direction."""
    header, affine = image.header, image.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    unset = "sform_code" in header and not (header["sform_code"] or header["qform_code"])
    if unset or not np.isfinite(affine).all() or not (spacing > 0).all():
        raise DataError(
            f"{path}: no usable spacing and direction (affine {affine.tolist()}, sform and qform "
            f"{'unset' if unset else 'set'}); convert the scan again with its geometry; a mask "
            f"may get its scan's: 'flap-nvflare prepare' with --copy-geometry"
        )
    if np.isnan(io_orientation(affine)).any():
        raise DataError(f"{path}: its affine {affine.tolist()} is flat; convert the scan again")
