"""Which grey values the network sees, and how they are scaled: of a site, or of each scan.

CT has units, so a site has one window. As nnU-Net and Fed-KiTS2019 do, it is read off the
foreground of the training cases: clip to its 0.5 and 99.5 percentiles, then z-score by mean and
deviation of the clipped foreground.

MR has none, and every scan its own scale. As nnU-Net does with MR, a scan is normalised by itself;
of its voxels those count that are not air, and no label is looked at. Air is what lies in the
lowest tenth of the range between the scan's own 2 and 98 percentiles, as in BET (Smith, Human Brain
Mapping 17:143, 2002). Then clip and z-score as above. A gain or an offset of the scanner's goes
out, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.scan import Scan
from flap_nvflare.data.volume import Volume

PERCENTILES = (0.5, 99.5)
# Of a scan by itself: the ends of its range, and the share of the range that is air.
ROBUST_RANGE = (2.0, 98.0)
AIR = 0.1
# Voxels of a scan that are looked at. Of more every n-th is, evenly over rows, columns and slices:
# 512 x 512 x 600 in 17 MB, and a percentile of 4 million is off by thousandths of a percent.
LOOKED_AT = 2**22


@dataclass(frozen=True)
class Window:
    """Clip to [low, high], then subtract `mean` and divide by `std`: HU, or a scan's own units.

    Raises:
        DataError: if a value is not finite, the range is empty or `std` is not above 0.
    """

    low: float
    high: float
    mean: float
    std: float

    def __post_init__(self) -> None:
        values = (self.low, self.high, self.mean, self.std)
        if not np.isfinite(values).all() or self.low >= self.high or self.std <= 0:
            raise DataError(
                f"window {values} (low, high, mean, std) cannot be used; expected finite values, "
                f"low < high and std > 0"
            )

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Values of any shape -> float32 of that shape, about 0 +- 1 in the foreground."""
        clipped = np.clip(image, np.float32(self.low), np.float32(self.high))
        scaled: np.ndarray = (clipped - np.float32(self.mean)) / np.float32(self.std)
        return scaled.astype(np.float32, copy=False)

    def shown(self, image: np.ndarray) -> np.ndarray:
        """Values as greys of a picture: 0 and 1 are the window's ends, not clipped."""
        grey: np.ndarray = (image - self.low) / (self.high - self.low)
        return grey


# Fed-KiTS2019 with its training cases of each site (arXiv 2407.21739).
KITS_WINDOWS = {
    "A": Window(-66.0, 208.0, 100.5, 61.7),
    "B": Window(-77.0, 341.0, 110.7, 84.0),
    "C": Window(-89.0, 325.0, 123.7, 97.3),
    "D": Window(-64.0, 202.0, 71.1, 53.0),
    "E": Window(-64.0, 236.0, 91.4, 61.0),
    "F": Window(-82.0, 288.0, 105.3, 76.5),
}

# For a scan of a site whose window is not known: the means over those sites.
MEAN_KITS_WINDOW = Window(
    *(
        round(sum(getattr(one, name) for one in KITS_WINDOWS.values()) / len(KITS_WINDOWS), 1)
        for name in ("low", "high", "mean", "std")
    )
)


def foreground_window(volumes: Iterable[Volume]) -> Window:
    """The window of a site from its training cases.

    Args:
        volumes: the site's training cases; every foreground voxel counts once.

    Raises:
        DataError: if no case shows foreground, or all of it has one value.
    """
    names: list[str] = []
    parts: list[np.ndarray] = []
    for volume in volumes:
        names.append(volume.name)
        parts.append(volume.image[volume.label > 0])
    foreground = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
    if foreground.size == 0:
        raise DataError(
            f"no training case shows foreground (cases: {names}); give the site cases whose masks "
            f"hold a label above 0"
        )
    low, high = _ends(foreground, PERCENTILES)
    if low >= high:
        raise DataError(
            f"the foreground of the training cases {names} has one value, {low:g}; "
            f"check that scans and masks belong together"
        )
    return _within(foreground, low, high)


def scan_window(scan: Scan) -> Window:
    """The window of a scan by itself, read slab by slab; the same as `volume_window` of it.

    Raises:
        DataError: if all of it that is not air has one value.
    """
    return _own_window(scan.path, scan.shape, scan.slabs())


def volume_window(volume: Volume) -> Window:
    """The window of a volume by itself; its mask is not looked at.

    Raises:
        DataError: as `scan_window`.
    """
    return _own_window(volume.name, volume.image.shape, [volume.image])


def _own_window(name: Path | str, shape: tuple[int, ...], slabs: Iterable[np.ndarray]) -> Window:
    values = _looked_at(shape, slabs)
    dark, bright = _ends(values, ROBUST_RANGE)
    body = values[values > dark + AIR * (bright - dark)]
    low, high = _ends(body, PERCENTILES) if body.size else (bright, bright)
    if low >= high:
        raise DataError(
            f"{name}: all of it that is not air has one value, {low:g}, so it has no grey values "
            "to scale by; export the scan again, and check that it is no mask"
        )
    return _within(body, low, high)


def _looked_at(shape: tuple[int, ...], slabs: Iterable[np.ndarray]) -> np.ndarray:
    """At most `LOOKED_AT` values of a scan (S, H, W), the same ones whatever the slabs."""
    step = math.ceil(math.prod(shape) / LOOKED_AT)
    # Without a common divisor every place in a slice has its turn, in another slice each.
    while math.gcd(step, math.prod(shape[1:])) > 1:
        step += 1
    parts, first = [], 0
    for slab in slabs:
        parts.append(slab.reshape(-1)[first::step].copy())  # a view would keep the slab
        first = (first - slab.size) % step
    return np.concatenate(parts)


def _ends(values: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float]:
    low, high = (float(value) for value in np.percentile(values, percentiles))
    return low, high


def _within(values: np.ndarray, low: float, high: float) -> Window:
    clipped = np.clip(values, low, high).astype(np.float64)
    return Window(low, high, float(clipped.mean()), float(clipped.std()))
