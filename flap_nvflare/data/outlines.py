"""Outlines moved apart from the truth: readers who draw wide or tight."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

# Pixels by which the distance is smoothed, so that an outline may move by parts of a pixel.
_SMOOTH = 0.7
# Pixels between an outline and the middle of the pixel that is the nearest one beyond it: half a
# pixel along an axis, less on a slant, where there are more pixels to be the nearest.
_HALF = 0.35


def moved(mask: np.ndarray, spacing: tuple[float, float, float], mm: float) -> np.ndarray:
    """The mask with its foreground grown by some mm, or shrunk if negative.

    In the slice, as readers draw. Between the classes nothing moves: what is gained has the class
    of the nearest foreground, what is lost is background, so a tumour stays in the foreground.

    Args:
        mask: (S, H, W) uint8, 0 is background.
        spacing: mm between neighbouring voxels along (S, H, W).
        mm: how far the outline moves.

    Returns:
        (S, H, W) uint8; the mask itself for 0 mm.
    """
    if mm == 0.0:
        return mask
    result = mask.copy()
    for index, labels in enumerate(mask):
        inside = labels > 0
        if inside.any():
            result[index] = _moved_slice(labels, inside, spacing[1:], mm)
    return result


def _moved_slice(
    labels: np.ndarray, inside: np.ndarray, pixel: tuple[float, ...], mm: float
) -> np.ndarray:
    # A border of background: an organ has an outline where it reaches the edge of the picture too.
    padded = np.pad(inside, 1)
    outside, nearest = distance_transform_edt(~padded, sampling=pixel, return_indices=True)
    distance = outside - distance_transform_edt(padded, sampling=pixel)
    distance -= np.where(padded, -_HALF, _HALF) * float(np.mean(pixel))
    reached = gaussian_filter(distance, _SMOOTH) <= mm
    filled = np.pad(labels, 1)[tuple(nearest)]
    kept = padded | reached if mm > 0 else padded & reached
    moved_labels: np.ndarray = np.where(kept, filled, 0)[1:-1, 1:-1].astype(np.uint8)
    return moved_labels
