"""Ultrasound of the synthetic abdomen, from the back: a likeness, no physics of waves.

A curved probe lies on the skin of the back to each side of the spine, as for a patient on the
belly, and sees a fan; each gives its half of the picture. Along each beam: echoes of the tissues,
bright ones where tissues meet, attenuation, shadows behind bone and gas, brighter tissue behind
fluid, speckle that widens with the depth, compression of the echoes to decibels. Not modelled:
refraction, reverberation, side lobes, the thickness of the plane, several foci, a probe that
presses the body flat. Kidneys in a shadow stay in the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_fill_holes, gaussian_filter, map_coordinates

from flap_nvflare.data.anatomy import TELLING, Phase
from flap_nvflare.data.canvas import Canvas
from flap_nvflare.data.scanners import GRAIN, NOISE, PhantomSite

PHASE: Phase | None = TELLING

# HU as painted and the echo of the tissue there in decibels.
_ECHOES = (
    (-400, -60),
    (-150, -20),
    (-104, -15),  # fat
    (-60, -10),  # renal sinus
    (-30, -14),
    (-5, -50),
    (12, -58),  # urine, bile, cysts
    (30, -50),  # blood
    (45, -30),  # muscle
    (62, -28),
    (72, -24),  # spleen, clear cell tumours
    (92, -36),  # medulla
    (104, -31),
    (118, -28),  # cortex
    (145, -23),  # liver
    (230, -20),
    (330, -8),  # bone
)
# Decibels that a mm of tissue takes there and back, less what the machine makes up for.
_TAKEN = (
    (-500, 12.0),  # gas
    (-250, 0.2),
    (-30, 0.2),
    (0, 0.0),  # fluid
    (30, 0.04),
    (45, 0.16),
    (250, 0.2),
    (320, 6.0),  # bone
)

_GEL = -2000.0  # stands for no tissue at all
_APART = 56.0  # mm from the middle to each probe
_BEAMS, _HALF_ANGLE = 144, 0.8  # rad to each side
_RADIUS = 45.0  # mm from the centre of a probe's curve to the skin
_STEP, _DEPTH = 1.0, 170.0  # mm along a beam
_RANGE = 55.0  # decibels from black to white


@dataclass(frozen=True)
class _Probe:
    """Where a probe lies in a slice: mm from its middle.

    Attributes:
        x: to the patient's left.
        y: of the centre of its curve, behind the skin.
    """

    x: float
    y: float


def scan(canvas: Canvas, scanner: PhantomSite) -> np.ndarray:
    """The pictures (S, H, W) int16, 0 to 255; 0 outside the fans."""
    rng = canvas.rng
    gain = 5.0 + 0.15 * scanner.shift + rng.uniform(-3, 3)
    slope = 0.03 / scanner.contrast
    grain = float(np.clip(scanner.grain / GRAIN, 0.3, 4.0))
    rough = float(np.clip(scanner.noise / NOISE, 0.2, 4.0))
    middle = canvas.shape[2] // 2
    halves = slice(0, middle), slice(middle, None)
    pictures = np.zeros(canvas.shape, dtype=np.float32)
    for painted, picture in zip(canvas.hu, pictures, strict=True):
        # Outside the body is gel: it sends nothing and takes nothing. Gas lies in holes of it.
        hu = np.where(binary_fill_holes(painted > -200), painted, _GEL)
        for x, half in zip((-_APART, _APART), halves, strict=True):
            probe = _on_skin(hu, canvas.spacing, x)
            echoes = _echoes(_beams(hu, canvas.spacing, probe), slope, grain, rough, rng)
            picture[:, half] = _fan(echoes + gain, canvas, probe)[:, half]
    return np.clip(np.rint(pictures), 0, 255).astype(np.int16)


def _on_skin(hu: np.ndarray, spacing: tuple[float, float, float], x: float) -> _Probe:
    column = round(x / spacing[2] + (hu.shape[1] - 1) / 2)
    last = np.flatnonzero(hu[:, column] != _GEL)[-1]
    return _Probe(x, float((last - (hu.shape[0] - 1) / 2) * spacing[1]) + _RADIUS)


def _beams(hu: np.ndarray, spacing: tuple[float, float, float], probe: _Probe) -> np.ndarray:
    """HU along the beams, (beams, depths)."""
    angles = np.linspace(-_HALF_ANGLE, _HALF_ANGLE, _BEAMS)[:, None]
    reach = _RADIUS + np.arange(0, _DEPTH, _STEP)[None]
    y, x = probe.y - reach * np.cos(angles), probe.x + reach * np.sin(angles)
    places = [
        mm / step + (size - 1) / 2
        for mm, step, size in zip((y, x), spacing[1:], hu.shape, strict=True)
    ]
    return np.asarray(map_coordinates(hu, places, order=0, mode="constant", cval=_GEL))


def _echoes(
    hu: np.ndarray, slope: float, grain: float, rough: float, rng: np.random.Generator
) -> np.ndarray:
    """Decibels of what comes back, (beams, depths).

    Args:
        hu: along the beams.
        slope: decibels a mm on top of what the tissue takes.
        grain: size of the speckle, of 1 for a typical machine.
        rough: exponent of the speckle, 1 where it is fully developed.
        rng: of the speckle.
    """
    inside = hu != _GEL
    echo = 10 ** (np.interp(hu, *np.array(_ECHOES).T) / 20)
    taken = np.where(inside, np.interp(hu, *np.array(_TAKEN).T) + slope, 0.0)
    taken = np.cumsum(taken, axis=1) * _STEP
    # Where tissues meet square to the beam; smoothed, so that no edge is thinner than a pulse.
    edges = np.abs(np.diff(np.where(inside, hu, 0.0), axis=1, prepend=0.0))
    edges = gaussian_filter(1.5 * np.tanh(edges / 400) ** 1.5, (1.5, 1.2))
    size = (1.6 * grain, 0.8 * grain)
    real, imaginary = (gaussian_filter(rng.standard_normal(hu.shape), size) for _ in range(2))
    rayleigh = np.hypot(real, imaginary)
    rayleigh = (rayleigh / rayleigh.mean()) ** rough
    amplitude = np.where(inside, echo * rayleigh + edges, 0.0)
    # An echo from gas or bone itself comes back before the shadow begins.
    before = np.concatenate([np.zeros_like(taken[:, :1]), taken[:, :-1]], axis=1)
    decibels: np.ndarray = 20 * np.log10(amplitude + 1e-6) - before
    return decibels


def _fan(decibels: np.ndarray, canvas: Canvas, probe: _Probe) -> np.ndarray:
    """The beams on the grid of the slice, (H, W), 0 to 255."""
    height, width = canvas.shape[1:]
    y = (np.arange(height) - (height - 1) / 2)[:, None] * canvas.spacing[1]
    x = (np.arange(width) - (width - 1) / 2)[None] * canvas.spacing[2]
    along, across = probe.y - y, x - probe.x
    beam = (np.arctan2(across, along) / _HALF_ANGLE + 1) / 2 * (_BEAMS - 1)
    depth = (np.hypot(across, along) - _RADIUS) / _STEP
    grey = 255 * np.clip(1 + decibels / _RANGE, 0, 1)
    return np.asarray(map_coordinates(grey, [beam, depth], order=1, mode="constant", cval=0.0))
