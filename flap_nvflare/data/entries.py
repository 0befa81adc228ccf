"""What a root holds of each case, sound or not, and how entries become the cases of a site.

A layout only finds entries. What is the same for every layout stands here: a case has one scan and
one mask inside the root, `sites.csv` decides where it is, and every site has both splits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flap_nvflare.data.cases import CASE_NAME, SPLITS, ListedCase, shuffled, stay_within
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.site_table import COLUMNS, SITES, read_sites

_TEST_SHARE = 5  # one in so many


@dataclass(frozen=True)
class Entry:
    """A case as a layout finds it.

    Attributes:
        name: name of the case, unique in the root.
        site: the hospital; empty where the layout does not say.
        split: the published one; empty where there is none.
        scans, masks: the files that are its scan or mask by their names; of a sound case one each.
        scan_place, mask_place: where they belong, for messages.
        binary: see `Case.binary`.
    """

    name: str
    site: str
    split: str
    scans: tuple[Path, ...]
    masks: tuple[Path, ...]
    scan_place: str
    mask_place: str
    binary: bool = False

    def case(self, root: Path) -> ListedCase:
        """The case.

        Raises:
            DataError: if a file is missing, there are two, the name cannot be used, or a link
                leads out of the root.
        """
        place = f"{root}: case {self.name[:200]}"
        if not CASE_NAME.fullmatch(self.name):
            raise DataError(f"{place}: rename its files; use letters, digits, '_', '-' and '.'")
        for files, what, where in (
            (self.scans, "scan", self.scan_place),
            (self.masks, "mask", self.mask_place),
        ):
            if not files:
                raise DataError(f"{place} has no {what}; expected {where}")
            if len(files) > 1:
                named = ", ".join(str(file.relative_to(root)) for file in files)
                raise DataError(f"{place} has {len(files)} files as its {what}: {named}; keep one")
            stay_within(root, files[0])
        return ListedCase(self.name, self.scans[0], self.masks[0], self.split, binary=self.binary)


def placed(root: Path, entries: Sequence[Entry], layout: str) -> list[Entry]:
    """The entries with site and split, in order of their names.

    `sites.csv` decides where it is; cases that it does not list are left out. Without it the
    hospitals and splits are those of the layout, see `assigned`.

    Raises:
        DataError: if there is no entry, the table names a case that is not there, or a layout that
            names no hospital comes without a table.
    """
    if not entries:
        raise DataError(f"{root}: holds no case; see 'flap-nvflare prepare {layout} --help'")
    if os.path.lexists(root / SITES):  # a dangling link is no reason to split otherwise
        return _by_table(root, entries)
    if not all(entry.site for entry in entries):
        raise DataError(
            f"{root / SITES}: missing, and this layout does not say which hospital a case is of; "
            f"write it by: flap-nvflare prepare {layout} {root} --site NAME"
        )
    return assigned(entries)


def assigned(entries: Iterable[Entry], site: str = "") -> list[Entry]:
    """The entries with a split each: the published one, or of each site a fixed fifth as test.

    The fifth is the first of the site's names in the order of their hashes, the same anywhere.

    Args:
        entries: with the hospital of each.
        site: takes the place of every hospital.
    """
    found = sorted(entries, key=lambda entry: entry.name)
    if site:
        found = [replace(entry, site=site) for entry in found]
    test: set[str] = set()
    for name in {entry.site for entry in found}:
        free = [entry.name for entry in found if entry.site == name and not entry.split]
        count = max(round(len(free) / _TEST_SHARE), 1)
        test.update(shuffled(free, "test")[: min(count, len(free) - 1)] if free else ())
    splits = {True: "test", False: "train"}
    return [replace(entry, split=entry.split or splits[entry.name in test]) for entry in found]


def names_of_sites(entries: Iterable[Entry]) -> list[str]:
    """The sites of placed entries, sorted."""
    return sorted({entry.site for entry in entries})


def cases_of_site(root: Path, entries: Sequence[Entry], site: str) -> list[ListedCase]:
    """The cases of one site, of placed entries.

    Raises:
        DataError: if there is no such site, one of its cases cannot be used, or it has no case of
            a split.
    """
    ours = [entry for entry in entries if entry.site == site]
    if not ours:
        raise DataError(f"{root}: no case of site {site!r}; it holds {names_of_sites(entries)}")
    cases = [entry.case(root) for entry in ours]
    require_splits(root, ours)
    return cases


def require_splits(root: Path, entries: Sequence[Entry]) -> None:
    """Refuses entries of one site that are all of one split.

    Raises:
        DataError: naming the split that is missing.
    """
    for split in SPLITS:
        if not any(entry.split == split for entry in entries):
            raise DataError(
                f"{root}: site {entries[0].site!r} has no {split} case; add some, or give one of "
                f"its cases the split '{split}' in a table {SITES} ({','.join(COLUMNS)})"
            )


def _by_table(root: Path, entries: Sequence[Entry]) -> list[Entry]:
    by_name = {entry.name: entry for entry in entries}
    found = []
    for row in read_sites(root):
        if row.case not in by_name:
            raise DataError(
                f"{root / SITES}, line {row.line}: no case {row.case[:200]!r} in {root}; take the "
                f"line out, put the scan there, or have 'flap-nvflare prepare' write the table "
                f"anew by --force"
            )
        found.append(replace(by_name[row.case], site=row.site, split=row.split))
    return sorted(found, key=lambda entry: entry.name)
