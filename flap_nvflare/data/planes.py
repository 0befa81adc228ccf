"""Slices as pictures: which ones, how pixels become square, which colour shows which class."""

from __future__ import annotations

import numpy as np

# By class, from class 1; the same again from the start if there are more. Told apart by people
# who are colour-blind as well (M. Okabe and K. Ito, Color Universal Design, 2008).
COLOURS = ((213, 94, 0), (86, 180, 233), (240, 228, 66), (0, 158, 115), (204, 121, 167))
LARGEST = 512  # pixels of the longer side of a slice in a picture
_TINT = 0.45
_SLICES = 3


def colours_of(label: np.ndarray) -> np.ndarray:
    """Red, green and blue (..., 3) uint8 of class indices (...); of background, any."""
    return np.array(COLOURS, np.uint8)[(label.astype(int) - 1) % len(COLOURS)]


def tinted(plain: np.ndarray, label: np.ndarray) -> np.ndarray:
    """A picture with its classes in colour.

    Args:
        plain: (H, W, 3), 0 to 255.
        label: (H, W) class indices, 0 is background.

    Returns:
        (H, W, 3) float32; background is as in `plain`.
    """
    colour = (1 - _TINT) * plain + _TINT * colours_of(label).astype(np.float32)
    return np.where(label[:, :, None] > 0, colour, plain).astype(np.float32)


def slices_to_show(mask: np.ndarray) -> list[int]:
    """Of each third of the slices with foreground the one with most of it.

    Without foreground the middle slice; of less than three slices with foreground all of them.

    Args:
        mask: (S, H, W).
    """
    sizes = np.array([int(np.count_nonzero(plane)) for plane in mask])
    shown = np.flatnonzero(sizes)
    if not shown.size:
        return [len(mask) // 2]
    thirds = np.array_split(shown, min(_SLICES, shown.size))
    return [int(third[sizes[third].argmax()]) for third in thirds]


def square(plane: np.ndarray, spacing: tuple[float, ...], largest: int) -> np.ndarray:
    """The plane at one scale in both directions, by the nearest voxel.

    Args:
        plane: (H, W).
        spacing: mm between voxels along (H, W).
        largest: pixels of the longer side at most; no plane gets more than it has voxels.
    """
    mm = [count * step for count, step in zip(plane.shape, spacing, strict=True)]
    scale = min(largest, max(plane.shape)) / max(mm)
    rows, columns = (
        np.linspace(0, count - 1, max(1, round(length * scale))).round().astype(int)
        for count, length in zip(plane.shape, mm, strict=True)
    )
    turned: np.ndarray = plane[np.ix_(rows, columns)]
    return turned
