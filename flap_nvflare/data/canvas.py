"""A volume in mm on which synthetic organs are painted, with coordinates that bend.

Axes as in KiTS19: z from head to feet, y from front to back, x from the patient's right to the
left, all in mm from the centre. Organs are painted by formulas in bent coordinates, so each case
is deformed as a whole and no organ is an exact ellipsoid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Box = tuple[slice, slice, slice]
Point = Sequence[float]
# Organs are looked for this far (mm) around their box, more than the coordinates ever bend.
_MARGIN = 14.0


class Canvas:
    """HU and labels of one case.

    Args:
        shape: (S, H, W).
        spacing: mm along these axes.
        rng: source of everything random.

    Attributes:
        hu: (S, H, W) float32, air at first.
        label: (S, H, W) uint8.
        room: (S, H, W) bool, where organs may be: at first everywhere.
        z, y, x: (S, H, W) float32, bent coordinates in mm.
        rough: (S, H, W) float32, smooth noise of about 25 mm, deviation 1.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
        rng: np.random.Generator,
    ) -> None:
        self.shape = shape
        self.spacing = spacing
        self.rng = rng
        self.hu = np.full(shape, -1000.0, dtype=np.float32)
        self.label = np.zeros(shape, dtype=np.uint8)
        self.room = np.ones(shape, dtype=bool)
        axes = [
            ((np.arange(n) - (n - 1) / 2) * step).astype(np.float32)
            for n, step in zip(shape, spacing, strict=True)
        ]
        self._axes = axes
        self.z = axes[0][:, None, None] + self.noise((4, 4, 4), 3.0)
        self.y = axes[1][None, :, None] + self.noise((4, 6, 6), 3.0)
        self.x = axes[2][None, None, :] + self.noise((4, 6, 6), 3.0)
        self.rough = self.noise((7, 14, 14), 1.0)

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), from (z, y, x) in voxels to mm as NIfTI counts them."""
        depth, height, width = self.spacing
        return np.diag([-depth, -height, -width, 1.0])[[2, 1, 0, 3]]

    def noise(self, cells: tuple[int, int, int], deviation: float) -> np.ndarray:
        """Smooth noise (S, H, W) float32: cubic B-splines over a random grid, cut at 3 sigma."""
        grid = self.rng.standard_normal(tuple(n + 3 for n in cells), dtype=np.float32)
        np.clip(grid, -3, 3, out=grid)
        for axis, (count, size) in enumerate(zip(cells, self.shape, strict=True)):
            grid = np.moveaxis(np.tensordot(_splines(count, size), grid, axes=(1, axis)), 0, axis)
        # The splines keep 0.48 of the variance on each axis.
        return np.ascontiguousarray(grid * np.float32(deviation / 0.48**1.5), dtype=np.float32)

    def box(self, centre: Point, reach: Point) -> Box:
        """The part of the volume that holds centre +- reach (mm, z y x)."""
        parts = []
        for axis, middle, far in zip(self._axes, centre, reach, strict=True):
            low, high = np.searchsorted(axis, (middle - far - _MARGIN, middle + far + _MARGIN))
            parts.append(slice(int(low), int(high)))
        return parts[0], parts[1], parts[2]

    def within(self, z: float, radius: float) -> float:
        """The height closest to `z` (mm) at which something of this radius is all in the scan."""
        limit = max(float(self._axes[0][-1]) - radius, 0.0)
        return min(max(z, -limit), limit)

    def offsets(self, box: Box, centre: Point) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bent coordinates in the box relative to `centre`, in mm."""
        z, y, x = (np.float32(value) for value in centre)
        return self.z[box] - z, self.y[box] - y, self.x[box] - x

    def ellipsoid(
        self,
        centre: Point,
        radii: Point,
        turn: np.ndarray | None = None,
        rough: float = 0.1,
    ) -> tuple[Box, np.ndarray]:
        """Box and field of an ellipsoid: 0 in its centre, 1 on its surface, made uneven."""
        reach = [max(radii)] * 3 if turn is not None else radii
        box = self.box(centre, reach)
        axes = self.offsets(box, centre)
        if turn is not None:
            axes = turned(axes, turn)
        squares = sum(
            (axis * np.float32(1 / radius)) ** 2 for axis, radius in zip(axes, radii, strict=True)
        )
        return box, np.sqrt(squares) + np.float32(rough) * self.rough[box]

    def fill(self, box: Box, mask: np.ndarray, hu: float | np.ndarray) -> None:
        """Writes a grey value (or values of the box) where the mask holds and room is."""
        values = np.asarray(hu, dtype=np.float32)
        np.copyto(self.hu[box], values, where=mask & self.room[box])

    def mark(self, box: Box, mask: np.ndarray, label: int) -> None:
        """Writes a label where the mask holds and room is."""
        self.label[box][mask & self.room[box]] = label


def turned(
    axes: Sequence[np.ndarray], turn: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates in a frame whose axes are the rows of `turn`."""
    u, v, w = (
        np.float32(row[0]) * axes[0] + np.float32(row[1]) * axes[1] + np.float32(row[2]) * axes[2]
        for row in turn
    )
    return u, v, w


def rotation(about_z: float, about_y: float, about_x: float) -> np.ndarray:
    """Rotation (3, 3) of (z, y, x) coordinates by three angles in radians."""
    a, b, c = about_z, about_y, about_x
    in_slice = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    coronal = np.array([[np.cos(b), 0, -np.sin(b)], [0, 1, 0], [np.sin(b), 0, np.cos(b)]])
    sagittal = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return np.asarray(in_slice @ coronal @ sagittal)


@lru_cache(maxsize=64)
def _splines(cells: int, size: int) -> np.ndarray:
    """Cubic B-spline weights (size, cells + 3) of `size` places over `cells` cells."""
    place = np.linspace(0, cells, size, endpoint=False)
    cell = place.astype(int)
    t = place - cell
    weights = np.zeros((size, cells + 3), dtype=np.float32)
    rows = np.arange(size)
    weights[rows, cell] = (1 - t) ** 3 / 6
    weights[rows, cell + 1] = (3 * t**3 - 6 * t**2 + 4) / 6
    weights[rows, cell + 2] = (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6
    weights[rows, cell + 3] = t**3 / 6
    return weights
