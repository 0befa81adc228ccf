"""The KiTS19 layout on disk: which cases a site has, and which of them it may train on.

A root holds `case_00000/imaging.nii.gz`, `case_00000/segmentation.nii.gz` and FLamby's table
`thresholded_sites.csv` (arXiv 2210.04620, Fed-KiTS2019). Six sites are called A to F; the table
counts them 0 to 5.
"""

from __future__ import annotations

import csv
import math
import random
from dataclasses import dataclass
from pathlib import Path

TABLE = "thresholded_sites.csv"
IMAGE = "imaging.nii.gz"
LABEL = "segmentation.nii.gz"
COLUMNS = ("case_ids", "site_ids", "train_test_split", "train_test_split_silo")
SPLITS = ("train", "test")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class DataError(ValueError):
    """Scans or their table cannot be used; the message names file, value and mend."""


@dataclass(frozen=True)
class Case:
    """One scan and its mask.

    Attributes:
        name: the case's folder, `case_00000`.
        image: NIfTI file with Hounsfield units.
        label: NIfTI file with one class index a voxel.
    """

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class SiteCases:
    """A site's cases, each in exactly one split, sorted by name."""

    train: tuple[Case, ...]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]


@dataclass(frozen=True)
class Row:
    """A line of the table: case, site's letter (or own name) and `train` or `test`."""

    case: str
    site: str
    split: str


def read_kits(
    root: Path | str, site: str | int, validation_fraction: float = 0.25, seed: int = 0
) -> SiteCases:
    """The cases of one site.

    A case's split is `train_test_split_silo`, the site's own split, which FLamby writes as
    `train_0` for site 0. Validation cases are drawn from the training cases alone: the rounded
    share, at least one where there are three training cases and the share is not 0, and never
    all of them. The draw depends on seed and site only.

    Args:
        root: folder with the table and the case folders.
        site: the site's letter or number.
        validation_fraction: share of the training cases held out, from 0 to below 1.
        seed: seed of the draw.

    Raises:
        DataError: if the root, the table, a column, the site or a file is missing, or a name
            leads out of the root.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction {validation_fraction!r} is not in [0, 1)")
    root = Path(root)
    rows = read_table(root)
    name = site_name(site)
    known = sorted({row.site for row in rows})
    if name not in known:
        raise DataError(
            f"{root / TABLE}: site {site!r} has no case; sites in the table: {', '.join(known)}"
        )
    found = {
        split: sorted(row.case for row in rows if row.site == name and row.split == split)
        for split in SPLITS
    }
    for split, cases in found.items():
        if not cases:
            raise DataError(
                f"{root / TABLE}: site {site!r} has no {split} case; give it at least one line "
                f"with {split!r} in column train_test_split_silo"
            )
    held = _validation(found["train"], validation_fraction, f"{seed}/{name}")
    return SiteCases(
        train=tuple(_case(root, case) for case in found["train"] if case not in held),
        validation=tuple(_case(root, case) for case in found["train"] if case in held),
        test=tuple(_case(root, case) for case in found["test"]),
    )


def site_name(site: str | int) -> str:
    """`A` for 0, `0`, `a` or `A`; other names stay as they are."""
    text = str(site).strip()
    if text.isascii() and text.isdigit() and int(text) < len(LETTERS):
        return LETTERS[int(text)]
    return text.upper() if len(text) == 1 else text


def read_table(root: Path | str) -> tuple[Row, ...]:
    """All lines of the table in `root`, checked.

    Raises:
        DataError: if root or table is missing, or a line is wrong.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; name the folder that holds case_00000, case_00001, ... "
            f"and {TABLE}"
        )
    path = root / TABLE
    if not path.is_file():
        raise DataError(
            f"{path}: not found; copy FLamby's {TABLE} (datasets/fed_kits19/metadata) into {root}"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            header = [(name or "").strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            missing = [name for name in COLUMNS if name not in header]
            if missing:
                raise DataError(
                    f"{path}: column {', '.join(missing)} is missing; the first line must name "
                    f"{', '.join(COLUMNS)}"
                )
            rows = tuple(_row(path, reader.line_num, line) for line in reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from error
    _require_distinct(path, rows)
    return rows


def _row(path: Path, number: int, line: dict[str, str | None]) -> Row:
    case, site, split, silo = ((line.get(name) or "").strip() for name in COLUMNS)
    if not site:
        raise DataError(f"{path}, line {number}: site_ids is empty; expected A to F or 0 to 5")
    own, _, suffix = silo.partition("_")
    for column, value in (("train_test_split", split), ("train_test_split_silo", own)):
        if value not in SPLITS:
            raise DataError(
                f"{path}, line {number}: {column} is {value!r}; expected 'train' or 'test'"
            )
    if suffix and site_name(suffix) != site_name(site):
        raise DataError(
            f"{path}, line {number}: train_test_split_silo {silo!r} names another site than "
            f"site_ids {site!r}; make them agree"
        )
    _require_plain(path, number, case)
    return Row(case, site_name(site), own)


def _require_plain(path: Path, number: int, case: str) -> None:
    """A case is a folder right below the root, wherever the table comes from."""
    plain = case and not any(sign in case for sign in "/\\:\0") and case not in (".", "..")
    if not plain:
        raise DataError(
            f"{path}, line {number}: case_ids {case!r} is not the name of a folder in "
            f"{path.parent}; expected a name such as 'case_00000'"
        )


def _require_distinct(path: Path, rows: tuple[Row, ...]) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.case in seen:
            raise DataError(f"{path}: case {row.case!r} has two lines; keep one of them")
        seen.add(row.case)


def _validation(cases: list[str], fraction: float, seed: str) -> frozenset[str]:
    count = math.floor(fraction * len(cases) + 0.5)
    if fraction > 0 and len(cases) >= 3:
        count = max(count, 1)
    count = min(count, len(cases) - 1)
    # A text seeds through SHA-512 and so the same way in every process.
    return frozenset(random.Random(seed).sample(cases, count))


def _case(root: Path, name: str) -> Case:
    folder = root / name
    if not folder.resolve().is_relative_to(root.resolve()) and not folder.is_symlink():
        raise DataError(f"{folder}: leads out of {root}; case folders lie right below the root")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, but {root / TABLE} names the case; add it")
    case = Case(name, folder / IMAGE, folder / LABEL)
    for what, path in (("scan", case.image), ("mask", case.label)):
        if not path.is_file():
            raise DataError(f"{path}: the {what} of {name} is missing; put the file there")
    return case
