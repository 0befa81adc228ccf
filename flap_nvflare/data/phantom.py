"""Synthetic scans of the abdomen, CTs of six hospitals unless asked otherwise, as KiTS19 lays out.

No patient's data: shapes are drawn from a seed. They serve the demo and the tests; Dice on them
says nothing about patients. Same seed, same bytes. Several processes may write different sites
into one folder at the same time.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np

from flap_nvflare.data.anatomy import (
    PHASES,
    paint_body,
    paint_bowel,
    paint_organs,
    paint_spine,
    paint_vessels,
)
from flap_nvflare.data.canvas import Canvas
from flap_nvflare.data.kidney import paint_kidneys, paint_look_alikes, paint_tumour
from flap_nvflare.data.kits import IMAGE, LABEL, TABLE
from flap_nvflare.data.phantom_files import PhantomCase, PhantomFolder
from flap_nvflare.data.phantoms import FIRST_TEST, MODALITIES, Phantoms, write_phantoms
from flap_nvflare.data.scanners import (
    PHANTOM_SITES,
    numbered_sites,
    scanner_of,
    site_number,
)

VERSION = 2
_SIDE = 128


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
    return write_phantoms(root, Phantoms(seed=seed, difference=difference), sites, progress)


def phantom_case(
    site: str, index: int, seed: int, difference: float = 1.0, modality: str = "ct"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One case: scan (S, H, W) int16, mask (S, H, W) uint8, affine (4, 4).

    Args:
        site: letter out of `PHANTOM_SITES`, or `S001` and so on.
        index: of the case in its site, training cases first; see also `phantoms.FIRST_TEST`.
        seed: of the phantoms.
        difference: see `PhantomSite.exaggerated`.
        modality: one of `MODALITIES`; CT is in HU.
    """
    pictured = import_module(f"flap_nvflare.data.{MODALITIES[modality]}")
    scanner = scanner_of(site, VERSION, seed)
    if difference != 1.0:  # rounding would change the bytes
        scanner = scanner.exaggerated(difference)
    rng = np.random.default_rng([VERSION, seed, site_number(site), index])
    step, pixel = rng.uniform(*scanner.slice_spacing), rng.uniform(*scanner.in_plane)
    slices = int(np.clip(round(rng.uniform(125, 150) / step), 24, 32))
    canvas = Canvas((slices, _SIDE, _SIDE), (step, pixel, pixel), rng)
    phase = PHASES[str(rng.choice(scanner.phases))].diluted(scanner.contrast * rng.uniform(0.85, 1))
    phase = pictured.PHASE or phase  # after the draw: all modalities show the same body
    build = paint_body(canvas, _SIDE * pixel)
    paint_bowel(canvas, build)
    paint_organs(canvas, build, phase)
    paint_spine(canvas, build)
    paint_vessels(canvas, build, phase)
    kidneys = paint_kidneys(canvas, build, phase)
    paint_look_alikes(canvas, kidneys, phase)
    if index in (0, scanner.train, FIRST_TEST) or rng.random() < scanner.tumours:
        for _ in range(1 + int(rng.random() < 0.15)):
            paint_tumour(canvas, kidneys[int(rng.integers(len(kidneys)))], phase)
    return pictured.scan(canvas, scanner), canvas.label, canvas.affine


def phantom_folder(phantoms: Phantoms) -> PhantomFolder:
    """All cases and the table in the layout of KiTS19.

    Cases of the described sites are numbered through the table, as in KiTS19; where their number
    is a knob, a case is named after its site and its number there.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case_ids", "site_ids", "train_test_split", "train_test_split_silo"])
    sites = numbered_sites(phantoms.sites) or tuple(PHANTOM_SITES)
    cases: list[PhantomCase] = []
    for number, site in enumerate(sites):
        shown = site if phantoms.sites else number
        for split, index in _numbers(site, phantoms):
            name = f"case_{site}_{index:04d}" if phantoms.counted else f"case_{len(cases):05d}"
            writer.writerow([name, shown, split, f"{split}_{shown}"])
            draw = partial(
                phantom_case,
                site,
                index,
                phantoms.seed,
                phantoms.difference,
                phantoms.modality,
            )
            cases.append(PhantomCase(site, f"{name}/{IMAGE}", f"{name}/{LABEL}", draw))
    return PhantomFolder(
        version=VERSION,
        sites=sites,
        cases=tuple(cases),
        tables={TABLE: text.getvalue().encode()},
        names=frozenset(case.image.partition("/")[0] for case in cases),
    )


def _numbers(site: str, phantoms: Phantoms) -> list[tuple[str, int]]:
    """Split and number in the site of each of its cases."""
    scanner = scanner_of(site, VERSION, phantoms.seed)
    train, test = phantoms.train or scanner.train, phantoms.test or scanner.test
    first = FIRST_TEST if phantoms.counted else train
    return [("train", index) for index in range(train)] + [
        ("test", first + index) for index in range(test)
    ]
