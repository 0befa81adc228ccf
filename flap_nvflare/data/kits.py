"""The KiTS19 layout on disk, with the table of sites that FLamby's Fed-KiTS2019 comes with.

    ROOT/case_00000/imaging.nii.gz
    ROOT/case_00000/segmentation.nii.gz
    ROOT/thresholded_sites.csv

Columns of the table: `case_ids`, `site_ids` (0 to 5 are the sites A to F), `train_test_split`
and `train_test_split_silo`. The last decides, since it is the one by which Fed-KiTS2019 picks the
cases of one centre; it holds `train_0`, `test_0`, and so on, or plain `train` and `test`. This
gives 9/3, 11/3, 9/3, 9/3, 12/4 and 24/6 training and test cases.
"""

from __future__ import annotations

import csv
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from flap_nvflare.data.errors import DataError

__all__ = [
    "IMAGE",
    "LABEL",
    "MANIFEST",
    "TABLE",
    "Case",
    "DataError",
    "ListedCase",
    "SiteCases",
    "is_synthetic",
    "list_kits",
    "read_kits",
    "site_names",
    "split_cases",
]

TABLE = "thresholded_sites.csv"
IMAGE = "imaging.nii.gz"
LABEL = "segmentation.nii.gz"
COLUMNS = ("case_ids", "site_ids", "train_test_split_silo")
SPLITS = ("train", "test")
MANIFEST = "PHANTOM.json"  # lies beside scans that were drawn and are nobody's
CASE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")
# A site must hold this many training cases before one of them is held out.
_FEWEST_TO_SPLIT = 3


@dataclass(frozen=True)
class Case:
    """One scan and its mask.

    Attributes:
        name: name of the case, such as `case_00000`.
        image: NIfTI file with the scan in HU.
        label: NIfTI file with the mask on the same grid.
    """

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class ListedCase(Case):
    """A case and its split.

    Attributes:
        split: `train` or `test`; which training cases are held out is chosen later.
    """

    split: str


@dataclass(frozen=True)
class SiteCases:
    """The cases of one site; no case is in two of the tuples."""

    train: tuple[Case, ...]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]


def read_kits(
    root: Path | str, site: str | int, validation_fraction: float, seed: int
) -> SiteCases:
    """The cases of one site, in order of their names; reads the table, no scans.

    Args:
        root: folder with the case folders and the table.
        site: letter or number of the site as in the table (`A` is 0).
        validation_fraction: share of the training cases held out, 0 <= share < 1. From three
            training cases on at least one is held out; with fewer none.
        seed: chooses which ones; test cases are never among them.

    Raises:
        DataError: if the folder, the table, one of its columns, the site, its training or test
            cases, or a file is missing, or if a name or a link leads out of the folder.
    """
    return split_cases(list_kits(root, site), validation_fraction, seed)


def list_kits(root: Path | str, site: str | int) -> list[ListedCase]:
    """The cases of one site with their splits, in order of split and name.

    Raises:
        DataError: as `read_kits`.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the folder with the KiTS19 cases")
    splits = _splits_of_site(folder / TABLE, site)
    return [_case(folder, name, split) for split, names in splits.items() for name in names]


def split_cases(listed: list[ListedCase], validation_fraction: float, seed: int) -> SiteCases:
    """Training, held out and test cases, each in order of their names.

    Raises:
        DataError: if the share is out of range.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise DataError(
            f"validation_fraction is {validation_fraction!r}; give a number from 0 to below 1"
        )
    cases = {
        split: [
            Case(case.name, case.image, case.label)
            for case in sorted(listed, key=lambda case: case.name)
            if case.split == split
        ]
        for split in SPLITS
    }
    held_out = _held_out([case.name for case in cases["train"]], validation_fraction, seed)
    return SiteCases(
        train=tuple(case for case in cases["train"] if case.name not in held_out),
        validation=tuple(case for case in cases["train"] if case.name in held_out),
        test=tuple(cases["test"]),
    )


def is_synthetic(root: Path) -> bool:
    """Whether the scans of a folder are this package's own phantoms."""
    return (root / MANIFEST).is_file()


def site_names(root: Path | str) -> list[str]:
    """The sites of the table, sorted; letters for numbers up to 25.

    Raises:
        DataError: if the table or one of its columns is missing, or it lists no case.
    """
    table = Path(root) / TABLE
    names = sorted({_site_key(site) for _, (_, site, _) in _rows(table)})
    if not names:
        raise DataError(f"{table}: lists no case; copy FLamby's table of this name there")
    return names


def _splits_of_site(table: Path, site: str | int) -> dict[str, list[str]]:
    """Sorted case names of the site's `train` and `test` split."""
    wanted = _site_key(str(site))
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    known: set[str] = set()
    seen: dict[str, int] = {}
    for line, (name, row_site, silo) in _rows(table):
        place = f"{table}, line {line}"
        if name in seen:
            raise DataError(
                f"{place}: {name!r} is also in line {seen[name]}; keep one line for each case"
            )
        seen[name] = line
        known.add(_site_key(row_site))
        if _site_key(row_site) == wanted:
            if not CASE_NAME.fullmatch(name):
                raise DataError(
                    f"{place}: case name {name[:200]!r} is refused; expected the plain name of a "
                    f"folder beside the table, such as case_00000"
                )
            splits[_split(silo, row_site, place)].append(name)
    if wanted not in known:
        raise DataError(
            f"{table}: site {site!r} is not in column site_ids; it holds the sites {sorted(known)}"
        )
    for split, names in splits.items():
        if not names:
            raise DataError(
                f"{table}: site {site!r} has no {split} case; give one of its lines the "
                f"train_test_split_silo '{split}'"
            )
    return {split: sorted(names) for split, names in splits.items()}


def _rows(table: Path) -> list[tuple[int, tuple[str, str, str]]]:
    """Line numbers with the values of `COLUMNS`, blanks around them taken off."""
    if not table.is_file():
        raise DataError(f"{table}: missing; copy FLamby's table of this name there")
    _stay_within(table.parent, table)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            missing = [name for name in COLUMNS if name not in header]
            if missing:
                raise DataError(f"{table}: no column {missing}; its first line names {header}")
            reader.fieldnames = header
            rows = []
            for row in reader:
                case, site, silo = ((row[name] or "").strip() for name in COLUMNS)
                rows.append((reader.line_num, (case, site, silo)))
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as a CSV table: {error}") from error


def _site_key(site: str) -> str:
    """One name for a site's letter and its number: `0`, `a` and `A` are all `A`."""
    text = site.strip()
    if text.isdecimal() and int(text) < 26:
        return chr(ord("A") + int(text))
    return text.upper() if len(text) == 1 else text


def _split(silo: str, site: str, place: str) -> str:
    """`train` or `test` out of `train_0` or `train`."""
    split, _, suffix = silo.partition("_")
    if split not in SPLITS or (suffix and _site_key(suffix) != _site_key(site)):
        raise DataError(
            f"{place}: train_test_split_silo is {silo!r}; expected 'train_{site}' or 'test_{site}'"
        )
    return split


def _case(root: Path, name: str, split: str) -> ListedCase:
    case = ListedCase(name, root / name / IMAGE, root / name / LABEL, split)
    if not case.image.parent.is_dir():
        raise DataError(f"{case.image.parent}: no such folder, but {TABLE} lists {name}")
    for file, what in ((case.image, "scan"), (case.label, "mask")):
        if not file.is_file():
            raise DataError(f"{file}: missing; put the {what} of {name} there")
        _stay_within(root, file)
    return case


def _stay_within(root: Path, file: Path) -> None:
    """Refuses a link out of the data: whoever writes there could have any file read.

    The folder itself may be a link, and links within it are none of this.
    """
    if not file.resolve().is_relative_to(root.resolve()):
        raise DataError(
            f"{file}: is a link out of {root}; put the file itself there, or name a folder that "
            f"holds both as data_root"
        )


def _held_out(names: list[str], fraction: float, seed: int) -> set[str]:
    """The validation cases: the first ones in the order of a seeded hash of their names.

    A case that joins or leaves the site so moves as few of the others as possible.
    """
    if fraction == 0.0 or len(names) < _FEWEST_TO_SPLIT:
        return set()
    count = min(max(1, round(fraction * len(names))), len(names) - 1)

    def rank(name: str) -> str:
        return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()

    return set(sorted(names, key=rank)[:count])
