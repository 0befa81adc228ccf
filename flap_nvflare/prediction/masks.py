"""Masks on disk: whole or not there, with a stamp of all that they were made from.

The stamp stands in the file's own description, so it cannot be parted from the mask.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from tempfile import mkstemp

import nibabel as nib
import numpy as np

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.scan import Scan, mask_image, open_image, open_scan
from flap_nvflare.data.window import Window

# Of the code that makes masks: raise it with every change of their voxels.
VERSION = 1
_MAKER = "flap_nvflare"
_SLAB = 16


def stamp_of(adapter_sha256: str, base_sha256: str, window: Window | None, scan_sha256: str) -> str:
    """Hash of all that decides a mask; the adapter's file holds the settings."""
    values = None if window is None else (window.low, window.high, window.mean, window.std)
    text = json.dumps([VERSION, adapter_sha256, base_sha256, values, scan_sha256])
    return hashlib.sha256(text.encode()).hexdigest()


def is_done(path: Path, stamp: str) -> bool:
    """Whether the mask of this stamp is there.

    Raises:
        DataError: if another file is in its place.
    """
    if not path.exists():
        return False
    if _said(path) == f"{_MAKER} {stamp}":
        return True
    raise DataError(
        f"{path}: is no mask of this scan by this adapter, base and grey values; give --overwrite "
        "or another --out"
    )


def write_mask(path: Path, mask: np.ndarray, scan: Scan, stamp: str) -> None:
    """Writes a mask (S, H, W) on the scan's grid; a kill leaves what was there before.

    Only its owner may read the file.

    Raises:
        DataError: if it cannot be written.
    """
    image = mask_image(mask, scan)
    image.header["descrip"] = f"{_MAKER} {stamp}".encode()
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = mkstemp(prefix=".", suffix=".tmp.nii.gz", dir=path.parent)
        os.close(handle)
        beside = Path(name)
        nib.save(image, beside)
        _settle(beside)
        beside.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); free the disk or give "
            "another --out"
        ) from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def read_mask(path: Path) -> np.ndarray:
    """A mask as `write_mask` took it, (S, H, W) uint8."""
    scan = open_scan(path)
    mask = np.empty(scan.shape, np.uint8)
    for first in range(0, len(mask), _SLAB):
        last = min(first + _SLAB, len(mask))
        mask[first:last] = scan.slab(first, last)
    return mask


def _said(path: Path) -> str:
    """The description in the file's header; empty if it has none."""
    try:
        return bytes(open_image(path).header["descrip"]).rstrip(b"\0").decode("latin-1")
    except (DataError, KeyError, ValueError):
        return ""


def _settle(path: Path) -> None:
    """Waits until the file's bytes are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
