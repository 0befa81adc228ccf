"""The table `sites.csv` in a root: which case belongs to which site, and to which split.

    case,site,split
    RUNMC-Case00,RUNMC,train
    RUNMC-Case03,RUNMC,test

`flap-nvflare prepare` writes it, and a person may edit it: where it is, it decides.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flap_nvflare.data.cases import CASE_NAME, SPLITS
from flap_nvflare.data.errors import DataError
from flap_nvflare.data.place import place
from flap_nvflare.data.tables import read_rows

SITES = "sites.csv"
COLUMNS = ("case", "site", "split")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        line: its number in the file.
        case: name of the case.
        site: the site that it belongs to.
        split: `train` or `test`.
    """

    line: int
    case: str
    site: str
    split: str


def read_sites(root: Path) -> list[Row]:
    """The lines of a root's table, each case once.

    Raises:
        DataError: if the table is missing or damaged, a case stands in it twice, or a site or a
            split cannot be used.
    """
    table = root / SITES
    rows: dict[str, Row] = {}
    for line, (case, site, split) in read_rows(table, COLUMNS, "'flap-nvflare prepare' writes it"):
        place = f"{table}, line {line}"
        if case in rows:
            raise DataError(
                f"{place}: {case!r} is also in line {rows[case].line}; keep one line for each case"
            )
        if not CASE_NAME.fullmatch(site):
            raise DataError(
                f"{place}: site is {site[:200]!r}; give a name of letters, digits, '_', '-' and '.'"
            )
        if split not in SPLITS:
            raise DataError(f"{place}: split is {split!r}; give 'train' or 'test'")
        rows[case] = Row(line, case, site, split)
    if not rows:
        raise DataError(f"{table}: lists no case; delete it or give it lines")
    return list(rows.values())


def write_sites(root: Path, rows: Iterable[tuple[str, str, str]]) -> Path:
    """Writes name, site and split of every case, whole or not at all.

    Raises:
        OSError: if the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    table = root / SITES
    # As readable as the folder's other files: it names cases, which their folders do as well.
    place(table, text.getvalue().encode())
    return table
