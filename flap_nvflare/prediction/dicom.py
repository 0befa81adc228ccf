"""A DICOM series as one scan: its slices in order of their places, checked to be whole and even.

pydicom reads the files (PS3.3 C.7.6.2 and PS3.5 of the standard). What a series does not say, or
says in two ways, is an error: a mask on a guessed grid would look right and be wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.scan import Scan

_PREAMBLE = 128
# A slice may lie this share of the spacing off its place, and cosines may be this far apart.
_OFF_PLACE, _OFF_COSINE = 0.02, 1e-3
# What places a slice, and how many numbers it has.
_NEEDED = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
_MM, _SCANNER = 2, 1  # NIfTI's codes: millimetres; coordinates of the scanner


def is_dicom(path: Path) -> bool:
    """Whether the file begins as DICOM files do."""
    try:
        with path.open("rb") as file:
            file.seek(_PREAMBLE)
            return file.read(4) == b"DICM"
    except OSError:
        return False


def open_series(files: Sequence[Path], series: str = "") -> Scan:
    """Opens the one series among some files, or the one that is named.

    Args:
        files: DICOM files, one slice each, in any order.
        series: SeriesInstanceUID; empty where there is only one.

    Raises:
        DataError: if there are several series or none, slices are missing, uneven or of unlike
            grids, a file is damaged or needs a decoder that is not installed.
    """
    folder = files[0].parent
    slices = _in_order(folder, _of_series(folder, files, series))
    first = slices[0]
    affine = _affine(folder, slices)
    stored, slope, intercept = _voxels(slices)
    image = nib.Nifti1Image(np.broadcast_to(np.uint8(0), stored.shape), affine)
    image.header.set_xyzt_units(_MM)
    image.set_sform(affine, _SCANNER)
    # A tilted gantry's grid is sheared, and a qform cannot say so.
    image.set_qform(affine, 0 if _sheared(affine) else _SCANNER)
    return Scan(Path(first.filename).parent, image, stored, slope, intercept)


def _of_series(folder: Path, files: Sequence[Path], series: str) -> list[Any]:
    """The headers of the series' files, all of them with what a slice must say."""
    found: dict[str, list[Any]] = defaultdict(list)
    for file in files:
        header = _header(file)
        if "Rows" in header:  # no DICOMDIR, report or structure set
            found[str(header.get("SeriesInstanceUID", ""))].append(header)
    if not found:
        raise DataError(f"{folder}: no DICOM slice in it; name the folder of a series")
    if series and series not in found:
        raise DataError(f"{folder}: no series {series}; it holds {sorted(found)}")
    if not series and len(found) > 1:
        raise DataError(f"{folder}: {len(found)} series {sorted(found)}; name one by --series")
    chosen = found[series] if series else next(iter(found.values()))
    for header in chosen:
        _check_slice(header)
    return chosen


def _header(file: Path) -> Any:
    import pydicom

    try:
        return pydicom.dcmread(file, stop_before_pixels=True)
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{file}: damaged ({error}); export the series again") from error


def _check_slice(header: Any) -> None:
    """Refuses what is no slice with a place of its own."""
    missing = [name for name, count in _NEEDED.items() if not _has(header, name, count)]
    if missing or int(header.get("SamplesPerPixel", 1)) != 1:
        raise DataError(
            f"{header.filename}: no slice of a scan ({f'no {missing[0]}' if missing else 'colour'})"
            "; take it out of the folder, or convert an enhanced (multi-frame) series to NIfTI"
        )
    if min(_numbers(header.PixelSpacing)) <= 0:
        raise DataError(
            f"{header.filename}: PixelSpacing {list(header.PixelSpacing)} is not above 0 mm; "
            "export the series again"
        )


def _has(header: Any, name: str, count: int) -> bool:
    """Whether the header holds so many numbers of this name; a single one is no list."""
    try:
        return len(_numbers(header.get(name) or ())) == count
    except (TypeError, ValueError):
        return False


def _in_order(folder: Path, slices: list[Any]) -> list[Any]:
    """The slices along their normal, those of one grid."""
    first = slices[0]
    for other in slices[1:]:
        same = (other.Rows, other.Columns) == (first.Rows, first.Columns)
        same = same and np.allclose(_numbers(other.PixelSpacing), _numbers(first.PixelSpacing))
        same = same and np.allclose(_cosines(other), _cosines(first), atol=_OFF_COSINE)
        if not same:
            raise DataError(
                f"{other.filename}: size, spacing or orientation differ from those of "
                f"{Path(first.filename).name}; keep slices of one stack in {folder}"
            )
    row, column = _cosines(first)
    normal = np.cross(row, column)
    if not np.isclose(np.linalg.norm(normal), 1, atol=1e-2):
        raise DataError(
            f"{first.filename}: ImageOrientationPatient {list(first.ImageOrientationPatient)} are "
            "no two perpendicular directions; export the series again"
        )
    return sorted(slices, key=lambda header: float(_position(header) @ normal))


def _affine(folder: Path, slices: Sequence[Any]) -> np.ndarray:
    """Voxel (column, row, slice) to mm in NIfTI's directions, where x and y run the other way.

    Raises:
        DataError: if the slices are not evenly apart.
    """
    first = slices[0]
    row, column = _cosines(first)
    down, across = _numbers(first.PixelSpacing)
    places = np.array([_position(header) for header in slices])
    if len(slices) > 1:
        steps = np.diff(places, axis=0)
        step = np.median(steps, axis=0)
        _check_even(folder, slices, steps, step)
        step = (places[-1] - places[0]) / (len(slices) - 1)
    else:
        thick = first.get("SpacingBetweenSlices") or first.get("SliceThickness")
        if not thick:
            raise DataError(
                f"{first.filename}: one slice of unknown thickness; take a whole series"
            )
        step = np.cross(row, column) * abs(float(thick))
    affine = np.eye(4)
    affine[:3] = np.column_stack([row * across, column * down, step, places[0]])
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _check_even(folder: Path, slices: Sequence[Any], steps: np.ndarray, step: np.ndarray) -> None:
    length = float(np.linalg.norm(step))
    off = np.linalg.norm(steps - step, axis=1)
    for place in np.flatnonzero(off > _OFF_PLACE * length + 1e-3):
        apart = float(np.linalg.norm(steps[place]))
        before, after = (Path(slices[place + k].filename).name for k in (0, 1))
        what = "lie at one place" if apart < 1e-3 else f"lie {apart:.4g} mm apart"
        raise DataError(
            f"{folder}: slices {before} and {after} {what}, others {length:.4g} mm; slices are "
            "missing, doubled or uneven: export the whole series again, or resample it to NIfTI"
        )


def _voxels(slices: Sequence[Any]) -> tuple[np.ndarray, float, float]:
    """Stored voxels (columns, rows, slices), slope and intercept.

    Where slices have rescales of their own, the voxels are float32 and rescaled already.
    """
    rescales = [_rescale(header) for header in slices]
    own = len(set(rescales)) > 1
    stored: np.ndarray | None = None
    for number, header in enumerate(slices):
        pixels = _pixels(Path(header.filename))
        if own:
            slope, intercept = rescales[number]
            pixels = (pixels * slope + intercept).astype(np.float32)
        if stored is None:
            stored = np.empty((*pixels.T.shape, len(slices)), pixels.dtype, order="F")
        if pixels.dtype != stored.dtype:
            raise DataError(
                f"{header.filename}: pixels of type {pixels.dtype} among {stored.dtype}; export "
                "the series again"
            )
        stored[:, :, number] = pixels.T
    assert stored is not None
    slope, intercept = (1.0, 0.0) if own else rescales[0]
    return stored, slope, intercept


def _rescale(header: Any) -> tuple[float, float]:
    """Slope and intercept; without them values are as stored."""
    slope, intercept = (header.get(name) for name in ("RescaleSlope", "RescaleIntercept"))
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def _pixels(file: Path) -> np.ndarray:
    """The stored values of a slice, (rows, columns)."""
    import pydicom
    from pydicom.pixels import get_decoder

    dataset = pydicom.dcmread(file)
    syntax = dataset.file_meta.get("TransferSyntaxUID", pydicom.uid.ImplicitVRLittleEndian)
    try:
        if syntax.is_compressed and not get_decoder(syntax).is_available:
            missing = ", or ".join(get_decoder(syntax).missing_dependencies)
            raise DataError(f"{file}: compressed as {syntax.name}; install {missing}")
        pixels = np.asarray(dataset.pixel_array)
    except NotImplementedError as error:
        raise DataError(
            f"{file}: compressed as {syntax.name}, which pydicom cannot decode; export the series "
            "uncompressed"
        ) from error
    except (OSError, EOFError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: its pixels are damaged ({error}); export it again") from error
    if pixels.ndim != 2:
        raise DataError(
            f"{file}: its pixels have shape {pixels.shape}; convert a multi-frame series to NIfTI"
        )
    return pixels


def _sheared(affine: np.ndarray) -> bool:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > _OFF_COSINE)


def _cosines(header: Any) -> tuple[np.ndarray, np.ndarray]:
    """Directions of a row and of a column."""
    six = _numbers(header.ImageOrientationPatient)
    return six[:3], six[3:]


def _position(header: Any) -> np.ndarray:
    return _numbers(header.ImagePositionPatient)


def _numbers(values: Any) -> np.ndarray:
    return np.array([float(value) for value in values])
