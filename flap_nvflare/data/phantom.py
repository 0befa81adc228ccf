"""Synthetic abdominal CTs of six hospitals, in exactly the layout of KiTS19.

No patient's data: shapes are drawn from a seed. They serve the demo and the tests; Dice on them
says nothing about patients. Same seed, same bytes. Several processes may write different sites
into one folder at the same time.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from flap_nvflare.data.anatomy import (
    PHASES,
    paint_body,
    paint_bowel,
    paint_organs,
    paint_spine,
    paint_vessels,
)
from flap_nvflare.data.canvas import Canvas
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.kidney import paint_kidneys, paint_look_alikes, paint_tumour
from flap_nvflare.data.kits import IMAGE, LABEL, TABLE
from flap_nvflare.data.phantom_files import PhantomCase, PhantomFolder, write_folder

VERSION = 2
_SIDE = 128


@dataclass(frozen=True)
class PhantomSite:
    """One synthetic hospital.

    Attributes:
        train, test: number of cases.
        phases: contrast phases of its scans, drawn evenly (see `anatomy.PHASES`). A small site
            keeps to one protocol: its few training cases must show what its test cases do.
        contrast: share of the phase's contrast that arrives, 0 to 1.
        noise: deviation of the noise in HU.
        grain: correlation of the noise in pixels.
        shift, scale: HU = scale * HU + shift, a scanner out of calibration.
        in_plane, slice_spacing: ranges in mm; the field of view is set close around the body.
        tumours: share of the cases with a tumour; the first training and the first test case
            always have one.
    """

    train: int
    test: int
    phases: tuple[str, ...]
    contrast: float
    noise: float
    grain: float
    shift: float
    scale: float
    in_plane: tuple[float, float]
    slice_spacing: tuple[float, float]
    tumours: float

    def exaggerated(self, difference: float) -> PhantomSite:
        """The scanner with its distance to a typical one times `difference`; 0 makes all alike."""

        def linear(value: float, typical: float) -> float:
            return typical + difference * (value - typical)

        return replace(
            self,
            contrast=max(linear(self.contrast, 1.0), 0.1),
            noise=_NOISE * (self.noise / _NOISE) ** difference,
            grain=_GRAIN * (self.grain / _GRAIN) ** difference,
            shift=linear(self.shift, 0.0),
            scale=max(linear(self.scale, 1.0), 0.1),
        )


# Of a typical scanner: the geometric means over the sites below.
_NOISE, _GRAIN = 13.8, 0.63

PHANTOM_SITES = {
    "A": PhantomSite(4, 2, ("venous",), 0.9, 12, 0.6, 0, 1.0, (2.35, 2.5), (4.5, 5.0), 0.9),
    "B": PhantomSite(5, 2, ("arterial",), 1.0, 17, 0.4, 12, 1.06, (2.35, 2.6), (4.0, 5.0), 0.85),
    "C": PhantomSite(4, 2, ("arterial",), 1.15, 9, 0.9, -8, 1.1, (2.3, 2.45), (4.0, 4.5), 1.0),
    "D": PhantomSite(3, 2, ("venous",), 0.8, 14, 0.8, 5, 0.95, (2.4, 2.6), (5.0, 6.0), 0.8),
    "E": PhantomSite(5, 2, ("venous",), 0.75, 19, 0.5, 25, 0.92, (2.45, 2.6), (4.5, 6.0), 0.8),
    "F": PhantomSite(
        8, 3, ("arterial", "venous", "late"), 0.95, 14, 0.7, -15, 1.0, (2.3, 2.6), (3.5, 5.5), 0.85
    ),
}


def write_phantom(
    root: Path | str,
    seed: int = 0,
    sites: Iterable[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    difference: float = 1.0,
) -> Path:
    """Writes the cases of some sites that are not there yet, and the table of all sites.

    Args:
        root: folder, made if missing; empty, or of an earlier call with the same seed.
        seed: of everything random.
        sites: letters out of `PHANTOM_SITES`; None means all.
        progress: called with (cases done, cases in all) after each case.
        difference: how far the scanners are from each other, see `PhantomSite.exaggerated`.

    Returns:
        The folder.

    Raises:
        DataError: if the folder holds anything else, or phantoms of another version or seed, or
            if a site is unknown.
    """
    folder = Path(root)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise DataError(f"seed is {seed!r}; give a whole number from 0")
    if not 0.0 <= difference <= 10.0:
        raise DataError(f"difference is {difference!r}; give a number from 0 to 10")
    values: dict[str, object] = {"seed": seed}
    if difference != 1.0:
        values["difference"] = difference
    write_folder(folder, _content(seed, difference), values, sites, progress)
    return folder


def phantom_case(
    site: str, index: int, seed: int, difference: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One case: scan (S, H, W) int16 HU, mask (S, H, W) uint8, affine (4, 4).

    Args:
        site: letter out of `PHANTOM_SITES`.
        index: of the case in its site, training cases first.
        seed: of the phantoms.
        difference: see `PhantomSite.exaggerated`.
    """
    scanner = PHANTOM_SITES[site]
    if difference != 1.0:  # rounding would change the bytes
        scanner = scanner.exaggerated(difference)
    rng = np.random.default_rng([VERSION, seed, ord(site), index])
    step, pixel = rng.uniform(*scanner.slice_spacing), rng.uniform(*scanner.in_plane)
    slices = int(np.clip(round(rng.uniform(125, 150) / step), 24, 32))
    canvas = Canvas((slices, _SIDE, _SIDE), (step, pixel, pixel), rng)
    phase = PHASES[str(rng.choice(scanner.phases))].diluted(scanner.contrast * rng.uniform(0.85, 1))
    build = paint_body(canvas, _SIDE * pixel)
    paint_bowel(canvas, build)
    paint_organs(canvas, build, phase)
    paint_spine(canvas, build)
    paint_vessels(canvas, build, phase)
    kidneys = paint_kidneys(canvas, build, phase)
    paint_look_alikes(canvas, kidneys, phase)
    if index in (0, scanner.train) or rng.random() < scanner.tumours:
        for _ in range(1 + int(rng.random() < 0.15)):
            paint_tumour(canvas, kidneys[int(rng.integers(len(kidneys)))], phase)
    return _scan(canvas, scanner), canvas.label, np.diag([-step, -pixel, -pixel, 1.0])[[2, 1, 0, 3]]


def _scan(canvas: Canvas, scanner: PhantomSite) -> np.ndarray:
    """What the scanner makes of the body: partial volume, calibration, correlated noise."""
    rng = canvas.rng
    image = gaussian_filter(canvas.hu, (0.35, 0.6, 0.6))
    image = image * np.float32(scanner.scale) + np.float32(scanner.shift)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    noise = gaussian_filter(noise, (0, scanner.grain, scanner.grain))
    image += noise * (scanner.noise * rng.uniform(0.8, 1.25) / noise.std())
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def _content(seed: int, difference: float) -> PhantomFolder:
    """All cases and the table; the numbers of the cases run through the sites."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case_ids", "site_ids", "train_test_split", "train_test_split_silo"])
    cases: list[PhantomCase] = []
    for number, (site, scanner) in enumerate(PHANTOM_SITES.items()):
        for index in range(scanner.train + scanner.test):
            name = f"case_{len(cases):05d}"
            split = "train" if index < scanner.train else "test"
            writer.writerow([name, number, split, f"{split}_{number}"])
            draw = partial(phantom_case, site, index, seed, difference)
            cases.append(PhantomCase(site, f"{name}/{IMAGE}", f"{name}/{LABEL}", draw))
    return PhantomFolder(
        version=VERSION,
        sites=tuple(PHANTOM_SITES),
        cases=tuple(cases),
        tables={TABLE: text.getvalue().encode()},
        names=frozenset(case.image.partition("/")[0] for case in cases),
    )
