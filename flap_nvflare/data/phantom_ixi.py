"""Synthetic T1 scans of heads from three hospitals, in the layout of FLamby's IXI Tiny.

    ROOT/metadata_tiny.csv
    ROOT/IXI_sample/IXI012-HH-1211/T1/IXI012-HH-1211-T1.nii.gz
    ROOT/IXI_sample/IXI012-HH-1211/label/IXI012-HH-1211-label.nii.gz

No patient's data: heads are drawn from a seed. The hospital is in the patient's name; the mask is
the brain. Slices are thick so that a scan is read in no time; the files hold the axes in the order
of IXI's own, which is none of the others'.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from functools import partial

import numpy as np

from flap_nvflare.data.brain import paint_head
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.ixi import COLUMNS, HOSPITALS, TABLE
from flap_nvflare.data.mr import MRScanner, TissueCanvas, acquire, signal_of
from flap_nvflare.data.phantom_files import Drawn, PhantomCase, PhantomFolder
from flap_nvflare.data.phantoms import FIRST_TEST, Phantoms, refuse_kits_knobs

VERSION = 1
FOLDER = "IXI_sample"
_AXES = "PSR"
_SLICES, _SIDE = 26, 112
_MOST = 166  # numbers of patients have three digits


@dataclass(frozen=True)
class HeadSite:
    """One synthetic hospital.

    Attributes:
        train, test: number of cases.
        scanner: of all its scans.
    """

    train: int
    test: int
    scanner: MRScanner


# Guy's and IOP have 1.5 T, Hammersmith 3 T with its uneven field.
HEAD_SITES = {
    "Guys": HeadSite(5, 3, MRScanner("t1", 1.0, 0.12, noise=0.045, grain=0.5, gain=620)),
    "HH": HeadSite(
        4, 2, MRScanner("t1", 1.25, 0.3, centre=0.45, noise=0.025, grain=0.35, gain=1500)
    ),
    "IOP": HeadSite(
        3, 2, MRScanner("t1", 0.75, 0.16, surface=0.3, noise=0.06, grain=0.7, blur=0.8, gain=260)
    ),
}


def head_case(site: str, index: int, seed: int, difference: float = 1.0) -> Drawn:
    """One case: scan (S, H, W) int16, mask (S, H, W) uint8, affine (4, 4).

    Args:
        site: one of `HEAD_SITES`.
        index: of the case in its site; test cases count from `phantoms.FIRST_TEST`.
        seed: of the phantoms.
        difference: see `MRScanner.exaggerated`.
    """
    scanner = HEAD_SITES[site].scanner.exaggerated(difference)
    rng = np.random.default_rng([VERSION, seed, HOSPITALS.index(site), index])
    step, pixel = rng.uniform(6.2, 6.8), rng.uniform(2.0, 2.2)
    canvas = TissueCanvas((_SLICES, _SIDE, _SIDE), (step, pixel, pixel), rng)
    paint_head(canvas)
    scan = acquire(signal_of(canvas, scanner), canvas.spacing, scanner, rng)
    return scan, canvas.label, canvas.affine


def phantom_folder(phantoms: Phantoms) -> PhantomFolder:
    """All cases and the table."""
    refuse_kits_knobs(phantoms, HEAD_SITES)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    cases: list[PhantomCase] = []
    for site in HEAD_SITES:
        for patient, split, index in _patients(site, phantoms):
            writer.writerow([patient, HOSPITALS.index(site), split])
            name = f"IXI{patient:03d}-{site}-{700 + patient:04d}"
            draw = partial(head_case, site, index, phantoms.seed, phantoms.difference)
            image = f"{FOLDER}/{name}/T1/{name}-T1.nii.gz"
            label = f"{FOLDER}/{name}/label/{name}-label.nii.gz"
            cases.append(PhantomCase(site, image, label, draw, _AXES))
    return PhantomFolder(
        version=VERSION,
        sites=tuple(HEAD_SITES),
        cases=tuple(cases),
        tables={TABLE: text.getvalue().encode()},
        names=frozenset(name for case in cases for name in (case.image, case.label)),
    )


def _patients(site: str, phantoms: Phantoms) -> list[tuple[int, str, int]]:
    """Number of the patient, split, and number in the site, of each case.

    Odd patients are for training, even ones for testing, so that more cases rename no other.
    """
    train, test = phantoms.train or HEAD_SITES[site].train, phantoms.test or HEAD_SITES[site].test
    if max(train, test) > _MOST:
        raise DataError(
            f"train is {train} and test {test}; of this layout give at most {_MOST} each"
        )
    first = 1 + 2 * HOSPITALS.index(site)
    step = 2 * len(HOSPITALS)
    return [(first + step * place, "train", place) for place in range(train)] + [
        (first + 1 + step * place, "test", FIRST_TEST + place) for place in range(test)
    ]
