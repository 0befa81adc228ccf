"""Synthetic T2 scans of pelves from six hospitals, in the layout of the SAML prostate set.

    ROOT/RUNMC/Case03.nii.gz
    ROOT/RUNMC/Case03_segmentation.nii.gz
    ROOT/BMC/Case03_Segmentation.nii.gz

No patient's data: pelves are drawn from a seed. As in the real set some hospitals label two zones
of the prostate, others the whole as 1, two had a coil in the rectum, and the numbers of the test
cases are the published ones. Which zone is 1 does not matter: a reader takes both as one class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import numpy as np

from flap_nvflare.data.errors import DataError
from flap_nvflare.data.mr import MRScanner, TissueCanvas, acquire, signal_of
from flap_nvflare.data.pelvis import PERIPHERAL, paint_pelvis
from flap_nvflare.data.phantom_files import Drawn, PhantomCase, PhantomFolder
from flap_nvflare.data.phantoms import FIRST_TEST, Phantoms, refuse_kits_knobs
from flap_nvflare.data.prostate import TEST_CASES

VERSION = 1
_AXES = "LPS"
_SIDE = 112
_MOST_TRAIN = 80  # numbers of cases have two digits


@dataclass(frozen=True)
class PelvisSite:
    """One synthetic hospital.

    Attributes:
        train, test: number of cases.
        scanner: of all its scans.
        in_plane, slice_spacing: ranges in mm.
        zones: whether its masks tell the zones of the prostate apart.
        ending: what its masks' names add to the scans'.
    """

    train: int
    test: int
    scanner: MRScanner
    in_plane: tuple[float, float]
    slice_spacing: tuple[float, float]
    zones: bool = False
    ending: str = "_segmentation"


PELVIS_SITES = {
    "RUNMC": PelvisSite(
        5,
        2,
        MRScanner("t2", 1.0, 0.2, centre=-0.1, surface=0.25, noise=0.04, gain=420),
        (1.4, 1.55),
        (3.6, 4.0),
        zones=True,
    ),
    "BMC": PelvisSite(
        4,
        2,
        MRScanner("t2", 1.1, 0.12, endorectal=8.0, noise=0.025, gain=150),
        (1.4, 1.6),
        (3.0, 3.6),
        zones=True,
        ending="_Segmentation",
    ),
    "I2CVB": PelvisSite(
        4,
        2,
        MRScanner("t2", 1.25, 0.28, centre=0.35, noise=0.03, grain=0.35, gain=260),
        (1.45, 1.6),
        (3.0, 3.5),
    ),
    "UCL": PelvisSite(
        3,
        2,
        MRScanner("t2", 0.8, 0.15, noise=0.06, grain=0.7, blur=0.75, gain=900),
        (1.5, 1.65),
        (3.2, 3.6),
    ),
    "BIDMC": PelvisSite(
        3,
        2,
        MRScanner("t2", 0.95, 0.22, endorectal=14.0, noise=0.02, blur=0.5, gain=2200),
        (1.4, 1.5),
        (2.6, 3.2),
    ),
    "HK": PelvisSite(
        3,
        2,
        MRScanner("t2", 0.9, 0.14, surface=0.45, noise=0.075, grain=0.5, gain=640),
        (1.5, 1.6),
        (3.4, 4.0),
    ),
}


def pelvis_case(site: str, index: int, seed: int, difference: float = 1.0) -> Drawn:
    """One case: scan (S, H, W) int16, mask (S, H, W) uint8, affine (4, 4).

    Args:
        site: one of `PELVIS_SITES`.
        index: of the case in its site; test cases count from `phantoms.FIRST_TEST`.
        seed: of the phantoms.
        difference: see `MRScanner.exaggerated`.
    """
    hospital = PELVIS_SITES[site]
    scanner = hospital.scanner.exaggerated(difference)
    rng = np.random.default_rng([VERSION, seed, list(PELVIS_SITES).index(site), index])
    step, pixel = rng.uniform(*hospital.slice_spacing), rng.uniform(*hospital.in_plane)
    slices = int(np.clip(round(rng.uniform(72, 80) / step), 20, 26))
    canvas = TissueCanvas((slices, _SIDE, _SIDE), (step, pixel, pixel), rng)
    coil = paint_pelvis(canvas, coil=scanner.endorectal > 0)
    scan = acquire(signal_of(canvas, scanner), canvas.spacing, scanner, rng, coil)
    label = canvas.label if hospital.zones else (canvas.label > 0) * np.uint8(PERIPHERAL)
    return scan, label, canvas.affine


def phantom_folder(phantoms: Phantoms) -> PhantomFolder:
    """All cases; this layout has no table."""
    refuse_kits_knobs(phantoms, PELVIS_SITES)
    cases: list[PhantomCase] = []
    for site, hospital in PELVIS_SITES.items():
        for number, index in _numbers(site, hospital, phantoms):
            draw = partial(pelvis_case, site, index, phantoms.seed, phantoms.difference)
            name = f"{site}/Case{number:02d}"
            label = f"{name}{hospital.ending}.nii.gz"
            cases.append(PhantomCase(site, f"{name}.nii.gz", label, draw, _AXES))
    return PhantomFolder(
        version=VERSION,
        sites=tuple(PELVIS_SITES),
        cases=tuple(cases),
        tables={},
        names=frozenset(name for case in cases for name in (case.image, case.label)),
    )


def _numbers(site: str, hospital: PelvisSite, phantoms: Phantoms) -> list[tuple[int, int]]:
    """Number in the file's name, and in the site, of each case."""
    train, test = phantoms.train or hospital.train, phantoms.test or hospital.test
    if train > _MOST_TRAIN or test > len(TEST_CASES[site]):
        raise DataError(
            f"train is {train} and test {test}; site {site} has at most {_MOST_TRAIN} training and "
            f"{len(TEST_CASES[site])} test cases, the published ones"
        )
    free = islice((number for number in count() if number not in TEST_CASES[site]), train)
    tested = enumerate(TEST_CASES[site][:test], start=FIRST_TEST)
    return [
        *((number, index) for index, number in enumerate(free)),
        *((number, index) for index, number in tested),
    ]
