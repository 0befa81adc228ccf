"""What a magnetic resonance scanner makes of a map of tissues: a likeness, no physics of spins.

Modelled: a signal for each tissue in T1 and T2 weighting, its texture, partial volume, the smooth
multiplicative field of a coil (body, surface or endorectal) and of high field strength, Rician
noise with grain, and a grey scale that is each scan's own, since MR has no units. Not modelled:
motion, wrap-around, chemical shift, distortion beside gas, and how one echo differs from the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from scipy.ndimage import gaussian_filter

from flap_nvflare.data.canvas import Box, Canvas, Point
from flap_nvflare.data.errors import DataError

SEQUENCES = ("t1", "t2")


class Tissue(IntEnum):
    """What fills a voxel."""

    AIR = 0
    BONE = 1  # the cortex; there are no mobile protons in it
    MARROW = 2
    FAT = 3
    SKIN = 4
    MUSCLE = 5
    FLUID = 6  # cerebrospinal fluid, urine, the vitreous body
    GREY = 7
    WHITE = 8
    GLAND = 9
    FLOW = 10  # blood that has left the slice before its echo is read
    VEIN = 11
    WALL = 12  # of bladder and bowel, capsules, ligaments
    STOOL = 13
    PERIPHERAL = 14
    CENTRAL = 15
    NODULE = 16  # stroma; glandular ones are `PERIPHERAL` in signal
    VESICLE = 17


# T1 and T2 weighted, of 1 for the brightest: orders and ratios as they are at 1.5 to 3 T.
_SIGNALS = {
    Tissue.AIR: (0.0, 0.0),
    Tissue.BONE: (0.05, 0.05),
    Tissue.MARROW: (0.72, 0.46),
    Tissue.FAT: (1.0, 0.66),
    Tissue.SKIN: (0.4, 0.25),
    Tissue.MUSCLE: (0.42, 0.17),
    Tissue.FLUID: (0.16, 0.95),
    Tissue.GREY: (0.45, 0.42),
    Tissue.WHITE: (0.72, 0.32),
    Tissue.GLAND: (0.55, 0.5),
    Tissue.FLOW: (0.1, 0.08),
    Tissue.VEIN: (0.5, 0.7),
    Tissue.WALL: (0.34, 0.16),
    Tissue.STOOL: (0.5, 0.3),
    Tissue.PERIPHERAL: (0.36, 0.72),
    Tissue.CENTRAL: (0.36, 0.38),
    Tissue.NODULE: (0.34, 0.24),
    Tissue.VESICLE: (0.3, 0.85),
}


class TissueCanvas(Canvas):
    """A canvas on which tissues are painted.

    Attributes:
        tissue: (S, H, W) uint8, `Tissue` of each voxel, air at first.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
        rng: np.random.Generator,
    ) -> None:
        super().__init__(shape, spacing, rng)
        self.tissue = np.zeros(shape, dtype=np.uint8)

    def paint(self, box: Box, mask: np.ndarray, tissue: Tissue) -> None:
        """Writes a tissue where the mask of the box holds and room is."""
        self.tissue[box][mask & self.room[box]] = tissue

    def blob(
        self,
        centre: Point,
        radii: Point,
        tissue: Tissue,
        turn: np.ndarray | None = None,
        rough: float = 0.1,
    ) -> tuple[Box, np.ndarray]:
        """Paints an uneven ellipsoid; returns its box and its mask there, room or not."""
        box, field = self.ellipsoid(centre, radii, turn, rough)
        mask = field < 1
        self.paint(box, mask, tissue)
        return box, mask


@dataclass(frozen=True)
class MRScanner:
    """One scanner with its protocol.

    Attributes:
        sequence: weighting, one of `SEQUENCES`.
        contrast: exponent of the signals; above 1 bright tissues stand out more.
        bias: deviation of the logarithm of the smooth field; it grows with the field strength.
        centre: share by which the middle of the body is brighter than its skin, as at 3 T.
        surface: share of the signal that surface coils take from the middle of the body, 0 to 1.
        endorectal: signal beside an endorectal coil over that far away, less 1; 0 is none.
        noise: deviation of the noise as a share of the brightest tissue's signal.
        grain: correlation of the noise in pixels.
        blur: partial volume as deviation in pixels in the plane.
        gain: grey values of the brightest tissue, the middle of the scans.
        spread: scans' gains lie between `gain` / 2^spread and `gain` x 2^spread.

    Raises:
        DataError: on another sequence, or a number out of range.
    """

    sequence: str = "t1"
    contrast: float = 1.0
    bias: float = 0.12
    centre: float = 0.0
    surface: float = 0.0
    endorectal: float = 0.0
    noise: float = 0.04
    grain: float = 0.45
    blur: float = 0.55
    gain: float = 700.0
    spread: float = 0.6

    def __post_init__(self) -> None:
        if self.sequence not in SEQUENCES:
            raise DataError(f"sequence is {self.sequence!r}; give one of {SEQUENCES}")
        positive = ("contrast", "noise", "grain", "blur", "gain")
        for name in (*positive, "bias", "surface", "endorectal", "spread"):
            value = getattr(self, name)
            if not np.isfinite(value) or value < 0 or (name in positive and value == 0):
                raise DataError(f"{name} of a scanner is {value!r}; give a number from 0")
        if self.surface >= 1 or not -1 < self.centre < 10:
            raise DataError(
                f"surface is {self.surface!r} and centre {self.centre!r}; give shares below 1"
            )

    def exaggerated(self, difference: float) -> MRScanner:
        """The scanner with its distance to a typical one times `difference`; 0 makes all alike."""
        typical = MRScanner(self.sequence)

        def linear(name: str, low: float, high: float) -> float:
            usual = getattr(typical, name)
            return float(np.clip(usual + difference * (getattr(self, name) - usual), low, high))

        def ratio(name: str) -> float:
            usual = getattr(typical, name)
            return float(usual * (getattr(self, name) / usual) ** difference)

        return replace(
            self,
            contrast=ratio("contrast"),
            bias=linear("bias", 0.0, 1.0),
            centre=linear("centre", -0.5, 3.0),
            surface=linear("surface", 0.0, 0.9),
            endorectal=linear("endorectal", 0.0, 60.0),
            noise=min(ratio("noise"), 0.5),
            grain=min(ratio("grain"), 3.0),
            blur=min(ratio("blur"), 3.0),
            gain=float(np.clip(ratio("gain"), 40.0, 8000.0)),
        )


def signal_of(canvas: TissueCanvas, scanner: MRScanner) -> np.ndarray:
    """Signal (S, H, W) float32 of the tissues, 0 to about 1, with what differs in one patient."""
    rng = canvas.rng
    column = SEQUENCES.index(scanner.sequence)
    plain = np.array([_SIGNALS[tissue][column] for tissue in Tissue]) ** scanner.contrast
    plain *= np.exp(0.07 * rng.standard_normal(len(plain)))
    signal = plain.astype(np.float32)[canvas.tissue]
    fine = canvas.noise((14, 40, 40), 0.05)
    signal *= np.maximum(1 + 0.04 * canvas.rough + fine, 0.2)
    return signal


def acquire(
    signal: np.ndarray,
    spacing: tuple[float, float, float],
    scanner: MRScanner,
    rng: np.random.Generator,
    coil: Point | None = None,
) -> np.ndarray:
    """The scan of a body.

    Args:
        signal: (S, H, W), what the tissues send, the brightest about 1.
        spacing: mm along these axes.
        scanner: coil, noise, resolution and grey scale.
        rng: source of everything random.
        coil: (z, y, x) of an endorectal coil in mm from the centre of the grid; the coil's part
            is left out without it.

    Returns:
        (S, H, W) int16, 0 and more.
    """
    blurred = gaussian_filter(signal, (0.3, scanner.blur, scanner.blur)).astype(np.float32)
    blurred *= _sensitivity(signal.shape, spacing, scanner, rng, coil)
    deviation = scanner.noise * rng.uniform(0.8, 1.25)
    real, imaginary = (_noise(signal.shape, scanner.grain, rng) * deviation for _ in range(2))
    magnitude = np.hypot(blurred + real, imaginary)
    gain = scanner.gain * 2.0 ** rng.uniform(-scanner.spread, scanner.spread)
    return np.clip(np.rint(magnitude * np.float32(gain)), 0, 32767).astype(np.int16)


def _sensitivity(
    shape: tuple[int, ...],
    spacing: tuple[float, float, float],
    scanner: MRScanner,
    rng: np.random.Generator,
    coil: Point | None,
) -> np.ndarray:
    """The smooth field (S, H, W) float32 that multiplies the signal; its mean is about 1."""
    unit = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    z, y, x = unit[0][:, None, None], unit[1][None, :, None], unit[2][None, None, :]
    middle = 1 - (y * y + x * x)  # 1 on the axis of the body, 0 at the edges of the plane
    waves = (z, y, x, z * y, z * x, y * x, z * z, y * y - x * x)
    weights = rng.standard_normal(len(waves)).astype(np.float32)
    smooth = sum((w * wave for w, wave in zip(weights, waves, strict=True)), np.float32(0))
    smooth = smooth + np.zeros(shape, np.float32)
    field = np.exp(scanner.bias * (smooth - smooth.mean()) / max(float(smooth.std()), 1e-6))
    field *= (1 + scanner.centre * middle) * (1 - scanner.surface * np.clip(middle, 0, 1))
    field /= field.mean()
    if scanner.endorectal and coil is not None:
        squares = np.float32(0)
        for axis, (n, step, place) in enumerate(zip(shape, spacing, coil, strict=True)):
            away = (np.arange(n, dtype=np.float32) - (n - 1) / 2) * step - place
            # A rod along the body: longer than it is thick.
            away = np.maximum(np.abs(away) - (20 if axis == 0 else 0), 0).astype(np.float32)
            squares = squares + (away**2).reshape([-1 if a == axis else 1 for a in range(3)])
        field *= 1 + np.float32(scanner.endorectal) / (1 + squares / np.float32(22.0**2)) ** 1.5
    return np.asarray(field, dtype=np.float32)


def _noise(shape: tuple[int, ...], grain: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of deviation 1, correlated over `grain` pixels in the plane."""
    white = rng.standard_normal(shape, dtype=np.float32)
    smooth: np.ndarray = gaussian_filter(white, (0, grain, grain))
    return smooth / smooth.std()
