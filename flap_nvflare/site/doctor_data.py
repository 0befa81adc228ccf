"""The site's scans, read and checked as training reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flap_nvflare.data.cases import Case, SiteCases
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.layouts import site_names
from flap_nvflare.data.source import read_cases
from flap_nvflare.data.volume import Volume, load_volume, orientation
from flap_nvflare.data.window import volume_window
from flap_nvflare.settings import Federation
from flap_nvflare.site.doctor_machine import Needs
from flap_nvflare.site.finding import Finding, of_error

# Wraps the cases to show how far the reading is.
Watch = Callable[[list[Case]], Iterable[Case]]


@dataclass
class Scans:
    """What the scans turned out to be.

    Attributes:
        cases: all cases by split, of every site that was read.
        broken: findings, one for each case that cannot be used.
        shown: number of readable cases in which each class appears, from class 1.
        slices, voxels: slices and voxels of each readable case.
        spacing: mm along (S, H, W) of each readable case.
        orientations: number of cases by the axes of their files.
        sample: the first readable training case, for a picture.
    """

    cases: list[SiteCases] = field(default_factory=list)
    broken: list[Finding] = field(default_factory=list)
    shown: Counter[int] = field(default_factory=Counter)
    slices: list[int] = field(default_factory=list)
    voxels: list[int] = field(default_factory=list)
    spacing: list[tuple[float, float, float]] = field(default_factory=list)
    orientations: Counter[str] = field(default_factory=Counter)
    sample: Volume | None = None

    def needs(self, weights: float) -> Needs:
        """What training will take of the machine, with base weights of so many bytes."""
        return Needs(sum(self.slices), max(self.voxels, default=0), sum(self.voxels), weights)

    def add(self, case: Case, volume: Volume) -> None:
        """Counts one readable case."""
        self.shown.update(int(label) for label in np.unique(volume.label) if label > 0)
        self.slices.append(volume.image.shape[0])
        self.voxels.append(volume.image.size)
        self.spacing.append(volume.spacing)
        self.orientations[orientation(case)] += 1


def check_cases(
    root: Path,
    site: str,
    federation: Federation,
    least: int,
    scans: Scans,
    source: Path | None = None,
) -> Iterator[Finding]:
    """The table of cases and the files that it names; no scan is read.

    Args:
        root: folder with the scans.
        site: the site's name in the table; empty for every site of it.
        federation: share of validation cases and seed.
        least: training cases that the site's own file asks for.
        scans: takes the cases up.
        source: the site's own file of code that lists its scans; None for a layout that is
            recognised.
    """
    for name in [site] if site else site_names(root):
        share, seed = federation.validation_fraction, federation.seed
        try:
            cases = read_cases(root, name, share, seed, source)
        except DataError as error:
            yield of_error("cases", error)
            continue
        scans.cases.append(cases)
        train, held, test = len(cases.train), len(cases.validation), len(cases.test)
        found = f"site {name}: {train} training, {held} validation, {test} test, at {root}"
        enough = train >= least
        if not enough:
            found += f"; limits.min_cases asks for {least} training cases"
        mend = "" if enough else "add training cases to the table, or lower min_cases"
        yield Finding("cases", enough, found, mend)


def check_scans(federation: Federation, scans: Scans, watch: Watch = list) -> Iterator[Finding]:
    """Header and voxels of every case: grids, spacing, direction, grey values, labels.

    A broken case is a finding of its own, so that one run names them all.
    """
    every = [c for s in scans.cases for c in (*s.train, *s.validation, *s.test)]
    train = {case.image for cases in scans.cases for case in cases.train}
    for case in watch(every):
        try:
            volume = load_volume(case, federation.classes)
            if federation.grey_values == "scan":
                volume_window(volume)
        except (DataError, OSError, MemoryError) as error:
            scans.broken.append(of_error(f"case {case.name}", error))
            continue
        scans.add(case, volume)
        if scans.sample is None and case.image in train:
            scans.sample = volume
    yield from scans.broken
    readable = len(scans.slices)
    if readable:
        yield Finding("scans", True, f"{readable} of {len(every)} readable; {_described(scans)}")
    yield from _labels(federation, scans)


def _described(scans: Scans) -> str:
    low, high = np.min(scans.spacing, axis=0), np.max(scans.spacing, axis=0)
    along = f"{low[0]:.3g} to {high[0]:.3g} mm between slices"
    across = f"{low[1:].min():.3g} to {high[1:].max():.3g} mm across"
    axes = ", ".join(f"{axes} {count}" for axes, count in sorted(scans.orientations.items()))
    slices = f"{min(scans.slices)} to {max(scans.slices)} slices"
    return f"{slices}, {along}, {across}; axes of the files: {axes}"


def _labels(federation: Federation, scans: Scans) -> Iterator[Finding]:
    """How many cases show each class; a class that no mask shows can't be learned here."""
    if not scans.slices:
        return
    names = federation.class_names
    counts = {name: scans.shown[number] for number, name in enumerate(names, start=1)}
    found = ", ".join(f"{name} in {count} cases" for name, count in counts.items())
    ok = any(counts.values())
    mend = "" if ok else f"check the masks: labels are 1 to {federation.classes} for {names}"
    yield Finding("labels", ok, found, mend)
