"""Is a download whole? Every case's files, headers and grids, and of some the voxels; no training.

What is wrong is collected, not raised, so that one run names all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flap_nvflare.data.cases import CASE_NAME, is_synthetic
from flap_nvflare.data.entries import Entry, assigned, placed, require_splits
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.geometry import copy_geometry
from flap_nvflare.data.layouts import LAYOUTS, Layout, layout_of
from flap_nvflare.data.panels import Panel, panels_of
from flap_nvflare.data.scan import Scan, open_image
from flap_nvflare.data.site_table import SITES, write_sites
from flap_nvflare.data.volume import Volume, check_same_grid, load_volume

PERCENTILES = (0.5, 50.0, 99.5)
_MOST_VALUES = 100_000  # foreground values of a case that the percentiles are taken from

# Wraps the entries to show how far the reading is.
Watch = Callable[[Sequence[Entry]], Iterable[Entry]]


@dataclass(frozen=True)
class Asked:
    """What a preparation is to do.

    Attributes:
        layout: name of the layout that the root must have.
        root: folder with the scans.
        site: takes the place of every hospital; empty for those of layout or table.
        deep: whether the voxels of every case are read, not of one case a site alone.
        force: whether a `sites.csv` that is there is written anew.
        copy_geometry: whether a mask of the scan's shape gets the scan's header where they differ.
    """

    layout: str
    root: Path
    site: str = ""
    deep: bool = False
    force: bool = False
    copy_geometry: bool = False


@dataclass
class SiteFacts:
    """What the cases of a site turned out to be.

    Attributes:
        train, test: names of its cases.
        shapes: (S, H, W) of each case with sound headers.
        spacings: mm along (S, H, W) of each of them.
        read: number of cases whose voxels were read.
        shown: number of these in which each class appears, from class 1.
        grey: 0.5, 50 and 99.5 percentile of their foreground; None without any.
        picture: slices of the first of them.
    """

    train: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    spacings: list[tuple[float, float, float]] = field(default_factory=list)
    read: int = 0
    shown: dict[int, int] = field(default_factory=dict)
    grey: tuple[float, ...] | None = None
    picture: list[Panel] = field(default_factory=list)


@dataclass
class Preparation:
    """What was found.

    Attributes:
        layout: of the root.
        synthetic: whether the scans are this package's phantoms.
        class_names: foreground classes, label 1 first.
        grey_values: how they should reach the network, see `settings.Federation`.
        sites: facts by site.
        problems: what is in the way of a federation, each with its place.
        notes: what is not, and is worth knowing.
        mended: masks that got the header of their scan.
    """

    layout: Layout
    synthetic: bool
    class_names: tuple[str, ...] = ()
    grey_values: str = "site"
    sites: dict[str, SiteFacts] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether a federation can start on the data."""
        return bool(self.sites) and not self.problems


def prepare(asked: Asked, watch: Watch = iter) -> Preparation:
    """Checks a root and, where all is well, writes its table of sites.

    Args:
        asked: what to do.
        watch: wraps the cases while they are read.

    Raises:
        DataError: if the root has not the layout, a table or description cannot be used, the
            cases are of no site, or what is asked for would change a folder of phantoms.
        OSError: if the table cannot be written, and training would read other sites without it.
    """
    layout = _layout(asked)
    _refuse_phantoms(asked)
    found = Preparation(
        layout,
        is_synthetic(asked.root),
        layout.class_names(asked.root),
        layout.grey_values(asked.root),
    )
    entries = _entries(asked, layout, found)
    values: dict[str, list[np.ndarray]] = {}
    for entry in watch(entries):
        facts = found.sites.setdefault(entry.site, SiteFacts())
        (facts.train if entry.split == "train" else facts.test).append(entry.name)
        try:
            _look(asked, entry, facts, found, values.setdefault(entry.site, []))
        except (DataError, OSError, MemoryError) as error:
            found.problems.append(str(error))
    for site, facts in sorted(found.sites.items()):
        _sum_up(asked, site, facts, values[site], found)
        ours = [entry for entry in entries if entry.site == site]
        try:
            require_splits(asked.root, ours)
        except DataError as error:
            found.problems.append(str(error))
    if found.ok and layout.has_table and not found.synthetic:
        _keep(asked, entries, found)
    return found


def _layout(asked: Asked) -> Layout:
    layout = LAYOUTS[asked.layout]
    if not asked.root.is_dir() or not layout.is_at(asked.root):
        raise DataError(f"{asked.root}: no {layout.looks_for}; the data set: {layout.origin}")
    recognised = layout_of(asked.root)
    if recognised.name != layout.name:
        raise DataError(
            f"{asked.root}: would be read as {recognised.name} ({recognised.looks_for}); prepare "
            f"it as that, or move those files out"
        )
    return layout


def _refuse_phantoms(asked: Asked) -> None:
    """Into a folder of phantoms nothing is written: 'flap-nvflare phantom' takes it for its own."""
    wanted = {"--site": asked.site, "--force": asked.force, "--copy-geometry": asked.copy_geometry}
    given = [name for name, value in wanted.items() if value]
    if given and is_synthetic(asked.root):
        raise DataError(
            f"{asked.root}: holds synthetic scans, to which nothing is added; leave out "
            f"{', '.join(given)}"
        )


def _entries(asked: Asked, layout: Layout, found: Preparation) -> list[Entry]:
    """The cases with site and split, by the table that is there or as it will be written."""
    if asked.site and not CASE_NAME.fullmatch(asked.site):
        raise DataError(
            f"--site {asked.site[:200]}: give a name of letters, digits, '_', '-' and '.'"
        )
    entries = layout.entries(asked.root)
    if not layout.has_table:
        if asked.site:
            raise DataError(f"--site {asked.site}: the sites of this layout stand in its own table")
        return entries
    kept = os.path.lexists(asked.root / SITES) and not asked.force
    if kept and asked.site:
        raise DataError(
            f"{asked.root / SITES}: is there and says where each case is; edit it, or have it "
            f"written anew for --site {asked.site} by --force"
        )
    if kept:
        listed = placed(asked.root, entries, layout.name)
        left = sorted({entry.name for entry in entries} - {entry.name for entry in listed})
        mend = "delete it to draw more scans" if found.synthetic else "--force writes it anew"
        found.notes.append(f"{asked.root / SITES} is kept; {mend}")
        if left:
            found.notes.append(f"{len(left)} cases are not in it and are left out: {_some(left)}")
        return listed
    if asked.site or all(entry.site for entry in entries):
        if any(not entry.split for entry in entries):
            found.notes.append("a fixed fifth of each site's cases is for testing" + layout.split)
        return assigned(entries, asked.site)
    return placed(asked.root, entries, layout.name)


def _look(
    asked: Asked, entry: Entry, facts: SiteFacts, found: Preparation, values: list[np.ndarray]
) -> None:
    """Files and headers of a case, and its voxels if they are wanted."""
    case = entry.case(asked.root)
    scan = open_image(case.image)
    try:
        check_same_grid(case, scan, open_image(case.label))
    except DataError:
        if not asked.copy_geometry:
            raise
        copy_geometry(case)
        found.mended.append(str(case.label))
    header = Scan(case.image, scan, np.empty(scan.shape, np.bool_))
    facts.shapes.append(header.shape)
    facts.spacings.append(header.spacing)
    if asked.deep or not facts.read:
        volume = load_volume(case, len(found.class_names))
        facts.picture = facts.picture or panels_of(volume, f"{entry.site}: {volume.name}")
        _count(volume, facts, values)


def _count(volume: Volume, facts: SiteFacts, values: list[np.ndarray]) -> None:
    facts.read += 1
    foreground = volume.image[volume.label > 0]
    # Copied: a view would keep the foreground of every case.
    values.append(foreground[:: max(1, foreground.size // _MOST_VALUES)].copy())
    for label in np.unique(volume.label):
        if label > 0:
            facts.shown[int(label)] = facts.shown.get(int(label), 0) + 1


def _sum_up(
    asked: Asked, site: str, facts: SiteFacts, values: list[np.ndarray], found: Preparation
) -> None:
    foreground = np.concatenate(values) if values else np.empty(0)
    if foreground.size:
        facts.grey = tuple(float(value) for value in np.percentile(foreground, PERCENTILES))
    elif facts.read:
        what = f"site {site}: the {facts.read} cases that were read show no foreground"
        if asked.deep:
            found.problems.append(f"{what}; check its masks, labels count from 1")
        else:
            found.notes.append(f"{what}; --deep reads every case")


def _keep(asked: Asked, entries: Sequence[Entry], found: Preparation) -> None:
    """Writes the table of sites, unless one is there that a person may have edited."""
    if os.path.lexists(asked.root / SITES) and not asked.force:
        return
    try:
        path = write_sites(asked.root, ((entry.name, entry.site, entry.split) for entry in entries))
    except OSError as error:
        if asked.site or asked.force:  # training would read other sites than were asked for
            raise
        found.notes.append(f"{asked.root / SITES} was not written ({error}); training does without")
        return
    found.notes.append(f"wrote {path}; edit it to move cases between sites and splits")


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")
