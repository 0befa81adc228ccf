"""Scans with a word in their names and headers that must never be found outside of a site."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from scan_files import write_sites

CANARY = "CANARYe5b0"
FAULTS = ("no mask", "corrupt", "not finite", "no folder", "other grid", "no case")


def canary_scans(root: Path, sites: Sequence[str]) -> Path:
    """Scans in the KiTS layout, four cases a site, named by the canary."""
    write_sites(root, sites)
    table = root / "thresholded_sites.csv"
    table.write_text(table.read_text().replace("case_0", f"{CANARY}_0"))
    for folder in sorted(root.glob("case_*")):
        for path in folder.glob("*.nii.gz"):
            image = nibabel.load(path)
            data = np.asarray(image.dataobj)
            image.header["descrip"] = CANARY.encode()
            nibabel.save(nibabel.Nifti1Image(data, image.affine, image.header), path)
        folder.rename(root / folder.name.replace("case_", f"{CANARY}_"))
    return root


def break_scan(root: Path, number: int, fault: str) -> None:
    """One of `FAULTS` in the case of that number."""
    mask = root / f"{CANARY}_{number:05d}" / "segmentation.nii.gz"
    scan = mask.with_name("imaging.nii.gz")
    image = nibabel.load(scan)
    if fault == "no mask":
        mask.unlink()
    elif fault == "corrupt":
        scan.write_bytes(scan.read_bytes()[:200])
    elif fault == "no folder":
        shutil.rmtree(mask.parent)
    elif fault == "not finite":
        values = np.full(image.shape, np.nan, np.float32)
        nibabel.save(nibabel.Nifti1Image(values, image.affine), scan)
    elif fault == "other grid":
        values = np.zeros((2, 2, 2), np.int16)
        nibabel.save(nibabel.Nifti1Image(values, image.affine), scan)
    elif fault == "no case":
        table = root / "thresholded_sites.csv"
        lines = [line for line in table.read_text().splitlines() if ",test," not in line]
        table.write_text("\n".join(lines) + "\n")
    else:
        raise ValueError(fault)
