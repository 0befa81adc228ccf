"""The grey values of a site: which HU the network sees, and how they are scaled.

As nnU-Net and Fed-KiTS2019 do, the window is read off the foreground of the training cases: clip
to its 0.5 and 99.5 percentiles, then z-score by mean and deviation of the clipped foreground.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.volume import Volume

PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Window:
    """Clip to [low, high] HU, then subtract `mean` and divide by `std` (HU).

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
                f"window {values} (low, high, mean, std in HU) cannot be used; expected finite "
                f"values, low < high and std > 0"
            )

    def apply(self, image: np.ndarray) -> np.ndarray:
        """HU of any shape -> float32 of that shape, about 0 +- 1 in the foreground."""
        clipped = np.clip(image, np.float32(self.low), np.float32(self.high))
        scaled: np.ndarray = (clipped - np.float32(self.mean)) / np.float32(self.std)
        return scaled.astype(np.float32, copy=False)

    def shown(self, image: np.ndarray) -> np.ndarray:
        """HU as grey values for a picture: 0 and 1 are the window's ends, not clipped."""
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
    low, high = (float(value) for value in np.percentile(foreground, PERCENTILES))
    if low >= high:
        raise DataError(
            f"the foreground of the training cases {names} has one value, {low:g} HU; "
            f"check that scans and masks belong together"
        )
    clipped = np.clip(foreground, low, high).astype(np.float64)
    return Window(low, high, float(clipped.mean()), float(clipped.std()))
