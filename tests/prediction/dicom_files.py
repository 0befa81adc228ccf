"""DICOM series of CT slices, written slice by slice as a scanner's archive would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


def write_series(
    folder: Path,
    voxels: np.ndarray,
    spacing: tuple[float, float, float] = (3.0, 0.7, 0.8),
    cosines: tuple[tuple[float, ...], tuple[float, ...]] = AXIAL,
    origin: tuple[float, float, float] = (-10.0, -20.0, 30.0),
    step: np.ndarray | None = None,
    uid: str = "1.2.3",
    slope: float = 1.0,
    intercept: float = -1024.0,
    **changes: Any,
) -> list[Path]:
    """Writes voxels (slices, rows, columns); the k-th slice lies k steps from the origin.

    Args:
        spacing: mm along slices, rows' distance, columns' distance.
        step: mm from slice to slice; None for `spacing[0]` along the normal.
        changes: further attributes of every slice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    row, column = (np.array(cosine) for cosine in cosines)
    along = np.cross(row, column) * spacing[0] if step is None else step
    paths = []
    for number, plane in enumerate(voxels):
        # Named against their order in space, without an ending, as archives do.
        path = folder / f"IM{len(voxels) - number:04d}"
        header = slice_of(path, plane, uid)
        header.ImageOrientationPatient = [*map(float, row), *map(float, column)]
        header.ImagePositionPatient = [float(mm) for mm in np.array(origin) + number * along]
        header.PixelSpacing = [spacing[1], spacing[2]]
        header.RescaleSlope, header.RescaleIntercept = slope, intercept
        for name, value in changes.items():
            setattr(header, name, value)
        header.save_as(path)
        paths.append(path)
    return paths


def slice_of(path: Path, plane: np.ndarray, uid: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    header.SeriesInstanceUID, header.Modality = uid, "CT"
    header.Rows, header.Columns = plane.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation = int(plane.dtype == np.int16)
    header.PixelData = plane.tobytes()
    return header


def change(path: Path, **values: Any) -> None:
    """Changes attributes of a file that was written."""
    header = pydicom.dcmread(path)
    for name, value in values.items():
        setattr(header, name, value)
    header.save_as(path)
