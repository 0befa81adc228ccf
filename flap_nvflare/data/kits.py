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

from pathlib import Path

from flap_nvflare.data.cases import (
    CASE_NAME,
    MANIFEST,
    SPLITS,
    Case,
    ListedCase,
    SiteCases,
    is_synthetic,
    split_cases,
    stay_within,
)
from flap_nvflare.data.entries import Entry
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.tables import read_rows

# What `cases` defines is named here as well: a hospital's own `site_data.py` may take it from here.
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
CLASS_NAMES = ("kidney", "tumour")
COLUMNS = ("case_ids", "site_ids", "train_test_split_silo")


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


def kits_entries(root: Path) -> list[Entry]:
    """What is there of each case of the table, in its order; unlike `list_kits` of every site.

    Raises:
        DataError: if the table cannot be used, or lists a site with no case of a split.
    """
    table = root / TABLE
    splits = {site: _splits_of_site(table, site) for site in site_names(root)}
    return [
        Entry(
            name=name,
            site=site,
            split=split,
            scans=tuple(path for path in (root / name / IMAGE,) if path.is_file()),
            masks=tuple(path for path in (root / name / LABEL,) if path.is_file()),
            scan_place=f"{name}/{IMAGE}",
            mask_place=f"{name}/{LABEL}",
        )
        for site, found in splits.items()
        for split, names in found.items()
        for name in names
    ]


def is_kits(root: Path) -> bool:
    """Whether the table or one case of KiTS19 is there."""
    return (root / TABLE).is_file() or next(root.glob("case_*/*.nii.gz"), None) is not None


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


def _rows(table: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Line numbers with the values of `COLUMNS`."""
    return read_rows(table, COLUMNS, "copy FLamby's table of this name there")


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
        stay_within(root, file)
    return case
