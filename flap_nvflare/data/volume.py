"""One case from its files: grey values and mask with the slices first, the right way round.

In which order a file holds them, `data.scan` sorts out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np

from flap_nvflare.data.cases import Case
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.scan import Scan, check_values, open_image, open_scan

# Two grids are one if no corner lies further apart than this share of the smallest voxel side.
_GRID_TOLERANCE = 0.1


@dataclass(frozen=True, eq=False)
class Volume:
    """One scan in memory; S slices from head to feet, H rows, W columns.

    Attributes:
        name: name of the case.
        image: (S, H, W) float32, grey values as the file has them: of CT in HU.
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
        class_count: number of foreground classes C; labels run from 0 to C. Of a binary case
            every label above 0 is class 1.

    Raises:
        DataError: if a file is missing, damaged, not 3D, empty, without spacing or direction,
            if the two grids differ, if a scan holds NaN or infinity, or a mask other labels.
    """
    scan, mask = open_scan(case.image), open_scan(case.label)
    check_same_grid(case, scan.image, mask.image)
    image = scan.whole()
    check_values(case.image, [image])
    # The scan's directions hold for both: the mask's may differ by a rounding.
    on_scan = Scan(mask.path, scan.image, mask.stored, mask.slope, mask.intercept)
    return Volume(
        name=case.name,
        image=image,
        label=_labels(case, on_scan.whole(), class_count),
        spacing=scan.spacing,
    )


def orientation(case: Case) -> str:
    """Where the axes of the scan's file run to, such as `IPL`: the header alone is read.

    Raises:
        DataError: as `load_volume` does about the header.
    """
    return "".join(nib.aff2axcodes(open_image(case.image).affine))


def check_same_grid(case: Case, scan: Any, mask: Any) -> None:
    """Refuses a mask whose voxels are not those of its scan; the headers alone are looked at.

    Args:
        case: the files, for messages.
        scan, mask: nibabel's images of them.

    Raises:
        DataError: if shapes or affines differ.
    """
    if scan.shape != mask.shape:
        raise DataError(
            f"{case.label}: shape {mask.shape} differs from {scan.shape} of {case.image}; take "
            f"the mask of this scan"
        )
    last = np.array(scan.shape) - 1
    affine, other = scan.affine, mask.affine
    corners = np.array([[*(last * np.array(bits)), 1] for bits in np.ndindex(2, 2, 2)])
    apart = np.linalg.norm((corners @ (affine - other).T)[:, :3], axis=1).max()
    smallest = np.linalg.norm(affine[:3, :3], axis=0).min()
    if apart > _GRID_TOLERANCE * smallest:
        raise DataError(
            f"{case.label}: its affine differs from that of {case.image}, corners lie "
            f"{apart:.3g} mm apart; resample the mask onto the scan's grid, or if only its header "
            f"is wrong, write the scan's into it: 'flap-nvflare prepare' with --copy-geometry"
        )


def _labels(case: Case, values: np.ndarray, class_count: int) -> np.ndarray:
    """Masks as (…) uint8 with nothing but 0 to `class_count`; of a binary case 0 and 1."""
    if case.binary:
        # What is no whole number or below 0 stays, and is refused as in any mask.
        whole = (values > 0) & (values == np.floor(values)) & np.isfinite(values)
        values = np.where(whole, np.float32(1), values)
    labels = np.clip(np.nan_to_num(values, nan=-1.0), -1, 255).astype(np.uint8)
    wrong = (labels != values) | (labels > class_count)
    if wrong.any():
        found = np.unique(values[wrong])
        shown = ", ".join(f"{value:g}" for value in found[:8])
        raise DataError(
            f"{case.label}: unknown labels {shown}{' …' if len(found) > 8 else ''}; expected whole "
            f"numbers from 0 to {class_count}"
        )
    return labels
