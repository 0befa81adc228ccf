"""What a CT scanner makes of the synthetic abdomen."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from flap_nvflare.data.anatomy import Phase
from flap_nvflare.data.canvas import Canvas
from flap_nvflare.data.scanners import PhantomSite

# Contrast medium as the site gives it.
PHASE: Phase | None = None


def scan(canvas: Canvas, scanner: PhantomSite) -> np.ndarray:
    """Partial volume, calibration, correlated noise: (S, H, W) int16 HU."""
    rng = canvas.rng
    image = gaussian_filter(canvas.hu, (0.35, 0.6, 0.6))
    image = image * np.float32(scanner.scale) + np.float32(scanner.shift)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    noise = gaussian_filter(noise, (0, scanner.grain, scanner.grain))
    image += noise * (scanner.noise * rng.uniform(0.8, 1.25) / noise.std())
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)
