"""T1-weighted magnetic resonance of the synthetic abdomen: a likeness, no physics of spins.

Tissues are told apart by the HU that they are painted with, without contrast medium, and each gets
a signal: fat is bright, fluid, moving blood and bone dark, the cortex of the kidney brighter than
its medulla, tumours as bright as the cortex or darker. Coil, field strength and noise are those of
`data.mr`. Not modelled: motion, chemical shift, fat saturation, contrast medium.
"""

from __future__ import annotations

import numpy as np

from flap_nvflare.data.anatomy import TELLING, Phase
from flap_nvflare.data.canvas import Canvas
from flap_nvflare.data.mr import MRScanner, acquire
from flap_nvflare.data.scanners import NOISE, PhantomSite

PHASE: Phase | None = TELLING

# HU as painted and the signal there, of 1 for fat: neither rises with the other.
_SIGNALS = (
    (-200, 0.0),  # air, gas, the table
    (-150, 0.95),
    (-104, 1.0),
    (-80, 0.95),
    (-30, 0.6),  # strands and fat of the renal sinus with vessels in it
    (-5, 0.2),
    (12, 0.14),  # urine, bile, cysts
    (30, 0.2),  # blood
    (45, 0.4),  # muscle
    (62, 0.4),
    (72, 0.35),  # spleen, clear cell tumours
    (92, 0.37),  # medulla
    (104, 0.45),
    (118, 0.54),  # cortex
    (145, 0.6),  # liver
    (230, 0.7),  # marrow
    (290, 0.15),
    (330, 0.04),  # cortical bone
)


def scan(canvas: Canvas, scanner: PhantomSite) -> np.ndarray:
    """The scan (S, H, W) int16, 0 and more, on a grey scale of its own."""
    places, signals = np.array(_SIGNALS).T
    signal = np.interp(canvas.hu, places, signals).astype(np.float32) ** scanner.contrast
    signal *= np.maximum(1 + 0.03 * canvas.rough + canvas.noise((14, 40, 40), 0.04), 0.2)
    return acquire(signal, canvas.spacing, mr_scanner(scanner), canvas.rng)


def mr_scanner(scanner: PhantomSite) -> MRScanner:
    """The MR scanner of a site, as far from a typical one as its CT scanner is.

    What makes a CT scanner noisy or ill calibrated stands for noise, coil and grey scale here.
    """
    return MRScanner(
        sequence="t1",
        bias=float(np.clip(0.12 + 0.004 * scanner.shift, 0.0, 1.0)),
        surface=float(np.clip(0.012 * abs(scanner.shift), 0.0, 0.8)),
        noise=float(np.clip(0.04 * scanner.noise / NOISE, 0.002, 0.5)),
        grain=float(np.clip(0.7 * scanner.grain, 0.1, 3.0)),
        gain=float(np.clip(700.0 * scanner.scale**6, 40.0, 8000.0)),
    )
