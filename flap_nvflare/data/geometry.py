"""Masks whose voxels are those of their scan, but whose header says otherwise.

Other tools lose or round the geometry when they write a mask; in SAML's prostate set it is so. To
resample such a mask would move it off its scan. Training refuses it: only a person who looks at the
two can tell which case it is.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from flap_nvflare.data.cases import Case, stem
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.scan import Scan, mask_image, open_scan

ORIGINAL = ".orig"  # after the name of the file as it was, which no layout reads


def copy_geometry(case: Case) -> Path:
    """Writes the scan's affine, codes and units into its mask.

    The mask as it was stays beside it, its name ending in `.orig`.

    Args:
        case: scan and mask of one shape.

    Returns:
        The mask as it was.

    Raises:
        DataError: if the shapes differ, a label is no whole number from 0 to 255, or there is a
            mask as it was already.
        OSError: if the folder cannot be written.
    """
    scan, mask = open_scan(case.image), open_scan(case.label, placed=False)
    # The mask's voxels by the scan's directions: the order in the file stays as it is.
    values = Scan(mask.path, scan.image, mask.stored, mask.slope, mask.intercept).whole()
    labels = np.clip(np.nan_to_num(values), 0, 255).astype(np.uint8)
    if not (labels == values).all():
        raise DataError(f"{case.label}: its labels are no whole numbers from 0 to 255; mend them")
    original = case.label.with_name(case.label.name + ORIGINAL)
    if original.exists():
        raise DataError(f"{original}: is there already; move it away, it would be lost")
    _replace(case.label, original, mask_image(labels, scan))
    return original


def _replace(path: Path, original: Path, image: nib.Nifti1Image) -> None:
    """Puts the image at `path`, whole or not at all, and what was there at `original`."""
    ending = path.name[len(stem(path.name)) :]
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".geometry-", suffix=ending)
    os.close(handle)
    beside = Path(name)
    try:
        nib.save(image, beside)
        beside.chmod(path.stat().st_mode & 0o777)
        try:
            os.link(path, original)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            path.rename(original)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
