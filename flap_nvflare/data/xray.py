"""X-ray projections of the synthetic abdomen: a likeness, no film that a hospital takes.

Each slice is the projection along the slice axis through a slab of its neighbours, so that organs
lie over each other: attenuation by Beer and Lambert, scatter, quantum noise; dense is bright. The
mask stays that of the slice in the middle. Not modelled: a diverging beam, hardening, grids, dose
that follows the patient.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter1d

from flap_nvflare.data.anatomy import PHASES, Phase
from flap_nvflare.data.canvas import Canvas
from flap_nvflare.data.scanners import NOISE, PhantomSite

PHASE: Phase | None = PHASES["none"]

_SLAB = 60.0  # mm
_WATER = 0.02  # of the rays that a mm of water takes, at about 70 keV
_SCATTERED = 0.4  # share of what reaches the detector, from mm around
_SPREAD = 30.0
_QUANTA = 4000.0  # a pixel in air


def scan(canvas: Canvas, scanner: PhantomSite) -> np.ndarray:
    """The projections (S, H, W) int16, 0 to 4095."""
    rng = canvas.rng
    step, height, width = canvas.spacing
    mu = _WATER * np.clip(1 + canvas.hu / 1000, 0, None)
    slices = 2 * max(round(_SLAB / step / 2), 1) + 1
    path = uniform_filter1d(mu, slices, axis=0, mode="nearest") * _SLAB
    primary = np.exp(-path)
    around = gaussian_filter(primary, (0, _SPREAD / height, _SPREAD / width))
    signal = (1 - _SCATTERED) * primary + _SCATTERED * around
    quanta = _QUANTA * (NOISE / scanner.noise) ** 2
    counted = rng.poisson(quanta * signal) / quanta
    film = -np.log(np.maximum(counted, 1 / quanta)) * scanner.scale + 0.002 * scanner.shift
    return np.clip(np.rint(1200 * film + 200), 0, 4095).astype(np.int16)
