"""A site's intensity window: which Hounsfield units its kidneys and tumours occupy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from flap_nvflare.data.kits import DataError
from flap_nvflare.data.volume import Volume

PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Window:
    """Clip to [low, high], subtract `mean`, divide by `std`; all in Hounsfield units."""

    low: float
    high: float
    mean: float
    std: float

    def __post_init__(self) -> None:
        finite = all(math.isfinite(v) for v in (self.low, self.high, self.mean, self.std))
        if not (finite and self.low < self.high and self.std > 0):
            raise DataError(f"{self}: expected finite numbers with low < high and std > 0")

    def apply(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """The z-score of the clipped image, float32, same shape."""
        clipped = np.clip(image, np.float32(self.low), np.float32(self.high))
        scored: NDArray[np.float32] = (clipped - np.float32(self.mean)) / np.float32(self.std)
        return scored


# Published foreground windows of the six Fed-KiTS sites, HU (arXiv 2407.21739, authors' setting).
KITS_WINDOWS = MappingProxyType(
    {
        "A": Window(-66, 208, 100.5, 61.7),
        "B": Window(-77, 341, 110.7, 84.0),
        "C": Window(-89, 325, 123.7, 97.3),
        "D": Window(-64, 202, 71.1, 53.0),
        "E": Window(-64, 236, 91.4, 61.0),
        "F": Window(-82, 288, 105.3, 76.5),
    }
)


def foreground_window(volumes: Sequence[Volume]) -> Window:
    """The window of the voxels with a label above 0, over all volumes together.

    Args:
        volumes: a site's training cases; never its test cases.

    Returns:
        The 0.5 and 99.5 percentiles and the mean and standard deviation between them (clipped).

    Raises:
        DataError: if no volume shows foreground, or all its voxels are equal.
    """
    parts = [volume.image[volume.label > 0] for volume in volumes]
    if not parts or not any(part.size for part in parts):
        names = ", ".join(volume.name for volume in volumes) or "none given"
        raise DataError(
            f"no training case shows foreground ({names}); check the masks or give a window"
        )
    foreground = np.concatenate(parts).astype(np.float64)
    low, high = np.percentile(foreground, PERCENTILES)
    if not low < high:
        raise DataError(
            f"the foreground of {', '.join(volume.name for volume in volumes)} has one value, "
            f"{low:g} HU; check the scans"
        )
    clipped = foreground.clip(low, high)
    return Window(float(low), float(high), float(clipped.mean()), float(clipped.std()))
